"""Weights of a 4-bit base in 16 bits: as bitsandbytes computes with them, or as they are stored in a 4-bit model's files."""

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

QUANT_STATE = ".quant_state.bitsandbytes__"


def unpack_4_bits(checkpoint: WeightFiles, config: PreTrainedConfig, merge_base: str) -> WeightFiles:
    """A checkpoint that has the weights of a 4-bit model in the dtype that they were quantised from.

    `config` then says nothing of 4 bits any more. A checkpoint that is not quantised is returned as it is.

    Raises:
        ConfigError: it is quantised in another way, or weights of 16 bits were asked for.
    """
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return checkpoint
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method", "unknown")
    if method != "bitsandbytes" or not settings.get("load_in_4bit"):
        how = "8-bit bitsandbytes" if method == "bitsandbytes" else method
        raise ConfigError(f"base: its weights are quantised ({how}); name the base model in 16 or 32 bits with --base.")
    if merge_base == "original":
        raise ConfigError(
            "merge_base: original, but the base has its weights in 4 bits alone; set merge_base: dequantized, or name the "
            "base model in 16 bits with --base."
        )
    del config.quantization_config  # type: ignore[attr-defined] # looked at above
    packed = {name.split(QUANT_STATE)[0]: name for name in checkpoint.specs if QUANT_STATE in name}
    extra = {name for name in checkpoint.specs if any(name.startswith(f"{weight}.") for weight in _stems(name, packed))}
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in extra}
    readers = {name: checkpoint.readers[name] for name in specs}
    for weight, state in packed.items():
        stored = unpack_tensor_to_dict(checkpoint.read(state))
        specs[weight] = TensorSpec(getattr(torch, stored["dtype"]), tuple(stored["shape"]))
        parts = sorted(name for name in extra if name.startswith(f"{weight}."))
        readers[weight] = partial(_unpack, checkpoint, weight, parts)
    places = {name: place for name, place in checkpoint.places.items() if name in specs and name not in packed}
    return WeightFiles(specs, readers, places)


def _stems(name: str, packed: dict[str, str]) -> list[str]:
    """The packed weight that `name` belongs to: a prefix of it up to a dot."""
    pieces = name.split(".")
    return [stem for k in range(1, len(pieces)) if (stem := ".".join(pieces[:k])) in packed]


def _unpack(checkpoint: WeightFiles, weight: str, parts: list[str]) -> torch.Tensor:
    state = QuantState.from_dict({name: checkpoint.read(name) for name in parts}, torch.device("cpu"))
    return dequantize_4bit(checkpoint.read(weight), state)
