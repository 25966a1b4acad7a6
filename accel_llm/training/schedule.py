"""The learning rate's course: a pure function of the step."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from accel_llm.config.options import OptimOptions


def warmup_steps(options: OptimOptions, total_steps: int) -> int:
    """Steps of warmup: `warmup_steps` itself, or below 1 that share of all steps, rounded up."""
    if options.lr_scheduler_type == "constant":
        return 0
    steps = options.warmup_steps
    return int(steps) if steps >= 1 else math.ceil(steps * total_steps)


def learning_rate_factor(step: int, options: OptimOptions, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of its peak.

    Warmup rises in equal parts from above 0, so no step is idle, and reaches 1 at the step after it. What follows
    would arrive at the end value, `min_lr_rate` or 0, at step `total_steps`, the first that is not taken.
    """
    assert options.min_lr_rate is not None, "OptimOptions resolves it"
    name, floor, warmup = options.lr_scheduler_type, options.min_lr_rate, warmup_steps(options, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    start = warmup
    if name == "warmup_stable_decay":
        start = max(warmup, total_steps - math.ceil(options.decay_share * total_steps))
    left = min(1.0, (total_steps - step) / max(1, total_steps - start)) if step < total_steps else 0.0
    if name == "linear":
        return left
    if name == "warmup_stable_decay":
        return floor + (1 - floor) * left
    wave = 0.5 * (1 - math.cos(math.pi * left))
    return wave if name == "cosine" else floor + (1 - floor) * wave


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimOptions, total_steps: int) -> LambdaLR:
    """The schedule, a pure function of the step; it is stepped once an optimizer step and never prepared."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, options, total_steps))
