"""Experts of a mixture in 4 bits.

transformers 5 keeps the experts of a layer as one parameter [experts, out, in]; most weights of a mixture are there.
bitsandbytes replaces linear layers only, so QLoRA would leave these weights in 16 bits. Here they stay packed, and are
unpacked for one layer at a time, while it computes.
"""

from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig

LARGEST = 2**31 - 1  # bitsandbytes 0.50 counts the numbers of a tensor with 32 bits


def expert_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the name of each parameter that holds the matrices of several experts, its module, and its name there."""
    for prefix, module in model.named_modules():
        if "Experts" in type(module).__name__:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.numel() <= LARGEST:
                    yield f"{prefix}.{name}", module, name


def prepare_4bit_experts(model: nn.Module, config: BitsAndBytesConfig, recompute: bool) -> None:
    """Replace the experts of a loaded model by 4-bit weights; `materialize_weights` quantizes them later.

    With `recompute` the experts of a layer are computed a second time in the backward pass. Without it autograd would
    keep the unpacked weights of every layer until then, unless the whole layer is recomputed anyway.
    """
    for _, module, name in list(expert_weights(model)):
        experts: Any = module
        if "quantized_experts" not in vars(experts):
            experts.quantized_experts = {}
            experts.recomputes_experts = recompute
            experts.forward = MethodType(_forward, experts)
        # bitsandbytes writes the scales here when it quantizes; FSDP2 replaces the parameter and would lose them.
        experts.quantized_experts[name] = SimpleNamespace()
        experts._parameters[name] = Params4bit(
            experts._parameters[name].data,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
            module=experts.quantized_experts[name],
        )


def _forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    if module.recomputes_experts and torch.is_grad_enabled():
        return checkpoint(_compute, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return _compute(module, *args, **kwargs)


def _compute(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the experts' own forward with unpacked weights, whatever this forward does with them."""
    with torch.no_grad():
        weights = {
            name: dequantize_4bit(module._parameters[name].data, holder.quant_state)
            for name, holder in module.quantized_experts.items()
        }
    # An attribute of the object comes before a parameter of the same name.
    vars(module).update(weights)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        for name in weights:
            del vars(module)[name]
