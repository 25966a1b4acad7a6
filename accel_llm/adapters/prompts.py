"""Prompt-learning methods: prompt, p_tuning, prefix and p_tuning_v2.

The modules, their names, the config and the file are PEFT's. The forward is ours, because PEFT 0.21 puts the virtual
tokens before whole rows: it drops the position ids, so packed rows are impossible, and it keeps a prefix in a cache,
which the recomputation of activations does not have. Here every document has places for them from the beginning, see
model/virtual_tokens.py.
"""

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import accel_llm.system.chatter

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, load_peft_weights
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import PreTrainedModel

from accel_llm.adapters.methods import fresh_adapter_config
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import PACKED_ATTENTION, PADDED_ATTENTION
from accel_llm.model.ensemble import answering_together
from accel_llm.model.loading import short_reason
from accel_llm.model.tokenizer import configured_tokenizer
from accel_llm.model.virtual_tokens import CACHE_OPTION, PrefixCache, replace_embeddings, with_places

# The names of the prompts of an ensemble after the first, which is PEFT's `default`: prompt_2, prompt_3, ...
MEMBER = "prompt_"


def attach_prompt(model: PreTrainedModel, options: TrainOptions, new_tokens: range = range(0)) -> PeftModel:
    """Freeze `model` and add trainable virtual tokens by the method of the options, in float32.

    Raises:
        ConfigError: the method does not fit the model, the text for the first values cannot be used, or there are
            `new_tokens`, which the file of a prompt has no place for.
    """
    if new_tokens:
        raise ConfigError(
            f"add_tokens: method {options.method} trains virtual tokens alone, so the rows of new tokens would stay "
            "untrained; use method lora, or a chat_template without new tokens."
        )
    config = fresh_adapter_config(options)
    is_prefix = config.peft_type == "PREFIX_TUNING"
    if is_prefix:
        _check_prefix(model, options)
    elif isinstance(embedding := model.get_input_embeddings(), torch.nn.Embedding):
        config.token_dim = embedding.embedding_dim  # PEFT takes hidden_size, which the embedding of some OPT has not
    init = getattr(config, "prompt_tuning_init", "RANDOM") if options.adapter_name_or_path is None else "RANDOM"
    plain = replace(config, prompt_tuning_init="RANDOM") if init != "RANDOM" else config
    wrapped = _add_encoder(model, options, plain)
    for number in range(2, options.prompt_ensemble + 1):
        wrapped.add_adapter(f"{MEMBER}{number}", replace(plain))
    if init != "RANDOM":
        _start_from_vocabulary(wrapped, options, config)
    for parameter in wrapped.prompt_encoder.parameters():
        parameter.data = parameter.data.float()
    fit_virtual_tokens(wrapped)
    return wrapped


def _check_prefix(model: PreTrainedModel, options: TrainOptions) -> None:
    """Check that keys and values of the layers can be replaced.

    Raises:
        ConfigError: they cannot.
    """
    implementation = model.config._attn_implementation
    if implementation not in (PACKED_ATTENTION, PADDED_ATTENTION):
        raise ConfigError(
            f"method: {options.method} puts keys and values into each layer, but {type(model).__name__} computes its "
            f"attention by {implementation!r} here, which has no place for them; set attn_implementation: auto and "
            "packing: true, or use method prompt."
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            f"method: {options.method} has places without tokens, which the balance loss of the experts would count; "
            "set output_router_logits to false in config.json, or use method prompt."
        )


