"""Finds weights of an adapter that PEFT has left without first values: whatever was in memory before.

PEFT 0.21 does so in TinyLoRA with `init_weights: false`, or a word that it does not know. The numbers may look right in one
run and be NaN in the next.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError


@contextmanager
def unset_as_nan() -> Iterator[None]:
    """Let torch fill new memory with NaN, which it does with deterministic algorithms."""
    memory: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic")  # of operations that have no such algorithm
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        memory.fill_uninitialized_memory = filled


def check_values_are_set(model: Any, options: MethodOptions) -> None:
    """Check that all weights of an adapter that was attached under `unset_as_nan` have first values.

    Raises:
        ConfigError: some have not.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if ".default" in name and tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            init = {k: v for k, v in options.method_options.items() if k.startswith("init")} or options.method_options
            raise ConfigError(
                f"method_options: with {init} method {options.method} leaves {name.split('.default')[0]} without first "
                "values; leave it out."
            )
