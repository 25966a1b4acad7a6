"""torch 169237: on a CPU the norm of a large float32 tensor comes out too small; a GPU and float64 agree on another.

The right value is the root of the sum of squares in float64. torch 2.13 adds the squares one after the other, and loses
1e-5 of the norm of a million numbers, 1% of 100 million. A gradient is clipped by its norm, so SGD shows the fault as a
step of another length.
"""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_llm.training.loop import clip_gradients

MAX_GRAD_NORM = 0.01


def one_step(accelerator: Accelerator, clip) -> tuple[float, float]:
    """Return the reported norm, and the length of a step of SGD with learning rate 1, both in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(1000, 1500, bias=False)
    layer.weight.data.zero_()
    layer.weight.grad = torch.randn(1500, 1000) * torch.rand(1500, 1000) ** 8
    true_norm = float(layer.weight.grad.double().norm())
    reported = float(clip(accelerator, layer))
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    return reported / true_norm - 1, float(layer.weight.detach().double().norm()) / MAX_GRAD_NORM - 1


def test_the_norm_and_a_clipped_step_of_sgd_are_exact(accelerator: Accelerator) -> None:
    errors = one_step(accelerator, lambda accelerator, layer: clip_gradients(accelerator, layer, MAX_GRAD_NORM))
    assert errors == pytest.approx((0, 0), abs=1e-6)


def test_torch_is_still_wrong() -> None:
    """When this fails, `clip_gradients` can use Accelerate's clipping again."""
    errors = one_step(
        Accelerator(cpu=True), lambda _, layer: nn.utils.clip_grad_norm_(layer.parameters(), MAX_GRAD_NORM)
    )
    assert errors[0] < -1e-5 and errors[1] > 1e-5
