"""The learning rate at each step: a function of the step number alone, so a resumed run needs no saved schedule."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from accel_llm.config.options import OptimOptions, count_decay_steps, count_warmup_steps

SCHEDULES = ("linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "warmup_stable_decay")
# The arguments of `learning_rate_factor`, and the options that give them.
SCHEDULE_OPTIONS = {"kind": "lr_scheduler_type"} | {
    name: name for name in ("warmup_steps", "min_lr_rate", "decay_share", "decay_steps")
}


def learning_rate_factor(
    step: int,
    total_steps: int,
    kind: str = "cosine",
    warmup_steps: float = 0,
    min_lr_rate: float = 0.0,
    decay_share: float = 0.1,
    decay_steps: int | None = None,
) -> float:
    """Return the learning rate of optimizer step `step` (from 0), as a share of its peak.

    `warmup_steps` are counted as in `count_warmup_steps`; `constant` has none. Warmup rises in equal parts from above
    0, so no step is idle, and the step after it has the peak rate. The rate then falls towards its end value, which it
    would reach at step `total_steps`, the first one that is not taken. The end value is 0, or `min_lr_rate` for
    `cosine_with_min_lr` and `warmup_stable_decay`. The latter stays at the peak and falls in the last `decay_steps`, or
    without them in the last `decay_share` of all steps.

    Raises:
        ValueError: `kind` is not one of `SCHEDULES`.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"kind: {kind!r} is not a schedule; give one of {', '.join(SCHEDULES)}.")
    if kind == "constant":
        return 1.0

    # Up to the peak, and along it.
    warmup = count_warmup_steps(warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant_with_warmup":
        return 1.0

    # Down again: `left` falls from 1 at `decay_start` to 0 at `total_steps`.
    decay_start = warmup
    if kind == "warmup_stable_decay":
        decay_start = max(warmup, total_steps - count_decay_steps(decay_share, decay_steps, total_steps))
    left = min(1.0, (total_steps - step) / max(1, total_steps - decay_start)) if step < total_steps else 0.0
    if kind == "linear":
        return left
    if kind == "warmup_stable_decay":
        return min_lr_rate + (1 - min_lr_rate) * left
    wave = 0.5 * (1 - math.cos(math.pi * left))
    return wave if kind == "cosine" else min_lr_rate + (1 - min_lr_rate) * wave


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimOptions, total_steps: int) -> LambdaLR:
    """Return the schedule that the options name. Call its `step` once per optimizer step.

    It does not go through `accelerator.prepare`, which would step it once per process.
    """
    assert options.min_lr_rate is not None, "OptimOptions fills it in"
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, **schedule_arguments(options)))


def schedule_arguments(options: OptimOptions) -> dict[str, Any]:
    """Return the arguments of `learning_rate_factor` that the options give."""
    return {argument: getattr(options, name) for argument, name in SCHEDULE_OPTIONS.items()}


def same_rates(before: dict[str, Any], total_before: int, now: dict[str, Any], total_now: int, steps: int) -> bool:
    """Return whether the first `steps` learning rates are the same; `before` and `now` are `schedule_arguments`."""
    return all(
        learning_rate_factor(step, total_before, **before) == learning_rate_factor(step, total_now, **now)
        for step in range(steps)
    )
