"""The update ratio beside the weights that a step has changed, in float64; every k-th number of a large model."""

import math

import pytest
import torch
from torch import nn

from accel_llm.report import update_ratio
from accel_llm.report.update_ratio import UpdateRatio, ratio_of


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 12, bias=False))
    layers[3].weight.requires_grad = False
    return layers


def take_step(layers: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """Take a step; return the ratio by plain float64 arithmetic on copies of all trained weights."""
    ids = torch.randint(50, (40,), generator=torch.Generator().manual_seed(seed))
    layers(ids).square().mean().backward()
    trained = [p for p in layers.parameters() if p.requires_grad]
    before = [p.detach().double().clone() for p in trained]
    optimizer.step()
    optimizer.zero_grad()
    changes = math.sqrt(
        sum(float((p.detach().double() - b).square().sum()) for p, b in zip(trained, before, strict=True))
    )
    return changes / math.sqrt(sum(float(b.square().sum()) for b in before))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_ratio_is_that_of_all_trained_weights(kind):
    layers = model()
    optimizer = kind([p for p in layers.parameters() if p.requires_grad], lr=0.01)
    wanted = [True]
    ratio = UpdateRatio(optimizer, lambda: wanted[0])
    for step in range(3):
        expected = take_step(layers, optimizer, step)
        assert ratio_of(*ratio.take(torch.device("cpu")).tolist()) == pytest.approx(expected, rel=1e-9)
    wanted[0] = False
    take_step(layers, optimizer, 9)
    assert ratio_of(*ratio.take(torch.device("cpu")).tolist()) is None and ratio.before == []


def test_of_a_large_model_every_kth_number_counts_for_k(monkeypatch):
    monkeypatch.setattr(update_ratio, "MAX_COMPARED", 2000)
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.01)
    ratio = UpdateRatio(optimizer, lambda: True)
    copied: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: copied.append(sum(copy.numel() for _, _, copy in ratio.before)))
    for step in range(3):
        expected = take_step(layers, optimizer, step)
        assert ratio_of(*ratio.take(torch.device("cpu")).tolist()) == pytest.approx(expected, rel=0.05)
    assert max(copied) <= 2100


def test_no_stride_meets_some_columns_only():
    for columns in (1, 2, 12, 64, 30, 7):
        for every in (1, 2, 3, 8, 64):
            stride = update_ratio._stride(every, torch.zeros(500, columns))
            assert len({k % columns for k in range(0, 500 * columns, stride)}) == columns


def test_a_stepped_part_at_a_time_adds_up():
    """DeepSpeed calls the optimizer once for each part of the weights."""
    layers = model()
    trained = [p for p in layers.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in trained], lr=0.01)
    ratio, groups = UpdateRatio(optimizer, lambda: True), optimizer.param_groups
    layers(torch.arange(50)).square().mean().backward()
    before = [p.detach().double().clone() for p in trained]
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    changes = sum(float((p.detach().double() - b).square().sum()) for p, b in zip(trained, before, strict=True))
    expected = math.sqrt(changes / sum(float(b.square().sum()) for b in before))
    assert ratio_of(*ratio.take(torch.device("cpu")).tolist()) == pytest.approx(expected, rel=1e-9)
