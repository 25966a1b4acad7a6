"""Loads a model to be asked: as its files are or in 4 bits, with an adapter on it or without.

In 4 bits the weights stay in their files until the device takes them, one after the other, as in training. So the
device never holds more than the 4-bit model and one weight in 16 bits: the card that trained an adapter can ask it.
"""

from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer

from accel_llm.adapters.compat import SavedAdapter, read_adapter
from accel_llm.adapters.initial import subtracted_init
from accel_llm.adapters.saved import trained_in_4_bits
from accel_llm.backend.strategy import PRECISION_DTYPES, compute_dtype, training_device
from accel_llm.config.options import MethodOptions, ModelOptions
from accel_llm.config.tool_options import ChatOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import load_adapter
from accel_llm.merge.skeleton import read_model_config
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.experts import has_4bit_experts, unpack_experts_in_forward
from accel_llm.model.loading import load_complete_model
from accel_llm.model.placement import materialize_weights
from accel_llm.model.quantization import build_quantization_config, prepare_4bit_layers, set_compute_dtype
from accel_llm.model.stored_quantization import (
    UNPACKED,
    describe_quantization,
    is_stored_in_4_bits,
    stored_quantization,
)
from accel_llm.model.vocabulary import adapter_vocabulary_size, extend_vocabulary


def load_with_adapter(adapter: Path, base: str, options: ChatOptions) -> Any:
    """Load the base model with the adapter on it, with embedding rows for the tokens that the adapter added.

    Raises:
        ConfigError: one of them cannot be loaded, or the adapter does not fit the base.
    """
    saved = read_adapter(adapter, options.allow_pickle)
    task = saved.config.task_type
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"adapter: {adapter} was trained for {task}; only adapters of causal LMs can be loaded.")
    return load_to_ask(base, "base", options, saved)


def load_to_ask(name: str, field: str, options: ChatOptions, adapter: SavedAdapter | None = None) -> Any:
    """Load the model `name` onto the device, with `adapter` on it if there is one; it is in eval mode.

    `field` is the option to name in an error.

    Raises:
        ConfigError: it cannot be loaded, not in 4 bits as asked, or the adapter does not fit it.
    """
    device = training_device()
    if _chooses_4_bits(name, field, options, adapter):
        compute = compute_dtype(ModelOptions(precision=options.precision))
        return _load_in_4_bits(name, field, options, adapter, compute, device).eval()
    dtype = PRECISION_DTYPES.get(options.precision) or (torch.float32 if device.type == "cpu" else "auto")
    arguments = {"dtype": dtype, "trust_remote_code": options.trust_remote_code}
    model: Any = load_complete_model(name, field, options.allow_pickle, **arguments)
    if adapter:
        _add_rows(model, adapter)
        model = load_adapter(model, adapter)
    return model.to(device).eval()


def _chooses_4_bits(name: str, field: str, options: ChatOptions, adapter: SavedAdapter | None) -> bool:
    """Return whether the model is asked in 4 bits: as the options say, or else as the adapter was trained.

    Raises:
        ConfigError: that is not possible with the weights in its files.
    """
    asked, config = options.load_in_4bit, read_model_config(name, options.trust_remote_code, field)
    if is_stored_in_4_bits(config):
        if asked is False:
            raise ConfigError(
                f"load_in_4bit: false, but the files of {name} hold its weights in 4 bits; leave it out, or name the "
                "same model in 16 bits."
            )
        return True
    if asked is None:
        asked = adapter is not None and trained_in_4_bits(adapter.folder)
    stored = stored_quantization(config)
    if asked and stored and stored.get("quant_method") not in UNPACKED:
        raise ConfigError(
            f"load_in_4bit: the weights of {name} are quantized already ({describe_quantization(stored)}); set it to "
            "false, or name the same model in 16 bits."
        )
    if asked and adapter and subtracted_init(getattr(adapter.config, "init_lora_weights", True)) == "pissa":
        raise ConfigError(
            f"load_in_4bit: {adapter.folder} has init_lora_weights pissa, which PEFT computes from weights in 16 bits "
            "only; set load_in_4bit to false."
        )
    return asked


def _load_in_4_bits(
    name: str,
    field: str,
    options: ChatOptions,
    adapter: SavedAdapter | None,
    compute: torch.dtype,
    device: torch.device,
) -> Any:
    # With the dtype of its files the weights stay memory-mapped.
    arguments = {"dtype": "auto", "trust_remote_code": options.trust_remote_code}
    model: Any = load_complete_model(name, field, options.allow_pickle, unpack=True, **arguments)
    if adapter:
        _add_rows(model, adapter)
    if is_stored_in_4_bits(model.config):
        set_compute_dtype(model, compute)
    else:
        prepare_4bit_layers(model, build_quantization_config(MethodOptions(method="qlora"), compute, sharded=False))
    if not has_4bit_experts(model) and not any(isinstance(module, Linear4bit) for module in model.modules()):
        raise ConfigError(
            f"load_in_4bit: {name} has no layer that can be held in 4 bits; set it to false, or leave it out."
        )

    # PEFT computes DoRA's first values from the weights of a layer, but the shape of an adapter for experts from theirs,
    # which 4 bits no longer show. So the experts are quantized after it.
    read = [module for module in model.modules() if not hasattr(module, "scales_by_name")]
    materialize_weights(model, read, compute, device, masters=False)
    if adapter:
        model = load_adapter(model, adapter)
        _check_4bit_adapter(model, adapter)
    unread = set(model.modules()).difference(read)
    materialize_weights(model, list(unread), compute, device, masters=False)
    unpack_experts_in_forward(model, recompute=False)
    return model


def _add_rows(model: Any, adapter: SavedAdapter) -> None:
    """Add rows for the tokens that the adapter added, before its weights are loaded."""
    rows = model.config.get_text_config().vocab_size
    extend_vocabulary(model, range(rows, adapter_vocabulary_size(model, adapter.settings, adapter.weights)))


def _check_4bit_adapter(model: Any, adapter: SavedAdapter) -> None:
    """Refuse an adapter whose method would read packed weights as numbers: PEFT has a 4-bit layer for some methods only.

    Raises:
        ConfigError: the adapter is of another method.
    """
    for layer in model.modules():
        is_plain = isinstance(layer, BaseTunerLayer) and not type(layer).__module__.endswith(".bnb")
        if is_plain and isinstance(layer.get_base_layer(), Linear4bit):
            raise ConfigError(
                f"load_in_4bit: PEFT has no 4-bit layers for the {adapter.config.peft_type} adapter {adapter.folder}; "
                "set it to false."
            )


def describe_placement(model: Any) -> str:
    """Return a sentence about a loaded model: its device, the format of its weights, and what it computes in."""
    inner = unwrap_causal_lm(model)
    settings, dtype = stored_quantization(inner.config), str(inner.dtype).removeprefix("torch.")
    if settings is None:
        return f"On {inner.device.type}, weights in {dtype}."
    in_4_bits = is_stored_in_4_bits(inner.config)
    name = str(settings["bnb_4bit_quant_type"]).upper() if in_4_bits else describe_quantization(settings)
    return f"On {inner.device.type}, {'4-bit' if in_4_bits else 'quantized'} weights ({name}), computing in {dtype}."
