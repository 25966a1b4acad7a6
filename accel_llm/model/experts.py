"""Experts of a mixture in 4 bits.

transformers 5 keeps the experts of a layer as one parameter [experts, out, in]; most weights of a mixture are there.
bitsandbytes replaces linear layers only, so QLoRA would leave these weights in 16 bits. Here they stay packed, and are
unpacked for one layer at a time, while it computes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from peft.tuners.lora.layer import ParamWrapper
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


def prepare_4bit_experts(model: nn.Module, config: BitsAndBytesConfig) -> None:
    """Replace the experts of a loaded model by 4-bit weights; `materialize_weights` quantizes them later.

    Call `unpack_experts_in_forward` once the adapter is attached.
    """
    for _, module, name in list(expert_weights(model)):
        experts: Any = module
        # bitsandbytes writes the scales here when it quantizes; FSDP2 replaces the parameter and would lose them.
        scales = SimpleNamespace(quant_state=None)
        experts.scales_by_name = getattr(experts, "scales_by_name", {}) | {name: scales}
        four_bit: Any = Params4bit
        experts._parameters[name] = four_bit(
            experts._parameters[name].data,
            requires_grad=False,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
            module=scales,
        )


def has_4bit_experts(model: nn.Module) -> bool:
    """Return whether `prepare_4bit_experts` found experts in the model."""
    return any(hasattr(module, "scales_by_name") for module in model.modules())


def unpack_experts_in_forward(model: nn.Module, recompute: bool) -> None:
    """Let each layer's experts compute with unpacked weights; PEFT's wrappers around them see these as well.

    With `recompute` the experts of a layer are computed a second time in the backward pass. Without it autograd would
    keep the unpacked weights of every layer until then, unless the whole layer is recomputed anyway.

    bitsandbytes' own way, a parametrization, does not work with PEFT 0.21: `ParamWrapper` adds one for the adapter in
    each forward, and does not remove it if it finds another one there.
    """
    wrapped: set[nn.Module] = set()
    for module in list(model.modules()):
        experts = module.get_base_layer() if isinstance(module, ParamWrapper) else module
        # The outermost wrapper comes first.
        if hasattr(experts, "scales_by_name") and experts not in wrapped:
            wrapped.add(experts)
            module.forward = partial(_forward, experts, module.forward, recompute)


def _forward(experts: Any, forward: Callable, recompute: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
    compute = partial(_compute_unpacked, experts, forward)
    if recompute and torch.is_grad_enabled():
        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return compute(*args, **kwargs)


def _compute_unpacked(experts: Any, forward: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    packed = {name: experts._parameters[name] for name in experts.scales_by_name}
    for name, parameter in packed.items():
        weight = dequantize_4bit(parameter.data, experts.scales_by_name[name].quant_state)
        experts._parameters[name] = nn.Parameter(weight, requires_grad=False)
    try:
        return forward(*args, **kwargs)
    finally:
        experts._parameters.update(packed)
