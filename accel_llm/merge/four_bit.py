"""Weights of a 4-bit base in 16 bits: as bitsandbytes computes with them, or as they are stored in a 4-bit model's files."""

from functools import partial
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from accel_llm.errors import ConfigError
from accel_llm.system.weights import Checkpoint, Spec

STATE = ".quant_state.bitsandbytes__"


def names_of(model: PreTrainedModel) -> dict[str, bool]:
    """Names of the weights that are in 4 bits in a QLoRA run, and whether they are stored transposed (GPT-2's)."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or []))
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def rounded(weight: torch.Tensor, turned: bool) -> torch.Tensor:
    """What a 4-bit layer of a QLoRA run computes with in place of `weight`: NF4, its scales quantised as well.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; blocks of 64.
    """
    packed, state = quantize_4bit(
        weight.T.contiguous() if turned else weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    whole = dequantize_4bit(packed, state)
    return whole.T.contiguous() if turned else whole


def unpacked(checkpoint: Checkpoint, config: PreTrainedConfig, merge_base: str) -> Checkpoint:
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
    packed = {name.split(STATE)[0]: name for name in checkpoint.specs if STATE in name}
    extra = {name for name in checkpoint.specs if any(name.startswith(f"{weight}.") for weight in _stems(name, packed))}
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in extra}
    readers = {name: checkpoint.readers[name] for name in specs}
    for weight, state in packed.items():
        stored = unpack_tensor_to_dict(checkpoint.read(state))
        specs[weight] = Spec(getattr(torch, stored["dtype"]), tuple(stored["shape"]))
        parts = sorted(name for name in extra if name.startswith(f"{weight}."))
        readers[weight] = partial(_unpack, checkpoint, weight, parts)
    places = {name: place for name, place in checkpoint.places.items() if name in specs and name not in packed}
    return Checkpoint(specs, readers, places)


def _stems(name: str, packed: dict[str, str]) -> list[str]:
    """The packed weight that `name` belongs to: a prefix of it up to a dot."""
    pieces = name.split(".")
    return [stem for k in range(1, len(pieces)) if (stem := ".".join(pieces[:k])) in packed]


def _unpack(checkpoint: Checkpoint, weight: str, parts: list[str]) -> torch.Tensor:
    state = QuantState.from_dict({name: checkpoint.read(name) for name in parts}, torch.device("cpu"))
    return dequantize_4bit(checkpoint.read(weight), state)
