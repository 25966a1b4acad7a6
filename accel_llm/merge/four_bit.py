"""Reads the weights of a 4-bit bitsandbytes model as 16-bit weights, the values that it computes with."""

from functools import partial
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.utils import unpack_tensor_to_dict
from transformers import PreTrainedConfig

from accel_llm.errors import ConfigError
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightFiles

# Middle part of the name under which bitsandbytes saves how a weight was quantized.
QUANT_STATE = ".quant_state.bitsandbytes__"


def unpack_4_bits(checkpoint: WeightFiles, config: PreTrainedConfig, merge_base: str) -> WeightFiles:
    """Let a 4-bit checkpoint return its weights in the dtype that they were quantized from.

    The entry about quantization is removed from `config`. A checkpoint without quantized weights is returned as it is.

    Raises:
        ConfigError: the weights are quantized in another way, or merge_base asks for the original ones.
    """
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return checkpoint
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method", "unknown")
    # Other formats, such as GPTQ, cannot be unpacked here.
    if method != "bitsandbytes" or not settings.get("load_in_4bit"):
        how = "8-bit bitsandbytes" if method == "bitsandbytes" else method
        raise ConfigError(f"base: its weights are quantized ({how}); name the base model in 16 or 32 bits with --base.")
    if merge_base == "original":
        raise ConfigError(
            "merge_base: original needs the base's original weights, but the base holds only 4-bit ones; set "
            "merge_base: dequantized, or name the base model in 16 bits with --base."
        )
    del config.quantization_config  # type: ignore[attr-defined] # getattr above found it
    # The tensors that belong to each packed weight: its quantization state and scales.
    packed = {name.split(QUANT_STATE)[0]: name for name in checkpoint.specs if QUANT_STATE in name}
    extra = {
        name
        for name in checkpoint.specs
        if any(name.startswith(f"{weight}.") for weight in _packed_prefixes(name, packed))
    }

    # A packed weight is unpacked when it is read; all other tensors are read as before.
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in extra}
    readers = {name: checkpoint.readers[name] for name in specs}
    for weight, state in packed.items():
        original = unpack_tensor_to_dict(checkpoint.read(state))
        specs[weight] = TensorSpec(getattr(torch, original["dtype"]), tuple(original["shape"]))
        parts = sorted(name for name in extra if name.startswith(f"{weight}."))
        readers[weight] = partial(_unpack, checkpoint, weight, parts)
    # Unpacked weights have no bytes in the files that could be copied.
    places = {name: place for name, place in checkpoint.places.items() if name in specs and name not in packed}
    return WeightFiles(specs, readers, places)


def _packed_prefixes(name: str, packed: dict[str, str]) -> list[str]:
    """Return the prefixes of `name`, up to a dot, that are names of packed weights."""
    parts = name.split(".")
    return [prefix for k in range(1, len(parts)) if (prefix := ".".join(parts[:k])) in packed]


def _unpack(checkpoint: WeightFiles, weight: str, parts: list[str]) -> torch.Tensor:
    state = QuantState.from_dict({name: checkpoint.read(name) for name in parts}, torch.device("cpu"))
    return dequantize_4bit(checkpoint.read(weight), state)
