"""Fits the sizes of a method to the widths of the layers that it adapts.

Some methods cut the widths into blocks, or choose so many numbers of a matrix. PEFT's defaults fit the widths of large
models; for other widths the largest value below the default that fits is taken. A value that the user has set is not
changed: it is refused if it does not fit.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.defaults import METHOD_DEFAULTS, OTHERS
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError
from accel_llm.model.classifier import head_modules
from accel_llm.system.launcher import process_rank

# Options that must divide widths of every adapted layer, for PEFT 0.21: which widths, and whether it must be even.
BLOCK_SIZES = {
    "c3a": ("block_size", ("in", "out"), False),
    "vblora": ("vector_length", ("in", "out"), False),
    "road": ("group_size", ("out",), True),
    "boft": ("boft_block_size", ("in",), False),
    "oft": ("oft_block_size", ("in",), False),
    "gralora": ("gralora_k", ("in", "out"), False),
}
# Options with a largest value, which follows from the widths (in, out) of a layer.
LARGEST_SIZES: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "miss": ("r", lambda width_in, width_out: width_in),
    "psoft": ("r", min),
    "osf": ("effective_rank", min),
    "shira": ("r", lambda width_in, width_out: width_in * width_out // (width_in + width_out)),
    "fourierft": ("n_frequency", lambda width_in, width_out: width_in * width_out),
    "waveft": ("n_frequency", lambda width_in, width_out: width_in * width_out),
}
# Uni-LoRA draws all numbers of all layers' LoRAs from this many: more than there are would never be used.
TOTAL_SIZES = {"unilora": "theta_d_length"}


def fit_sizes(options: MethodOptions, config: Any, model: PreTrainedModel, others: list[str]) -> None:
    """Change the sizes in PEFT's `config` that do not fit the adapted layers of `model`, and say so.

    `others` are the names of parts of the model that are never adapted.

    Raises:
        ConfigError: a size that the user has set, or that an earlier adapter has, does not fit.
    """
    method = options.method
    if not any(method in table for table in (BLOCK_SIZES, LARGEST_SIZES, TOTAL_SIZES)):
        return
    layers = _adapted_widths(model, config.target_modules, tuple(f"{name}." for name in others))
    if not layers:
        return
    if method in BLOCK_SIZES:
        name, sides, even = BLOCK_SIZES[method]
        widths = sorted({layer[("in", "out").index(side)] for layer in layers for side in sides})
        common = math.gcd(*widths)
        allowed = [n for n in range(1, common + 1) if common % n == 0 and not (even and n % 2)]
        reason = f"does not divide the widths {', '.join(map(str, widths))} of the adapted layers"
    elif method in TOTAL_SIZES:
        name, largest = TOTAL_SIZES[method], sum(config.r * sum(layer) for layer in layers)
        allowed, reason = range(1, largest + 1), f"is more than the {largest:,} numbers of all layers' LoRAs"
    else:
        name, largest_of = LARGEST_SIZES[method]
        largest, (width_in, width_out) = min((largest_of(*layer), layer) for layer in layers)
        allowed = range(1, largest + 1)
        reason = f"is too large for a layer of {width_in} inputs and {width_out} outputs"
    value = getattr(config, name)
    if not value or value in allowed:  # 0 or None: PEFT computes it
        return
    fitting = max((n for n in allowed if n <= value), default=None)
    ours = METHOD_DEFAULTS.get(method, OTHERS).options
    given = name in options.method_options and options.method_options[name] != ours.get(name)
    if given or fitting is None:
        text = f"at most {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed)) or "none"
        raise ConfigError(f"method_options: {name} {value} {reason}; allowed: {text}.")
    setattr(config, name, fitting)
    if process_rank() == 0:
        print(f"method_options: {name} is {fitting}, because the default of {value} {reason}", flush=True)


def _adapted_widths(model: PreTrainedModel, targets: Any, others: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return the widths (in, out) of each linear layer that `targets`, a value of `target_modules`, names."""
    heads = head_modules(model) or [model.get_output_embeddings()]
    return [
        # Conv1D of GPT-2 stores its weight transposed.
        (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else (module.nx, module.nf)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not f"{name}.".startswith(others)
        and _is_target(name, module in heads, targets)
    ]


def _is_target(name: str, is_head: bool, targets: str | list[str] | None) -> bool:
    if targets is None or targets == "all-linear":
        return not is_head
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
