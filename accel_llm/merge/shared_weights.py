"""Several models around the same weights in memory: each has modules of its own, for an adapter of its own.

PEFT can hold several adapters in one model, but only of one kind, and they meet there: what one changes in the base
(biases, rows of tokens, the first values of PiSSA), the others see too.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import accel_llm.system.chatter

from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn


def copy_modules(model: Any) -> Any:
    """Return a copy of the model's modules and settings that computes with the weights of `model`.

    A weight of the copy can be replaced, but must not be changed in place: `model` has the same numbers.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            packed: Any = module.weight
            if packed.CB is not None:
                module.init_8bit_state()  # else the first layer that computes takes the scales away from the others
            shared[id(module.state)] = module.state
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            # A packed weight is shared with its scales: nothing replaces it.
            is_plain = type(tensor) is nn.Parameter
            shared[id(tensor)] = nn.Parameter(tensor.data, tensor.requires_grad) if is_plain else tensor
            scales = getattr(tensor, "quant_state", None)
            shared[id(scales)] = scales
        shared |= {id(scales): scales for scales in getattr(module, "scales_by_name", {}).values()}
    return deepcopy(model, shared)


def copy_weights(modules: Iterable[nn.Module | None]) -> None:
    """Give modules of a model from `copy_modules` numbers of their own, which can change; tied ones stay tied."""
    for parameter in {parameter for module in modules if module is not None for parameter in module.parameters()}:
        parameter.data = parameter.data.clone()


def share_experts(models: list[Any]) -> None:
    """Let the experts of all models be those of the first, which were packed after it was copied."""
    packed = {
        id(scales): module
        for module in models[0].modules()
        for scales in getattr(module, "scales_by_name", {}).values()
    }
    for model in models[1:]:
        for module in model.modules():
            for name, scales in getattr(module, "scales_by_name", {}).items():
                module._parameters[name] = packed[id(scales)]._parameters[name]
