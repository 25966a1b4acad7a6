"""Opens dialogues with a model, with adapters on it, and with the bare model, all in memory around the same weights."""

from pathlib import Path
from typing import Any

import accel_llm.system.chatter

from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from accel_llm.adapters.locate import check_bases, describe_other_name, find_adapter, find_base
from accel_llm.adapters.saved import read_adapter_config
from accel_llm.chat.template import Template, load_template
from accel_llm.config.tool_options import AskOptions, ChatOptions
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import check_answers
from accel_llm.merge.load import load_to_ask
from accel_llm.merge.skeleton import read_model_config
from accel_llm.model.answers import Dialogue, print_remark
from accel_llm.model.classifier import check_gives_tokens
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.model_names import check_model_name
from accel_llm.model.tokenizer import load_tokenizer

BARE = ""  # name of the model without an adapter
# The files that decide the answers, beside the weights of a whole model.
FILES_OF_ANSWERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json")
FILES_OF_ANSWERS += ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# What transformers 5.24 takes where neither the options nor the model's own generation config say anything.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}

Words = tuple[PreTrainedTokenizerFast, Template]


def open_dialogues(options: ChatOptions) -> dict[str, Dialogue]:
    """Load the model and the adapters of the options. Return a dialogue with each adapter, by its name there.

    The dialogue with the bare model is named `BARE`. It is left out if the model has no chat template of its own, and no
    rows for the tokens of the first adapter. The first dialogue is that with `options.model`.

    Raises:
        ConfigError: a model, an adapter or a tokenizer cannot be loaded, they do not belong together, or an answer
            would never end.
    """
    return _open_dialogues(options, options.adapters, options.system)


def open_dialogue(options: AskOptions) -> Dialogue:
    """Load the model of the options, with its adapter if it is one, and return a dialogue with it.

    Raises:
        ConfigError: as `open_dialogues`.
    """
    return next(iter(_open_dialogues(options, [], None).values()))


def identify_model(options: AskOptions) -> str:
    """Return a hash of what makes the answers of `options.model`: weights, config, tokenizer, template, settings.

    It covers all bytes of the weights, since answers of two models must not be mixed; a hub model must be in the cache.
    """
    adapters, base, _ = find_models(options, [])
    folder = Path(base) if Path(base).is_dir() else Path(str(cached_file(base, "config.json"))).parent
    parts: list[Any] = [model_fingerprint(base, whole=True)]
    for place in (*adapters.values(), folder):
        parts += [file for name in FILES_OF_ANSWERS if (file := place / name).is_file()]
    return data_fingerprint(*parts)


def _open_dialogues(options: AskOptions, more: list[str], system: str | None) -> dict[str, Dialogue]:
    """Open dialogues with the model, and with `more` adapters on its base; `system` is the first message of each."""
    adapters, base, field = find_models(options, more)
    # A classifier has no chat template, which would be the first to be missed.
    for folder in adapters.values():
        check_answers(folder, read_adapter_config(folder).get("task_type"))
    check_gives_tokens(read_model_config(base, options.trust_remote_code, field), base, field)
    words = {name: _load_words(tokenizer_source(folder, base), options) for name, folder in adapters.items()}
    words[BARE] = _bare_words(base, options, list(words.values()))
    models = dict(zip((BARE, *adapters), load_to_ask(base, field, options, list(adapters.values())), strict=True))
    for name, folder in adapters.items():
        if (folder / "generation_config.json").is_file():
            models[name].generation_config = GenerationConfig.from_pretrained(str(folder))
    rows = models[BARE].get_input_embeddings().weight.shape[0]
    if adapters and max(words[BARE][0].get_vocab().values()) >= rows:
        del models[BARE]
    first = options.model if options.model in adapters else BARE
    names = [first, *(name for name in models if name != first)]
    return {
        name: Dialogue(models[name], *words[name], _settings(models[name], *words[name], options), system)
        for name in names
    }


