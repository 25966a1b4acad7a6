"""The forward of PEFT's LoRA layers, with fewer operators and less memory.

A small model, or a large one on a fast GPU, waits for the host to launch its operators. For each adapted layer PEFT
0.21 casts the input to float32, which autocast undoes at once, copies what a 4-bit layer returns, and scales and adds
in operators of their own; each of these has its backward. Here a whole layer is one function with its own gradient.
"""

from types import MethodType
from typing import Any

import accel_llm.system.chatter

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as LoraLinear8bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable

from accel_llm.adapters.initial import OffsetFactor

# Exactly these classes of PEFT: others compute something else.
PLAIN_LAYERS = (LoraLinear, LoraLinear4bit, LoraLinear8bit)


def shorten_lora_forward(model: nn.Module) -> None:
    """Let the LoRA layers of `model` compute base(x) + s B A dropout(x) with few operators.

    With and without gradients the sum is the same to the last bit, and 16 bits round it once: the reference of a
    preference is computed without gradients, and compared with what training computes. PEFT's own forward still runs
    where a layer has several adapters or none, a merged one, DoRA or a bias in B, or where its dtypes do not fit.
    """
    for layer in model.modules():
        if type(layer) in PLAIN_LAYERS:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    device, kind = x.device.type, type(layer)
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    adapter = None if args or kwargs else _plain_adapter(layer)
    if adapter is None or (x.dtype != dtype and kind is not LoraLinear):
        return kind.forward(layer, x, *args, **kwargs)
    # Not by attributes: those of a module are slow, and would take as long as launching three operators.
    parts = layer._modules
    factor_a, factor_b, dropout = (parts[name]._modules[adapter] for name in ("lora_A", "lora_B", "lora_dropout"))
    weight_a, weight_b = factor_a._parameters["weight"], factor_b._parameters["weight"]
    if weight_a.dtype != dtype and not autocast:  # a float32 LoRA on a 16-bit base computes in float32
        return kind.forward(layer, x)

    x = x.to(dtype)  # once; autocast would do it for the base and for A
    base, scaling = parts["base_layer"], layer.scaling[adapter]
    drops = dropout.training and isinstance(dropout, nn.Dropout)
    # ZeRO-3 fetches weights for a module that is called, and a compiler joins operators itself.
    if drops or hasattr(weight_a, "ds_id") or torch.compiler.is_compiling() or not _is_frozen_product(base, dtype):
        # Not the module: on a CPU torch 2.13 rounds its factor 1 / (1 - p) to the dtype of x.
        inputs = torch.native_dropout(x, dropout.p, True)[0] if drops else x
        return torch.add(base(x), factor_b(factor_a(inputs)), alpha=scaling)
    if isinstance(factor_a, OffsetFactor):  # a first value is in `dtype` already
        weight_a, weight_b = factor_a.joined(weight_a.to(dtype)), factor_b.joined(weight_b.to(dtype))
    result: Any = AdaptedProduct.apply(base, x, weight_a, weight_b, scaling)
    return result


def _plain_adapter(layer: Any) -> str | None:
    """Return the name of the adapter of `layer` if PEFT would do nothing but add its product to the base's."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(names) != 1 or names[0] not in layer.scaling:
        return None
    return None if names[0] in layer.lora_variant or layer.lora_bias[names[0]] else names[0]


def _is_frozen_product(base: Any, dtype: torch.dtype) -> bool:
    """Return whether the gradient of `base` by its input is a product with its weight, and its only gradient."""
    if type(base) not in (nn.Linear, Linear4bit):
        return False
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    fits = weight.dtype == dtype or type(base) is Linear4bit
    return fits and not weight.requires_grad and (bias is None or not bias.requires_grad)


class AdaptedProduct(torch.autograd.Function):
    """Computes base(x) + s x A' B' for x [..., in], A [r, in] and B [out, r], and its gradient by x, A and B.

    `base` is a frozen linear layer, in 4 bits or not. Kept for the backward pass are x, x A', and A and B in the dtype
    of x.
    """

    @staticmethod
    def forward(ctx: Any, base: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        # Not a view of what the base returns: such a result of a function may not be changed in place.
        result, a, b = base(x).detach(), a.to(x.dtype), b.to(x.dtype)
        low = F.linear(x, a)
        rows = result.view(-1, result.shape[-1])
        torch.addmm(rows, _rows(low), b.t(), alpha=scaling, out=rows)
        ctx.save_for_backward(x, low, a, b)
        ctx.weight, ctx.scaling = base.weight, scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        rows = _rows(gradient)
        by_low = _scaled_product(rows, b, ctx.scaling)
        by_x = None
        if ctx.needs_input_grad[1]:
            by_x = rows.mm(_unpacked(ctx.weight, rows.dtype))
            by_x = torch.addmm(by_x, by_low, a, out=by_x).view(x.shape)
        by_a = by_low.t().mm(_rows(x)) if ctx.needs_input_grad[2] else None
        by_b = _scaled_product(rows.t(), _rows(low), ctx.scaling) if ctx.needs_input_grad[3] else None
        return None, by_x, by_a, by_b, None


def _unpacked(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix [out, in] of a layer's weight."""
    state = getattr(weight, "quant_state", None)
    return weight if state is None else dequantize_4bit(weight.data.view(-1, 1), state).to(dtype)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor [..., n] as a matrix."""
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return `scaling` times the product of two matrices, as one operator."""
    product = left.new_empty(len(left), right.shape[1])
    return torch.addmm(product, left, right, beta=0, alpha=scaling, out=product)  # with beta 0 nothing is read there
