"""The parts of a step: batches that come ahead, the norm of the gradient and its clipping, waits for the device.

tests/proofs/matrix.py tests norm and clipping on every engine.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grad_norm_
from waits import noted_waits

from accel_llm.data.batches import Batch
from accel_llm.training import loop
from accel_llm.training.loop import clip_gradients, may_step, prefetch_to_device


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


# --- batches that come ahead ---


class Numbered:
    """Batches 0, 1, 2, ...; each notes the thread that makes it."""

    def __init__(self, broken: int = -1):
        self.made, self.threads, self.broken = 0, set(), broken

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.made == self.broken:
                raise ZeroDivisionError(f"batch {self.made}")
            self.threads.add(threading.current_thread())
            self.made += 1
            yield {"input_ids": torch.full((2, 3), self.made - 1), "lengths": [self.made - 1]}


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_batches_come_in_order_and_a_step_ahead() -> None:
    """They are made in another thread while the caller works, and no more than `ahead` of them."""
    numbers = Numbered()
    batches = prefetch_to_device(iter(numbers), torch.device("cpu"), 3)
    assert numbers.made == 0, "nothing is made before the first one is asked for"
    for k in range(10):
        batch = next(batches)
        assert batch["input_ids"].unique().tolist() == batch["lengths"] == [k]
        wait_until(lambda k=k: numbers.made == k + 4)
    time.sleep(0.05)
    assert numbers.made == 13
    (thread,) = numbers.threads
    assert thread is not threading.current_thread()
    batches.close()  # type: ignore[attr-defined]
    assert not thread.is_alive() and numbers.made == 13


def test_batches_are_on_the_device_and_what_is_no_tensor_stays() -> None:
    batch = next(prefetch_to_device(iter(Numbered()), torch.device("meta"), 1))
    assert batch["input_ids"].is_meta and batch["lengths"] == [0]


def test_an_error_of_the_thread_is_raised_where_its_batch_is_asked_for() -> None:
    batches = prefetch_to_device(iter(Numbered(broken=2)), torch.device("cpu"), 2)
    assert [next(batches)["lengths"], next(batches)["lengths"]] == [[0], [1]]
    with pytest.raises(ZeroDivisionError, match="batch 2"):
        next(batches)


# --- waits ---

PATHS = {
    "packed": [],
    "padded": ["--packing", "false", "--per_device_train_batch_size", 2],
    "full": ["--method", "full", "--gradient_checkpointing", "--neftune_noise_alpha", 5],
    "qlora": ["--method", "qlora"],
}


# peft 0.21.2 asks for a property that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("path", PATHS)
def test_a_step_waits_once_for_the_device(path: str, script, tiny, chats, tmp_path, monkeypatch) -> None:
    """For the norm of the gradient; and once more where the step is logged, here the steps 1, 4 and 6."""
    honest, block, noted, before = loop.total_targets, ExitStack(), [], []

    def total_targets(*arguments: Any) -> float:
        before.append(len(noted[0]) if noted else 0)
        if len(before) == 2:  # the first step has checks of its own
            noted.append(block.enter_context(noted_waits()))
        if len(before) == 6:
            block.close()
        return honest(*arguments)

    monkeypatch.setattr(loop, "total_targets", total_targets)
    words = [
        "--model_name_or_path",
        tiny,
        "--train_files",
        chats,
        "--max_length",
        128,
        "--output_dir",
        tmp_path / "out",
    ]
    words += ["--gradient_accumulation_steps", 3, "--max_steps", 6, "--logging_steps", 4, *PATHS[path]]
    with block:
        script("sft", *words)
    assert np.diff(before[1:]).tolist() == [1, 1, 2, 1], noted[0]
    assert [wait.split(":")[0] for wait in noted[0]].count("_local_scalar_dense in loop.py") == 4
