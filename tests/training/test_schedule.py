"""The learning rate at every step, by the options and by plain arguments."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from accel_llm.config.options import OptimOptions
from accel_llm.training import schedule
from accel_llm.training.schedule import SCHEDULES, build_schedule, count_warmup_steps, learning_rate_factor

COSINE = [math.cos(math.pi * share) / 2 + 0.5 for share in (0, 0.25, 0.5, 0.75, 1)]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 2}, [1 / 3, 2 / 3, *COSINE, 0]),
        ({"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 2, "min_lr_rate": 0.2},
         [1 / 3, 2 / 3, *(0.2 + 0.8 * wave for wave in COSINE), 0.2]),
        ({"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0}, [1, 0.9397114317, 0.775, 0.55, 0.325,
         0.1602885683, 0.1, 0.1]),
        ({"lr_scheduler_type": "constant"}, [1] * 8),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1, "decay_share": 0.5},
         [0.5, 1, 1, 1, 2 / 3, 1 / 3, 0, 0]),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1, "decay_share": 0.5, "min_lr_rate": 0.4},
         [0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.4]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0.5}, [0.25, 0.5, 0.75, 1, 2 / 3, 1 / 3, 0, 0]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 20}, [step / 21 for step in range(1, 9)]),
    ],
)  # fmt: skip
def test_learning_rate_at_every_step_of_six(options, shares):
    kind, arguments = options["lr_scheduler_type"], {k: v for k, v in options.items() if k != "lr_scheduler_type"}
    if kind == "cosine_with_min_lr":
        arguments.setdefault("min_lr_rate", 0.1)
    assert [learning_rate_factor(step, 6, kind, **arguments) for step in range(8)] == pytest.approx(shares)

    options = OptimOptions(**options, learning_rate=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = build_schedule(optimizer, options, 6)
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * share for share in shares])


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"])
def test_after_warmup_the_schedules_are_those_of_transformers(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    extra = {"scheduler_specific_kwargs": {"min_lr_rate": 0.1}} if name == "cosine_with_min_lr" else {}
    reference = get_scheduler(name, optimizer, num_warmup_steps=20, num_training_steps=200, **extra)
    options = OptimOptions(lr_scheduler_type=name, **({} if name == "constant" else {"warmup_steps": 0.1}))
    expected, ours = reference.lr_lambdas[0], build_schedule(optimizer, options, 200).lr_lambdas[0]
    assert [ours(step) for step in range(20, 200)] == pytest.approx([expected(step) for step in range(20, 200)])


def test_warmup_is_steps_or_a_share():
    assert count_warmup_steps(0.03, 1000) == 30
    assert count_warmup_steps(0.03, 10) == 1
    assert count_warmup_steps(1, 1000) == 1
    assert count_warmup_steps(200, 1000) == 200
    assert count_warmup_steps(0, 1000) == 0
    assert learning_rate_factor(0, 1000, "constant", warmup_steps=200) == 1.0


def test_every_schedule_of_the_options_works_in_a_loop_of_ones_own():
    assert OptimOptions.model_fields["lr_scheduler_type"].annotation.__args__ == SCHEDULES
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, 4, "linear"))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.375]
    with pytest.raises(ValueError, match="kind: 'cosin' is not a schedule; give one of linear, cosine, "):
        learning_rate_factor(0, 4, "cosin")


def test_the_loop_in_the_readme_runs():
    text = (Path(schedule.__file__).parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 15
    values: dict = {}
    exec(code, values)
    assert values["scheduler"].last_epoch == 100 and values["scheduler"].get_last_lr() == [0.0]
