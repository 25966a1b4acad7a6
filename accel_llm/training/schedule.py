"""The learning rate at each step: a function of the step number alone, so a resumed run needs no saved schedule."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from accel_llm.config.options import OptimOptions, count_warmup_steps

SCHEDULES = ("linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "warmup_stable_decay")


def learning_rate_factor(
    step: int,
    total_steps: int,
    kind: str = "cosine",
    warmup_steps: float = 0,
    min_lr_rate: float = 0.0,
    decay_share: float = 0.1,
) -> float:
    """Return the learning rate of optimizer step `step` (from 0), as a share of its peak.

    `warmup_steps` are counted as in `count_warmup_steps`; `constant` has none. Warmup rises in equal parts from above
    0, so no step is idle, and the step after it has the peak rate. The rate then falls towards its end value, which it
    would reach at step `total_steps`, the first one that is not taken. The end value is 0, or `min_lr_rate` for
    `cosine_with_min_lr` and `warmup_stable_decay`. The latter stays at the peak and falls in the last `decay_share` of
    all steps.

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
        decay_start = max(warmup, total_steps - math.ceil(decay_share * total_steps))
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
    end = options.min_lr_rate
    assert end is not None, "OptimOptions fills it in"
    kind, warmup, share = options.lr_scheduler_type, options.warmup_steps, options.decay_share
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, kind, warmup, end, share))
