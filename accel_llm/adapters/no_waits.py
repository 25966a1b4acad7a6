"""Mends layers of PEFT 0.21 in whose forward the host waits for the device, which meanwhile runs out of work.

They keep constants on the CPU and copy them in every forward, look at values, or use operators that check their result.
The numbers stay the same to the last bit. FRoD and WaveFT wait in too many places to be mended from outside.

A newer PEFT may compute something else in a method that is replaced here. So a method is replaced only if its source is
known; otherwise PEFT's own code stays, which is slower and right.
"""

import inspect
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from types import MethodType
from typing import Any

import accel_llm.system.chatter

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode


def avoid_waits(model: nn.Module) -> None:
    """Let the layers of a method in `model` compute without waits of the host, where that can be done."""
    for module in list(model.modules()):
        layer: Any = module  # methods are replaced, which types do not allow
        if isinstance(module, BaseTunerLayer):
            _keep_constants_on_device(layer)
        if isinstance(module, TrainableTokensLayer):
            layer.token_rows = BufferDict({name: torch.tensor(ids) for name, ids in layer.token_indices.items()})
        for place, (source, replacement) in WITHOUT_WAITS.items():
            name = place.rsplit(".", 1)[1]
            own = getattr(type(module), name, None)
            same_place = inspect.isfunction(own) and f"{own.__module__}.{own.__qualname__}" == place
            if same_place and source_mark(own) == source:
                setattr(layer, name, MethodType(replacement, layer))


@cache
def source_mark(function: Callable[..., Any]) -> str:
    """Return what tells the source of a function from another one: the beginning of its SHA-256."""
    return sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def _keep_constants_on_device(layer: nn.Module) -> None:
    """Make buffers of tensors that `layer` keeps in a plain dict by adapter, so that they move with the model."""
    for name, value in list(vars(layer).items()):
        of_adapters = isinstance(value, dict) and value and not name.startswith("_")
        if of_adapters and all(isinstance(each, torch.Tensor) for each in value.values()):
            setattr(layer, name, BufferDict(value))


def _with_trained_rows(layer: Any, adapters: list[str]) -> torch.Tensor:
    weight = layer.base_layer.weight
    for name in adapters:
        weight = weight.index_copy(0, layer.token_rows[name], layer.trainable_tokens_delta[name].to(weight))
    return weight


def _dense_change(layer: Any, adapter: str) -> torch.Tensor:
    """Return what SHiRA adds to the weight [out, in]. PEFT adds a sparse matrix, whose places torch counts anew."""
    values = layer.shira_weight[adapter] * layer.scaling[adapter]
    rows, columns = layer.shira_indices[adapter]
    return values.new_zeros(layer.out_features, layer.in_features).index_put((rows, columns), values)


def _matrices_without_check(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Return VB-LoRA's A and B without PEFT's question whether a logit is infinite; `attach_adapter` has asked that."""
    kind: Any = type(layer)
    training, layer.training = layer.training, False
    try:
        return kind._get_lora_matrices(layer, *args, **kwargs)
    finally:
        layer.training = training


class _Unchecked(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        return func(*args, **(kwargs or {}))


def _without_check(name: str) -> Any:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        with _Unchecked():
            return getattr(type(layer), name)(layer, *args, **kwargs)

    return call


# Methods of PEFT's layers, the mark of the source that each replacement was written for, and the replacement. BOFT, OFT
# and PSOFT solve equations with I + S. S is skew-symmetric, so there is always a solution.
WITHOUT_WAITS: dict[str, tuple[str, Callable[..., Any]]] = {
    "peft.tuners.boft.layer.BOFTLayer.cayley_batch": ("0901125af77910c6", _without_check("cayley_batch")),
    "peft.tuners.oft.layer.OFTRotationModule._cayley_batch": ("13e05f99edad8678", _without_check("_cayley_batch")),
    "peft.tuners.psoft.layer.OrthLayer.get_matrix": ("15266180773f26d0", _without_check("get_matrix")),
    "peft.tuners.shira.layer.Linear.get_delta_weight": ("0b896aa2ece38126", _dense_change),
    "peft.tuners.trainable_tokens.layer.TrainableTokensLayer.get_merged_weights": (
        "d0b5f401f220e976",
        _with_trained_rows,
    ),
    "peft.tuners.vblora.layer.Linear._get_lora_matrices": ("3aad045c87bacc57", _matrices_without_check),
}
