"""Writes a model folder as one GGUF file, tensor by tensor: the largest tensor bounds the memory, not the model."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.chat.template import Template, load_template
from accel_llm.errors import ConfigError
from accel_llm.merge.gguf_model import (
    ROTATION_FACTORS,
    GgufWeight,
    add_settings,
    check_family,
    pair_neighbours,
    rotation_factors,
    weight_names,
)
from accel_llm.merge.gguf_tokenizer import GgufTokenizer, convert_tokenizer
from accel_llm.merge.skeleton import read_model_config
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.model.tokenizer import load_tokenizer
from accel_llm.system.weights import WeightFiles, open_weights

SERVING_PACKAGES = {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}
LARGEST_FLOAT16 = 65504.0
UNUSED_NAMES = (".rotary_emb.inv_freq",)  # of old files; transformers computes them
STOP_KEYS = 3  # GGUF has three keys of tokens that end an answer


class ServedWords(NamedTuple):
    """What turns messages into tokens and ends an answer. `template` is None if the tokenizer has none."""

    tokenizer: PreTrainedTokenizerFast
    template: Template | None
    stop_ids: list[int]
    generation: GenerationConfig


class PlannedWeight(NamedTuple):
    """A weight of the model folder, its place in the GGUF file, and the number format there."""

    source: str
    target: GgufWeight
    dtype: torch.dtype


def check_serving_packages(*names: str) -> None:
    """Check that these modules of the extra `serve` are installed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [SERVING_PACKAGES[name] for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; run "
            'pip install -e ".[serve]" (it builds llama.cpp, which takes minutes).'
        )


def read_words(folder: Path) -> ServedWords:
    """Load tokenizer, template and stop tokens of a model folder.

    Raises:
        ConfigError: a file is missing or broken, or no token ends an answer.
    """
    tokenizer = load_tokenizer(str(folder))
    template = load_template(tokenizer) if tokenizer.chat_template else None
    generation = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(str(folder))
        except LOADING_ERRORS as error:
            raise ConfigError(
                f"model: generation_config.json of {folder} cannot be read ({short_reason(error)})."
            ) from None
    stop = generation.eos_token_id
    # As launch/chat.py stops: at the end of a turn, and where the generation config says.
    named = [template.turn_end_id if template else None, *(stop if isinstance(stop, list) else [stop])]
    stop_ids = list(dict.fromkeys(token for token in named if token is not None))
    stop_ids = stop_ids or [token for token in [tokenizer.eos_token_id] if isinstance(token, int)]
    if not stop_ids:
        raise ConfigError(
            f"model: {folder} names no end token, so no answer would end; give generation_config.json one."
        )
    return ServedWords(tokenizer, template, stop_ids, generation)


