"""Loads a model to be asked: as its files are or in 4 bits, with adapters on it or without.

In 4 bits the weights stay in their files until the device takes them, one after the other, as in training. So the
device never holds more than the 4-bit model and one weight in 16 bits: the card that trained an adapter can ask it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import accel_llm.system.chatter

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedConfig

from accel_llm.adapters.compat import SavedAdapter, read_adapter
from accel_llm.adapters.initial import subtracted_init
from accel_llm.adapters.saved import trained_in_4_bits
from accel_llm.backend.strategy import PRECISION_DTYPES, compute_dtype, training_device
from accel_llm.config.tool_options import AskOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import check_usable, load_adapter
from accel_llm.merge.classifier_head import check_head_stored
from accel_llm.merge.shared_weights import copy_modules, copy_weights, share_experts
from accel_llm.merge.skeleton import read_model_config
from accel_llm.model.answers import print_remark
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.classifier import attach_scores
from accel_llm.model.experts import has_4bit_experts, unpack_experts_in_forward
from accel_llm.model.loading import load_complete_model, short_reason
from accel_llm.model.placement import materialize_weights
from accel_llm.model.quantization import nf4_config, prepare_4bit_layers, set_compute_dtype
from accel_llm.model.stored_quantization import (
    UNPACKED,
    describe_quantization,
    is_stored_in_4_bits,
    stored_quantization,
)
from accel_llm.model.vocabulary import adapter_vocabulary_size, extend_vocabulary
from accel_llm.system.memory import returning_freed_memory

IN_16_BITS = "name the same model in 16 bits"


def load_with_adapter(adapter: Path, base: str, options: AskOptions) -> Any:
    """Load the base model with the adapter on it, with embedding rows for the tokens that the adapter added.

    Raises:
        ConfigError: one of them cannot be loaded, or the adapter does not fit the base.
    """
    return load_to_ask(base, "base", options, [adapter])[1]


def load_to_ask(
    name: str, field: str, options: AskOptions, folders: Sequence[Path] = (), scores: PreTrainedConfig | None = None
) -> list[Any]:
    """Load the model `name` onto the device; return it, and for each adapter's folder the model with that adapter.

    All compute with the same weights in memory, but have modules of their own, so each is as if it were loaded alone.
    They are in eval mode. `field` is the option to name in an error. With `scores`, the config of a classifier, they are
    classifiers with `attach_scores`.

    Raises:
        ConfigError: it cannot be loaded, not in 4 bits as asked, an adapter does not fit it, or weights of a classifier
            are in no file.
    """
    adapters = [read_adapter(folder, options.allow_pickle) for folder in folders]
    for adapter in adapters:
        check_usable(adapter, scores=scores is not None)
    device = training_device()
    if _chooses_4_bits(name, field, options, adapters):
        models = _load_in_4_bits(name, field, options, adapters, scores, compute_dtype(options), device)
    else:
        dtype = PRECISION_DTYPES.get(options.precision) or (torch.float32 if device.type == "cpu" else "auto")
        arguments = {"dtype": dtype, "trust_remote_code": options.trust_remote_code}
        base: Any = load_complete_model(name, field, options.allow_pickle, scores=scores, **arguments)
        _prepare_scores(base, scores, adapters, name, field)
        base.to(device)
        models = [base, *(_with_adapter(copy_modules(base), adapter).to(device) for adapter in adapters)]
    for model, adapter in zip(models[1:], adapters, strict=True):
        if adapter.config.peft_type != "LORA":
            _check_one_token(model, adapter)
    return [model.eval() for model in models]


def _prepare_scores(
    base: Any, scores: PreTrainedConfig | None, adapters: list[SavedAdapter], name: str, field: str
) -> None:
    """Let a classifier give scores of whole texts; with adapters, the copies of it that take them do so too.

    Raises:
        ConfigError: weights of its head are in no file.
    """
    if scores is not None:
        check_head_stored(base.drawn, adapters, name, field)
        attach_scores(base)


def _chooses_4_bits(name: str, field: str, options: AskOptions, adapters: list[SavedAdapter]) -> bool:
    """Return whether the model is asked in 4 bits: as the options say, or else as the adapters were trained.

    Raises:
        ConfigError: that is not possible with the weights in its files, or the adapters were trained in different ways.
    """
    asked, config = options.load_in_4bit, read_model_config(name, options.trust_remote_code, field)
    stored, in_files = stored_quantization(config), is_stored_in_4_bits(config)
    trained = {trained_in_4_bits(adapter.folder): adapter.folder for adapter in adapters}
    subtracted = [adapter for adapter in adapters if subtracted_init(_first_values(adapter))]
    problem = ""
    if asked is None and not in_files and len(trained) > 1:
        problem = (
            f"{trained[True]} was trained on a base in 4 bits, and {trained[False]} was not; set it to true or to false, "
            "for both"
        )
    if asked is None:
        asked = in_files or any(trained)
    elif in_files and not asked:
        problem = f"false, but the files of {name} hold its weights in 4 bits; leave it out, or {IN_16_BITS}"
    elif asked and stored and not in_files and stored.get("quant_method") not in UNPACKED:
        how = describe_quantization(stored)
        problem = f"the weights of {name} are quantized already ({how}); set it to false, or {IN_16_BITS}"
    elif asked and subtracted:
        problem = (
            f"PEFT computes init_lora_weights {_first_values(subtracted[0])} of {subtracted[0].folder} only from a base in "
            "16 bits; set it to false"
        )
    if problem:
        raise ConfigError(f"load_in_4bit: {problem}.")
    return asked


def _first_values(adapter: SavedAdapter) -> Any:
    return getattr(adapter.config, "init_lora_weights", True)


def _load_in_4_bits(
    name: str,
    field: str,
    options: AskOptions,
    adapters: list[SavedAdapter],
    scores: PreTrainedConfig | None,
    compute: torch.dtype,
    device: torch.device,
) -> list[Any]:
    # With the dtype of its files the weights stay memory-mapped.
    arguments = {"dtype": "auto", "trust_remote_code": options.trust_remote_code}
    base: Any = load_complete_model(name, field, options.allow_pickle, unpack=True, scores=scores, **arguments)
    _prepare_scores(base, scores, adapters, name, field)
    if is_stored_in_4_bits(base.config):
        set_compute_dtype(base, compute)
    else:
        prepare_4bit_layers(base, nf4_config(compute))
    if not has_4bit_experts(base) and not any(isinstance(module, Linear4bit) for module in base.modules()):
        raise ConfigError(f"load_in_4bit: {name} has no layer that can be held in 4 bits; set it to false.")

    # PEFT reads the weights of a layer for DoRA, but for experts only their shape, which 4 bits no longer show: experts
    # are quantized after the adapters are there.
    experts = [module for module in base.modules() if hasattr(module, "scales_by_name")]
    models = [base]
    with returning_freed_memory():
        materialize_weights(base, [m for m in base.modules() if m not in experts], compute, device, masters=False)
        for adapter in adapters:
            model = copy_modules(base)
            copied = set(model.modules())
            models.append(_with_adapter(model, adapter))
            own = [module for module in models[-1].modules() if module not in copied]
            materialize_weights(models[-1], own, compute, device, masters=False)
        materialize_weights(base, experts, compute, device, masters=False)
    share_experts(models)
    for model in models:
        unpack_experts_in_forward(model, recompute=False)
    return models


def _with_adapter(model: Any, adapter: SavedAdapter) -> Any:
    """Put the adapter on a copy of the model, with the rows of its trained tokens in embedding and head.

    Rows for the tokens that it added come first. PEFT 0.21 copies the whole matrix for trained rows in each forward,
    which takes a gigabyte of an 8B model.
    """
    rows = model.config.get_text_config().vocab_size
    new_rows = range(rows, adapter_vocabulary_size(model, adapter.settings, adapter.weights))
    if new_rows or any("trainable_tokens_" in name for name in adapter.weights):
        copy_weights([model.get_input_embeddings(), model.get_output_embeddings()])
    if subtracted_init(_first_values(adapter)) == "olora":
        copy_weights([model])  # PEFT 0.21 takes OLoRA's first values out of the weights in place
    extend_vocabulary(model, new_rows)
    wrapped = load_adapter(model, adapter)
    layers = [module for module in wrapped.modules() if isinstance(module, TrainableTokensLayer)]
    users = [parameter for module in wrapped.modules() for parameter in module.parameters(recurse=False)]
    for layer in layers:
        weight, rows = cast(torch.Tensor, layer.get_base_layer().weight), layer.trainable_tokens_delta
        same = [k for k in layers if k.get_base_layer().weight is weight and k.trainable_tokens_delta is rows]
        # A matrix that is also used with other rows, or with none, stays as it is.
        if len(same) == sum(parameter is weight for parameter in users):
            index = torch.tensor(layer.token_indices["default"], device=weight.device)
            weight.data[index] = rows["default"].data.to(weight)
            layer.merged_adapters.append("default")
    return wrapped


def _check_one_token(model: Any, adapter: SavedAdapter) -> None:
    """Compute one token: what does not fit the model, or reads packed weights as numbers, fails only here.

    Raises:
        ConfigError: it fails.
    """
    in_4_bits = is_stored_in_4_bits(unwrap_causal_lm(model).config)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"load_in_4bit: PEFT cannot compute the adapter {adapter.folder} on weights in 4 bits "
            f"({short_reason(error)}); set load_in_4bit to false, with a base in 16 bits."
            if in_4_bits
            else f"adapter: {adapter.folder} does not fit its base ({short_reason(error)})."
        ) from None


def describe_placement(model: Any) -> str:
    """Return a sentence about a loaded model: its device, the format of its weights, and what it computes in."""
    inner = unwrap_causal_lm(model)
    settings, dtype = stored_quantization(inner.config), str(inner.dtype).removeprefix("torch.")
    if settings is None:
        return f"On {inner.device.type}, weights in {dtype}."
    in_4_bits = is_stored_in_4_bits(inner.config)
    name = str(settings["bnb_4bit_quant_type"]).upper() if in_4_bits else describe_quantization(settings)
    return f"On {inner.device.type}, {'4-bit' if in_4_bits else 'quantized'} weights ({name}), computing in {dtype}."


def print_placement(model: Any) -> None:
    """Tell the person where a loaded model is, apart from its answers; see `describe_placement`."""
    print_remark(describe_placement(model))