def _add_encoder(model: PreTrainedModel, options: TrainOptions, config: Any) -> Any:
    """Let PEFT freeze the model and build the module that computes the virtual tokens.

    Raises:
        ConfigError: it cannot.
    """
    # PEFT refuses to recompute activations with a prefix, because they are without its cache; ours needs none.
    recomputed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in recomputed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"method: {options.method} does not fit the model ({reason}).") from None
    finally:
        for module in recomputed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _start_from_vocabulary(model: Any, options: TrainOptions, config: Any) -> None:
    """Let the prompt begin with embeddings of tokens: of a text, repeated or cut, or drawn from the whole vocabulary.

    Lester et al. 2021 (arXiv 2104.08691, section 3.2) found both better than random numbers. PEFT 0.21 would load a
    tokenizer by its name for the text; here it is the run's own.

    Raises:
        ConfigError: the text has no token.
    """
    for other in model.peft_config.values():
        other.prompt_tuning_init = config.prompt_tuning_init
    embedding = model.get_base_model().get_input_embeddings().weight
    if embedding.is_meta:  # a model without memory, see training/empty_step.py
        return
    tokenizer, count = configured_tokenizer(options), config.num_virtual_tokens
    encoders = model.prompt_encoder.values()
    if config.prompt_tuning_init == "TEXT":
        ids = tokenizer(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(
                f"method_options: prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no token; give a text."
            )
        all_ids = torch.tensor((ids * count)[:count]).expand(len(encoders), -1)
    else:
        rows = min(len(tokenizer), len(embedding))  # rows behind the tokenizer's tokens were never trained
        generator = torch.Generator().manual_seed(options.seed)
        all_ids = torch.randint(rows, (len(encoders), count), generator=generator)
    for encoder, ids in zip(encoders, all_ids, strict=True):
        encoder.embedding.weight.data = embedding.detach()[ids].float()


def load_prompt(
    model: Any,
    weights: dict[str, torch.Tensor],
    name: str,
    field: str = "adapter_name_or_path",
    member: str = "default",
) -> None:
    """Let a prompt begin with the `weights` of the file of an adapter; `field` is the option to name in an error.

    Raises:
        ConfigError: they have another name or shape.
    """
    weight = model.prompt_encoder[member].embedding.weight
    found = weights.get("prompt_embeddings")
    if found is None or found.shape != weight.shape:
        what = f"prompt_embeddings {list(found.shape)}" if found is not None else ", ".join(sorted(weights)[:3])
        raise ConfigError(
            f"{field}: {name} does not fit the model: it holds {what}, and needed are prompt_embeddings "
            f"{list(weight.shape)}."
        )
    with torch.no_grad():
        weight.copy_(found)


def ensemble_folders(folder: Path) -> list[Path]:
    """Return the folders of the further prompts of an ensemble, whose first one is in `folder`."""
    places = [place for place in folder.glob(f"{MEMBER}*") if place.name.removeprefix(MEMBER).isdigit()]
    return sorted(places, key=lambda place: int(place.name.removeprefix(MEMBER)))


def load_ensemble(model: Any, folder: Path, field: str = "adapter_name_or_path") -> None:
    """Load the further prompts of an ensemble from `folder`, if there are any; those that the model lacks are added.

    Raises:
        ConfigError: a file does not fit the model.
    """
    for place in ensemble_folders(folder):
        if place.name not in model.peft_config:
            model.add_adapter(place.name, PeftConfig.from_pretrained(str(place)))
        load_prompt(model, load_peft_weights(str(place), device="cpu"), str(place), field, place.name)


def fit_virtual_tokens(model: Any) -> None:
    """Let a PEFT model with a prompt compute batches whose documents have places for it, and generate.

    Without `virtual_positions` its forward stays PEFT's own. It is also for adapters that are loaded to be asked.
    """
    base = model.get_base_model()
    base.virtual_tokens = model.active_peft_config.num_virtual_tokens
    model.word_embeddings = base.get_input_embeddings()  # PEFT takes the first matrix with so many rows for it
    model.forward = MethodType(_forward, model)
    model.generate = MethodType(_generate, model)


def _forward(
    self: Any,
    input_ids: torch.Tensor | None = None,
    *args: Any,
    virtual_positions: torch.Tensor | None = None,
    prompt_numbers: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Compute a batch of `data/batches.py`, with the virtual tokens at `virtual_positions` of the flattened rows.

    `prompt_numbers` [documents] says which prompt of an ensemble each document begins with; without it, the first.
    """
    if virtual_positions is None:
        return _forward_of_peft(self, input_ids, *args, **kwargs)
    base = self.get_base_model()
    if _is_prefix(self):
        prefix = _encode_prefix(self, virtual_positions.device)
        return base(input_ids, *args, prefix=prefix, virtual_positions=virtual_positions, **kwargs)
    prompts = _encode_prompts(self, virtual_positions.device, prompt_numbers)
    embedded = replace_embeddings(base.get_input_embeddings()(input_ids), prompts, virtual_positions)
    return base(*args, inputs_embeds=embedded, **kwargs)


def _forward_of_peft(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute whole rows as PEFT does, which puts the virtual tokens before them.

    Raises:
        ConfigError: PEFT puts a prefix into a cache that this family does not have.
    """
    try:
        return type(model).forward(model, *args, **kwargs)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not _is_prefix(model):
            raise
        raise ConfigError(
            f"method: PEFT cannot put a prefix into {type(model.get_base_model()).__name__} ({short_reason(error)}); use "
            "method prompt."
        ) from None


def _is_prefix(model: Any) -> bool:
    return model.active_peft_config.peft_type == "PREFIX_TUNING"


def _encode(model: Any, name: str, device: torch.device) -> torch.Tensor:
    """Return what the encoder `name` computes for its virtual tokens, [n, width]."""
    config, encoder = model.peft_config[name], model.prompt_encoder[name]
    if config.inference_mode:  # loaded from a file, which holds the results of the encoder
        return encoder.embedding.weight
    return encoder(torch.arange(config.num_virtual_tokens, device=device)[None])[0]


def _encode_prompts(model: Any, device: torch.device, numbers: torch.Tensor | None) -> torch.Tensor:
    """Return the prompt of each document, [documents, n, width], or [1, n, width] for all without their `numbers`."""
    if numbers is None:
        return _encode(model, model.active_adapter, device)[None]
    # All of them have a part in each batch, or some processes would have no gradient of some.
    return torch.stack([_encode(model, name, device) for name in model.peft_config]).index_select(0, numbers)


def _encode_prefix(model: Any, device: torch.device) -> torch.Tensor:
    """Return the keys and values of all layers, [2 * layers, n, heads, head_dim]."""
    config = model.active_peft_config
    heads = config.num_attention_heads
    shape = config.num_virtual_tokens, 2 * config.num_layers, heads, config.token_dim // heads
    return _encode(model, model.active_adapter, device).view(shape).transpose(0, 1)


def _generate(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Generate behind rows [B, L] that are padded on the left; the result begins with these rows, like transformers'.

    PEFT 0.21 puts the virtual tokens before the padding, so a short row of a batch has other positions than in
    training; and with transformers 5.24 it leaves the virtual tokens out, because the cache has another name there.
    """
    base, members = self.get_base_model(), len(self.peft_config)
    base.generation_config = self.generation_config
    if members > 1:
        kwargs = answering_together(members, **kwargs)
    with torch.no_grad():
        rows, row_mask = (tensor.repeat_interleave(members, 0) for tensor in (input_ids, attention_mask))
        ids, mask, positions = with_places(rows, row_mask, self.active_peft_config.num_virtual_tokens)
        if _is_prefix(self):
            prefix = _encode_prefix(self, ids.device)
            inputs = {CACHE_OPTION: PrefixCache(prefix, positions, config=base.config.get_text_config(decoder=True))}
        else:
            numbers = torch.arange(members, device=ids.device).repeat(len(input_ids)) if members > 1 else None
            prompts = _encode_prompts(self, ids.device, numbers)
            inputs = {"inputs_embeds": replace_embeddings(base.get_input_embeddings()(ids), prompts, positions)}
        output = base.generate(input_ids=ids, attention_mask=mask, **inputs, **kwargs)
    return torch.cat([input_ids, output[::members, ids.shape[1] :]], 1)


def saved_prompt(model: Any, state: dict[str, torch.Tensor], name: str = "default") -> dict[str, torch.Tensor]:
    """Return what PEFT saves of the prompt `name`: the virtual tokens, computed from the trained weights `state`.

    PEFT computes them with the weights in the model, which may be sharded.
    """
    config, prefix = model.peft_config[name], f"prompt_encoder.{name}."
    plain = replace(config, prompt_tuning_init="RANDOM") if hasattr(config, "prompt_tuning_init") else config
    arguments = (plain, None) if config.peft_type == "PROMPT_TUNING" else (plain,)
    encoder_class: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    with torch.device("meta"):
        encoder = encoder_class(*arguments)
    weights = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    encoder.load_state_dict(weights, assign=True)
    device = next(iter(weights.values())).device
    with torch.no_grad():
        prompt = encoder.eval()(torch.arange(config.num_virtual_tokens, device=device)[None])[0]
    return {"prompt_embeddings": prompt.contiguous()}


def loads_prompt(loaded: Any, folder: Path) -> bool:
    """Return whether PEFT loads from `folder` the virtual tokens that are there, into a model without memory."""
    encoder = loaded.prompt_encoder["default"].to_empty(device="cpu")
    with torch.no_grad():
        encoder.embedding.weight.fill_(torch.nan)
    loaded.load_adapter(str(folder), "default", torch_device="cpu")
    stored = load_peft_weights(str(folder), device="cpu")["prompt_embeddings"]
    return torch.equal(encoder.embedding.weight, stored)
