"""The norm of the gradient and its clipping, of one step; tests/proofs/matrix.py tests both on every engine."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grad_norm_

from accel_llm.training.loop import clip_gradients, may_step


def wide_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model with a gradient of a million numbers of very different sizes."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(1000, 1000), nn.Linear(3, 5, bias=False)]).to(dtype)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape) * torch.rand(parameter.shape) ** 8).to(dtype)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    copy = wide_model(torch.float64)
    for parameter, original in zip(copy.parameters(), model.parameters(), strict=True):
        assert original.grad is not None
        parameter.grad = original.grad.double()
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-2, 1e9])
def test_norm_and_clipped_gradient_are_those_of_float64(accelerator: Accelerator, dtype, max_grad_norm) -> None:
    model = wide_model(dtype)
    reference: Any = in_float64(model)
    expected = float(clip_grad_norm_(reference.parameters(), max_grad_norm or torch.inf))
    assert clip_gradients(accelerator, model, max_grad_norm) == pytest.approx(expected, rel=1e-9)
    tolerance: Any = {"rtol": 2e-7 if dtype is torch.float32 else 4e-3, "atol": 1e-12}
    for parameter, right in zip(model.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad.double(), right.grad, **tolerance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_reported_and_not_stepped(accelerator: Accelerator, bad: float) -> None:
    model = wide_model()
    parameter = next(model.parameters())
    assert parameter.grad is not None
    parameter.grad[3, 3] = bad
    norm = clip_gradients(accelerator, model, 1.0)
    assert not torch.isfinite(torch.tensor(norm)) and not may_step(accelerator, norm)
