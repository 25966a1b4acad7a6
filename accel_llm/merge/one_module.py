"""An adapted module becomes a plain one: merged, unmerged or scaled, by PEFT's own layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import accel_llm.system.chatter

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from accel_llm.errors import ConfigError

MERGED_AT_ONCE = 2**17  # elements: as float32 half a MiB, so that what PEFT makes of a part stays in a core's cache


def merge_module(module: Any, unmerge: bool) -> nn.Module:
    """The plain module that an adapted one becomes when its adapter is merged, by PEFT's own code.

    With `unmerge` its base is taken for one that the adapter was merged into, and the adapter is taken out of it.

    Raises:
        ValueError: PEFT cannot.
    """
    if _splits(module):
        _in_parts(module, partial(_unfold, module) if unmerge else module.merge)
        return module.get_base_layer()
    if unmerge:
        _unfold(module)
        return plain_module(module)
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    module.merge(safe_merge=False)
    return module.get_base_layer()


def _unfold(module: Any) -> None:
    if isinstance(module, AuxiliaryTrainingWrapper) or getattr(module, "use_dora", {}).get(module.active_adapters[0]):
        raise ValueError("what it replaced or normalised in the base is in no file")
    while isinstance(module, BaseTunerLayer):
        module.merged_adapters = list(module.active_adapters)
        module.unmerge()
        module = module.base_layer  # type: ignore[attr-defined] # every layer has one


def _splits(module: Any) -> bool:
    """Whether a plain LoRA, whose rows have nothing to do with one another."""
    if type(module) not in (Linear, Embedding) or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    return name not in module.lora_variant and not module.lora_bias.get(name)


def _in_parts(layer: Any, step: Callable[[], None]) -> None:
    """Take `step` for some rows of the layer after the other, each as if they were all that it has.

    PEFT 0.21 merges in float32, in six times the memory of a weight in bfloat16 beside it, and most of its time goes into
    touching that. Each number comes out of the same operations in the same order as when they are merged at once.
    """
    name, base = layer.active_adapters[0], layer.get_base_layer()
    if isinstance(layer, Embedding):
        factor, across = layer.lora_embedding_A[name], 1
    else:
        factor, across = layer.lora_B[name].weight, 0
    turned = not isinstance(layer, Embedding) and layer.fan_in_fan_out
    full, whole, threads = factor.data, base.weight.data, torch.get_num_threads()
    count = full.shape[across]
    rows = max(16, MERGED_AT_ONCE * count // max(1, whole.numel()))
    try:
        torch.set_num_threads(1)  # a part is less work than waking another core up
        for start in range(0, count, rows):
            factor.data = full.narrow(across, start, min(rows, count - start))
            base.weight.data = whole.narrow(int(turned), start, min(rows, count - start))
            layer.merged_adapters.clear()
            step()
    finally:
        torch.set_num_threads(threads)
        factor.data, base.weight.data = full, whole


def scale_module(module: nn.Module, factor: float) -> None:
    """Scale what an adapted module adds.

    Raises:
        ConfigError: it does not add, it replaces or rotates.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    if (
        not layers
        or not all(isinstance(layer, LoraLayer) for layer in layers)
        or isinstance(module, AuxiliaryTrainingWrapper)
    ):
        raise ConfigError(f"scale: {factor} is for LoRA alone, which adds to the weights; leave it out here.")
    for layer in layers:
        layer.scaling.update({name: value * factor for name, value in layer.scaling.items()})  # type: ignore[union-attr]


def plain_module(module: Any) -> Any:
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module