def write_gguf(
    folder: Path, target: Path, words: ServedWords, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Write the model in `folder` to the file `target`, matrices in float16. Returns sentences for the user.

    Vectors, and matrices with a number that float16 cannot hold, are written in float32. `progress` is called with the
    bytes written and the bytes in all.

    Raises:
        ConfigError: GGUF cannot say what the model is, or its weights are missing or not finite.
    """
    gguf: Any = importlib.import_module("gguf")
    config = read_model_config(folder, False, "model")
    check_family(config, folder)
    files, planned = _plan(folder, config)
    converted = convert_words(words, files.specs["model.embed_tokens.weight"].shape[0])

    writer = gguf.GGUFWriter(target, config.model_type)
    try:
        writer.add_type("model")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        add_settings(writer, config, gguf)
        _add_tokenizer(writer, words, converted)
        _add_sampling(writer, words.generation)
        _write_weights(writer, config, files, planned, progress)
    finally:
        writer.close()
    wide = [
        weight.source
        for weight in planned
        if weight.dtype == torch.float32 and len(files.specs[weight.source].shape) > 1
    ]
    if not wide:
        return []
    return [f"{len(wide)} matrices stay in float32, since float16 ends at {LARGEST_FLOAT16:,.0f}, such as {wide[0]}"]


def _plan(folder: Path, config: PreTrainedConfig) -> tuple[WeightFiles, list[PlannedWeight]]:
    """Return the weights in the order of the file; each is read once to choose its number format."""
    try:
        files = open_weights(folder)
    except LOADING_ERRORS as error:
        raise ConfigError(f"model: the weights of {folder} cannot be read ({short_reason(error)}).") from None
    names = weight_names(config)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = {name for name in files.specs.keys() - names.keys() - ignored if not name.endswith(UNUSED_NAMES)}
    for problem, which in (("lacks", names.keys() - files.specs.keys()), ("holds", extra)):
        if which:
            what = (
                "weights that its config.json promises" if problem == "lacks" else "weights that GGUF has no name for"
            )
            raise ConfigError(f"model: {folder} {problem} {len(which)} {what}, such as {min(which)}.")
    return files, [PlannedWeight(name, target, _choose_dtype(folder, files, name)) for name, target in names.items()]


def _choose_dtype(folder: Path, files: WeightFiles, name: str) -> torch.dtype:
    low, high = torch.aminmax(files.read(name))
    largest = max(abs(float(low)), abs(float(high)))
    if not largest < float("inf"):  # also true for NaN
        raise ConfigError(f"model: {name} in {folder} holds a number that is not finite.")
    wide = len(files.specs[name].shape) < 2 or largest > LARGEST_FLOAT16
    return torch.float32 if wide else torch.float16


def convert_words(words: ServedWords, rows: int) -> GgufTokenizer:
    """Return the tokenizer in the form of GGUF, for an embedding of `rows` rows. Raises as `convert_tokenizer` does."""
    special_first = False
    if words.template:
        first = words.template.prompt_ids([{"role": "user", "content": "a"}])[0]
        special_first = first in words.tokenizer.added_tokens_decoder
    return convert_tokenizer(words.tokenizer, rows, special_first)


def _add_tokenizer(writer: Any, words: ServedWords, converted: GgufTokenizer) -> None:
    tokenizer = words.tokenizer
    writer.add_tokenizer_model(converted.model)
    writer.add_tokenizer_pre(converted.pattern)
    writer.add_token_list(converted.tokens)
    writer.add_token_types(converted.kinds)
    writer.add_token_merges(converted.merges)
    writer.add_token_scores(converted.scores)
    writer.add_add_space_prefix(converted.leading_space)
    writer.add_add_bos_token(converted.adds_bos)
    writer.add_add_eos_token(converted.adds_eos)

    # Without these keys llama.cpp takes ids of other models.
    end, turn_end, *more = order_stops(tokenizer, words.stop_ids)
    writer.add_bos_token_id(end if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(turn_end)
    for token in more:
        writer.add_eom_token_id(token)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if isinstance(tokenizer.unk_token_id, int):
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if words.template:
        tools = words.template.source_for_tools
        templates = [{"name": "default", "template": words.template.source}]
        writer.add_chat_template(templates + ([{"name": "tool_use", "template": tools}] if tools else []))


def order_stops(tokenizer: PreTrainedTokenizerFast, stop_ids: list[int]) -> list[int]:
    """Return the stop tokens for GGUF's keys eos, eot and eom: two or three, the tokenizer's own end token first.

    Raises:
        ConfigError: there are more tokens than keys.
    """
    end = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else stop_ids[0]
    others = [token for token in stop_ids if token != end] or [end]
    if 1 + len(others) > STOP_KEYS:
        texts = ", ".join(map(str, tokenizer.convert_ids_to_tokens([end, *others])))
        raise ConfigError(
            f"model: {tokenizer.name_or_path} ends its answers at {1 + len(others)} tokens ({texts}), and GGUF has keys "
            f"for {STOP_KEYS}; leave some out of eos_token_id in generation_config.json."
        )
    return [end, *others]


def _add_sampling(writer: Any, generation: GenerationConfig) -> None:
    """Write how the model is sampled, if its generation config says that it is."""
    if not generation.do_sample:
        return
    for name, add in (
        ("temperature", writer.add_sampling_temp),
        ("top_k", writer.add_sampling_top_k),
        ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p),
    ):
        if (value := getattr(generation, name)) is not None:
            add(value)


def _write_weights(
    writer: Any,
    config: PreTrainedConfig,
    files: WeightFiles,
    planned: list[PlannedWeight],
    progress: Callable[[int, int], None],
) -> None:
    factors = rotation_factors(config)
    total = 0
    if factors is not None:
        writer.add_tensor_info(ROTATION_FACTORS, list(factors.shape), factors.numpy().dtype, 4 * factors.numel())
    for weight in planned:
        shape = files.specs[weight.source].shape
        size = torch.Size(shape).numel() * weight.dtype.itemsize
        total += size
        writer.add_tensor_info(weight.target.name, shape, torch.empty(0, dtype=weight.dtype).numpy().dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    _reserve(writer.fout[0], total)
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    done = 0
    for weight in planned:
        tensor = files.read(weight.source)
        if weight.target.heads:
            tensor = pair_neighbours(tensor, weight.target.heads)
        array = tensor.to(weight.dtype).numpy()
        del tensor
        writer.write_tensor_data(array)
        done += array.nbytes
        progress(done, total)


def _reserve(stream: Any, size: int) -> None:
    """Reserve the space of the weights, so that a full disk shows now: numpy would not say why a write failed."""
    if hasattr(os, "posix_fallocate"):  # macOS does not have this call
        stream.flush()
        os.posix_fallocate(stream.fileno(), stream.tell(), size)
