"""Merges, unmerges or scales the adapter of one module, with the code of PEFT's own layer."""

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

# SPEED ONLY: elements of a weight that are merged at once. In float32 they take half a MiB, which fits a core's cache.
ELEMENTS_PER_PART = 2**17


def merge_module(module: Any, unmerge: bool) -> nn.Module:
    """Merge the adapter of a module with PEFT's own code, and return the plain module.

    `unmerge` expects a base that the adapter was merged into, and takes the adapter out of it.

    Raises:
        ValueError: PEFT cannot merge or unmerge this module.
    """
    # Plain LoRA, by far the most frequent: a few rows at a time.
    if _rows_are_independent(module):
        _run_by_rows(module, partial(_unmerge, module) if unmerge else module.merge)
        return module.get_base_layer()
    if unmerge:
        _unmerge(module)
        return plain_module(module)
    # Wrappers and layers with a way of their own.
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    module.merge(safe_merge=False)
    return module.get_base_layer()


def _unmerge(module: Any) -> None:
    if isinstance(module, AuxiliaryTrainingWrapper) or getattr(module, "use_dora", {}).get(module.active_adapters[0]):
        raise ValueError("the base's weights that it replaced or normalized are in no file")
    # PEFT takes out only what it believes to have merged; layers can be nested.
    while isinstance(module, BaseTunerLayer):
        module.merged_adapters = list(module.active_adapters)
        module.unmerge()
        module = module.base_layer  # type: ignore[attr-defined] # every layer has one


def _rows_are_independent(module: Any) -> bool:
    """Return whether the module is a plain LoRA, whose rows can be merged separately."""
    if type(module) not in (Linear, Embedding) or len(module.active_adapters) != 1:
        return False
    # Variants such as DoRA need the whole weight, and a LoRA bias must be added only once.
    name = module.active_adapters[0]
    return name not in module.lora_variant and not module.lora_bias.get(name)


def _run_by_rows(layer: Any, step: Callable[[], None]) -> None:
    """SPEED AND MEMORY ONLY: call `step` for a few rows at a time. One call `step()` gives the same bits.

    PEFT 0.21 merges in float32 and needs six times the memory of a bfloat16 weight for it; most of its time goes into
    touching that memory. While `step` runs, the layer's tensors are views of the rows whose turn it is.
    """
    # Which dimension of the adapter's factor and of the weight counts the rows.
    name, base = layer.active_adapters[0], layer.get_base_layer()
    if isinstance(layer, Embedding):
        factor, across = layer.lora_embedding_A[name], 1
    else:
        factor, across = layer.lora_B[name].weight, 0
    transposed = not isinstance(layer, Embedding) and layer.fan_in_fan_out
    full, whole, threads = factor.data, base.weight.data, torch.get_num_threads()
    count = full.shape[across]

    rows = max(16, ELEMENTS_PER_PART * count // max(1, whole.numel()))
    try:
        torch.set_num_threads(1)  # waking another core takes longer than the work on a few rows
        for start in range(0, count, rows):
            factor.data = full.narrow(across, start, min(rows, count - start))
            base.weight.data = whole.narrow(int(transposed), start, min(rows, count - start))
            layer.merged_adapters.clear()
            step()
    finally:
        torch.set_num_threads(threads)
        factor.data, base.weight.data = full, whole


def scale_module(module: nn.Module, factor: float) -> None:
    """Multiply what the adapter adds to the module by `factor`.

    Raises:
        ConfigError: the adapter is not a LoRA; it replaces or rotates the weights instead of adding to them.
    """
    # A wrapper may hold several LoRA layers; all are scaled.
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    if (
        not layers
        or not all(isinstance(layer, LoraLayer) for layer in layers)
        or isinstance(module, AuxiliaryTrainingWrapper)
    ):
        raise ConfigError(f"scale: {factor} works with LoRA only, which adds to the weights; remove scale.")
    for layer in layers:
        scaling: Any = layer.scaling
        scaling.update({name: value * factor for name, value in scaling.items()})


def plain_module(module: Any) -> Any:
    """Return the module of the base model inside all of PEFT's wrappers."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module
