"""How large the update of a step is beside the weights: |change| / |weights| over all trained weights."""

import math
from collections.abc import Callable
from typing import Any

import torch

from accel_llm.backend.accelerator import local_part, unwrap_optimizer

# At most about so many numbers are compared in a call of the optimizer: evenly spread ones, of all tensors.
MAX_COMPARED = 2**24


class UpdateRatio:
    """Measures the steps of an optimizer that are `wanted`, by hooks around its `step`.

    Every rank measures what it steps: its copy of all weights, or its shard of them, under ZeRO the float32 ones. Of more
    than MAX_COMPARED numbers every k-th counts for k of them, so a copy of 64 MiB is enough for a model of any size.
    """

    def __init__(self, optimizer: Any, wanted: Callable[[], bool]):
        base = unwrap_optimizer(optimizer)
        self.wanted = wanted
        self.before: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # each tensor, its stride, a copy of that part
        self.squares: torch.Tensor | None = None  # sums over the step at hand: of the changes, and of the weights
        base.register_step_pre_hook(self._copy_weights)
        base.register_step_post_hook(self._compare)

    def take(self, device: torch.device) -> torch.Tensor:
        """Return the sums of squares since the last call, float64 [2]: of the changes, and of the weights before them."""
        squares, self.squares = self.squares, None
        return torch.zeros(2, dtype=torch.float64, device=device) if squares is None else squares.to(device)

    def _copy_weights(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.before = []
        if not self.wanted():
            return
        # DeepSpeed steps a part of the weights at a time: a step may have several calls.
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        tensors = [local_part(parameter).detach() for parameter in trained]
        every = max(1, -(-sum(tensor.numel() for tensor in tensors) // MAX_COMPARED))
        for tensor in tensors:
            stride = _stride(every, tensor)
            self.before.append((tensor, stride, _part(tensor, stride).clone()))

    def _compare(self, *_: object) -> None:
        for tensor, stride, copy in self.before:
            before, after = copy.double(), _part(tensor, stride).double()
            sums = torch.stack([(after - before).square().sum(), before.square().sum()])
            sums *= tensor.numel() / max(1, copy.numel())
            self.squares = sums if self.squares is None else self.squares + sums
        self.before = []


def _part(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    return tensor.reshape(-1)[::stride]


def _stride(every: int, tensor: torch.Tensor) -> int:
    """Return the first number from `every` on that has no divisor in common with a row's length: all columns are met."""
    row = tensor.shape[-1] if tensor.ndim else 1
    return next(stride for stride in range(every, every + row + 2) if math.gcd(stride, row) == 1)


def ratio_of(changes: float, weights: float) -> float | None:
    """Return the ratio from the summed squares of changes and weights; None if no step was measured."""
    return math.sqrt(changes / weights) if weights else None