def find_models(options: AskOptions, more: list[str]) -> tuple[dict[str, Path], str, str]:
    """Return the folder of each adapter by its name in the options, the base, and the option that names the base.

    `more` are the names of adapters beside the model.

    Raises:
        ConfigError: one of them does not exist, or an adapter was trained on another base.
    """
    given = find_adapter(options.model)
    if (given / "adapter_config.json").is_file():
        adapters, base, field = {options.model: given}, find_base(given, options.base), "base"
    else:
        # A run with method full has its model in the folder model/.
        base = str(given / "model") if (given / "model" / "config.json").is_file() else options.model
        check_model_name(base, "model")
        adapters, field = {}, "model"
    for name in more:
        adapters[name] = find_adapter(name)
        read_adapter_config(adapters[name], "adapters")
        if options.base is None and (other := describe_other_name(adapters[name], base)):
            print_remark(f"{other}; it is asked on the latter.")
    if not options.allow_other_base:
        check_bases(list(adapters.values()), base)
    return adapters, base, field


def tokenizer_source(adapter: Path, base: str) -> str:
    """Return the folder or hub id of the tokenizer of an adapter: its own folder, or else its base."""
    return str(adapter) if (adapter / "tokenizer_config.json").is_file() else base


def _load_words(source: str, options: AskOptions) -> Words:
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    return tokenizer, load_template(tokenizer, options.chat_template)


def _bare_words(base: str, options: AskOptions, others: list[Words]) -> Words:
    """Return tokenizer and template of the base, or those of the first adapter if it has no template."""
    try:
        return _load_words(base, options)
    except ConfigError:
        if not others:
            raise
        return others[0]


def _settings(
    model: Any, tokenizer: PreTrainedTokenizerFast, template: Template, options: AskOptions
) -> GenerationConfig:
    """Return sampling, length and stop tokens of the model, with the end of turn of the template.

    Raises:
        ConfigError: there is no stop token, or an option has no effect; see `choose_sampling`.
    """
    stop = model.generation_config.eos_token_id
    stop_ids = {template.turn_end_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    if not stop_ids:
        raise ConfigError(
            f"model: {options.model} names no end token, so no answer would end; give a chat_template with one."
        )
    tokens = {"eos_token_id": sorted(stop_ids), "pad_token_id": tokenizer.pad_token_id}
    sampling = choose_sampling(model.generation_config, options)
    return GenerationConfig(max_new_tokens=options.max_new_tokens, num_beams=1, **tokens, **sampling)


def choose_sampling(own: GenerationConfig, options: AskOptions) -> dict[str, Any]:
    """Return how tokens are chosen: as the options say, else as the model's `own` config, else as transformers.

    Answers are greedy if temperature is 0, or if neither the options nor the model ask for anything else.

    Raises:
        ConfigError: an option narrows the choice of a token, but the answers are greedy.
    """
    given = {name: getattr(options, name, None) for name in _SAMPLING_DEFAULTS}
    narrowing = [name for name in ("top_p", "top_k", "min_p") if given[name] is not None]
    penalty = given["repetition_penalty"] or own.repetition_penalty or 1.0
    samples = bool(narrowing or own.do_sample) if given["temperature"] is None else given["temperature"] > 0
    if not samples:
        if narrowing:
            raise ConfigError(
                f"{narrowing[0]}: {given[narrowing[0]]} has no effect at temperature 0, which always takes the most "
                "likely token; give a temperature above 0, or leave it out."
            )
        return {"do_sample": False, "repetition_penalty": penalty}
    chosen = {
        name: next(value for value in (given[name], getattr(own, name, None), default) if value is not None)
        for name, default in _SAMPLING_DEFAULTS.items()
    }
    return {"do_sample": True, **chosen}


def describe_sampling(settings: Any) -> str:
    """Return what of the generation settings decides on a token, as the options write it."""
    penalty = f"repetition_penalty {settings.repetition_penalty:g}"
    penalties = [penalty] if settings.repetition_penalty != 1 else []
    if not settings.do_sample:
        return ", ".join(["greedy", *penalties])
    shown = {"top_k": settings.top_k, "top_p": settings.top_p if settings.top_p < 1 else 0, "min_p": settings.min_p}
    parts = [f"{name} {value:g}" for name, value in shown.items() if value]
    return ", ".join([f"temperature {settings.temperature:g}", *parts, *penalties])
