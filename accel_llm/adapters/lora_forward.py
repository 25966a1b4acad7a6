"""The forward of PEFT's LoRA layers in training, with fewer operators and less memory, and no other result.

A small model, or a large one on a fast GPU, waits for the host to launch its operators. For each adapted layer PEFT
0.21 casts the input to float32, which autocast undoes at once, copies what a 4-bit layer returns, and scales and adds
in operators of their own; each of them has its backward. Here the sum is one function with its own gradient.
"""

from types import MethodType
from typing import Any

import accel_llm.system.chatter

import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from accel_llm.adapters.initial import OffsetFactor

# Exactly these classes of PEFT: others compute something else.
PLAIN_LAYERS = (Linear, Linear4bit, Linear8bitLt)


def shorten_lora_forward(model: nn.Module) -> None:
    """Let the LoRA layers of `model` compute base(x) + s B A dropout(x) with few operators, where nothing else is asked.

    PEFT's own forward still runs where a layer has several adapters, none, a merged one, DoRA or a bias in B, and where
    its dtypes do not fit.
    """
    for layer in model.modules():
        if type(layer) in PLAIN_LAYERS:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    adapter = _plain_adapter(layer)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if args or kwargs or adapter is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    if type(layer) is Linear:
        x = x.to(dtype)  # once; autocast would do it for the base and for A
    factor_a, factor_b, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    # Without autocast a float32 LoRA on a 16-bit base computes in float32.
    if x.dtype != dtype or (factor_a.weight.dtype != dtype and not torch.is_autocast_enabled(device)):
        return type(layer).forward(layer, x)

    result = layer.base_layer(x)
    dropout = layer.lora_dropout[adapter]
    # Not the module: on a CPU torch 2.13 rounds its factor 1 / (1 - p) to the dtype of x.
    x = torch.native_dropout(x, dropout.p, True)[0] if dropout.training and isinstance(dropout, nn.Dropout) else x
    # ZeRO-3 fetches weights for a module that is called, and a compiler joins operators itself.
    if hasattr(factor_a.weight, "ds_id") or torch.compiler.is_compiling():
        return torch.add(result, factor_b(factor_a(x)), alpha=scaling)
    return LowRankSum.apply(result, x, _weight(factor_a, dtype), _weight(factor_b, dtype), scaling)  # type: ignore


def _plain_adapter(layer: Any) -> str | None:
    """Return the name of the adapter of `layer` if PEFT would do nothing but add its product to the base's."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    return None if names[0] in layer.lora_variant or layer.lora_bias[names[0]] else names[0]


def _weight(factor: Any, dtype: torch.dtype) -> torch.Tensor:
    # A first value is in `dtype` already, so the two are joined after the cast.
    return factor.joined(factor.weight.to(dtype)) if isinstance(factor, OffsetFactor) else factor.weight


class LowRankSum(torch.autograd.Function):
    """Computes result + s x A' B' for result [..., out], x [..., in], A [r, in] and B [out, r], in place of `result`.

    A and B are cast to the dtype of x. Kept for the backward pass are x, A and B in this dtype, and s x A' [n, r].
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = _scaled_product(_rows(x), a.T, scaling)
        # The base keeps its result nowhere. It is changed through another tensor on the same memory, so that autograd
        # need not follow a change of what may be a view; if something did keep it, the backward pass refuses.
        total = result.detach()
        rows = total.view(-1, total.shape[-1])
        torch.addmm(rows, low, b.T, out=rows)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        rows = _rows(gradient)
        by_low = _scaled_product(rows, b, ctx.scaling)
        by_x = (by_low @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        by_a = by_low.T @ _rows(x) if ctx.needs_input_grad[2] else None
        by_b = rows.T @ low if ctx.needs_input_grad[3] else None
        return gradient, by_x, by_a, by_b, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor [..., n] as a matrix."""
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return `scaling` times the product of two matrices, as one operator."""
    product = left.new_empty(len(left), right.shape[1])
    return torch.addmm(product, left, right, beta=0, alpha=scaling, out=product)  # with beta 0 nothing is read there
