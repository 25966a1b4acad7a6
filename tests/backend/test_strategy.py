"""What the launcher and the recipe ask for, before an Accelerator exists."""

from types import SimpleNamespace

import pytest
import torch

from accel_llm.backend.strategy import resolve_precision, training_device
from accel_llm.config.options import ModelOptions


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch believe that this process has the second GPU of a machine."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [("T4", (7, 5), "fp16"), ("V100", (7, 0), "fp16"), ("A100", (8, 0), "bf16"), ("RTX 3060", (8, 6), "bf16")],
)
def test_auto_is_bf16_where_the_gpu_multiplies_it(name, capability, expected, gpu, monkeypatch) -> None:
    major, minor = capability
    properties = SimpleNamespace(name=name, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_precision(ModelOptions()) == expected
    assert resolve_precision(ModelOptions(precision="fp32")) == "fp32"


def test_auto_is_fp32_on_a_cpu_also_beside_a_gpu(gpu, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_precision(ModelOptions()) == "fp32"
    assert training_device() == torch.device("cpu")


def test_a_process_trains_on_the_gpu_of_its_rank(gpu) -> None:
    assert training_device() == torch.device("cuda", 1)
