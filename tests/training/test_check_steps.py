"""The steps of check_only: how many are taken, what is said of their time, and what speaks against the run."""

import re
import time

import pytest
import torch

from accel_llm.data.stream import TrainingPlan
from accel_llm.training import check_steps
from accel_llm.training.check_steps import describe_peak, describe_run_time, timed_steps, verdict_problems

CPU = torch.device("cpu")
FACTS = {"first_step": {"gradients": 4, "all_zero": 2, "without": []}}
MEMORY = {"memory": {"device_mb": 1000, "peak_memory_mb": 300}}


def test_a_few_steps_are_timed():
    seconds: list[float] = []
    for step in timed_steps(TrainingPlan(100, 1, 100, 100), CPU, seconds):
        time.sleep(0.2 if step == 1 else 0.01)
    assert len(seconds) == 1 + check_steps.MORE_STEPS
    assert 0.2 <= seconds[0] < 0.4 and all(0.01 <= value < 0.1 for value in seconds[1:])


def test_slow_steps_are_not_repeated_and_a_short_run_ends(monkeypatch):
    monkeypatch.setattr(check_steps, "ENOUGH_SECONDS", 0.02)
    seconds: list[float] = []
    for _ in timed_steps(TrainingPlan(100, 1, 100, 100), CPU, seconds):
        time.sleep(0.03)
    assert len(seconds) == 2  # the first one does not count
    seconds = []
    assert list(timed_steps(TrainingPlan(2, 1, 2, 2), CPU, seconds)) == [1, 2] and len(seconds) == 2
    assert list(timed_steps(TrainingPlan(9, 1, 9, 9, first_step=8), CPU, [])) == [9]


def test_the_time_of_the_run_follows_from_the_later_steps():
    plan = TrainingPlan(100, 1, 100, 101)
    assert describe_run_time(plan, [5.0, 0.5, 0.6, 0.5, 0.6]) == (
        "0.55 s a step (median of 4 steps after the first one, which took 5 s); 101 steps take about 60 s, without "
        "loading, evaluations, checkpoints and export"
    )
    uneven = describe_run_time(plan, [5.0, 0.5, 3.0])
    assert ", 0.5 s to 3 s); " in uneven
    assert describe_run_time(TrainingPlan(1, 1, 1, 1), [5.0]).startswith("5 s a step (the only step, with all that is")
    assert describe_run_time(plan, []) == "not measured: no step was taken"


def test_what_speaks_against_a_run_is_said():
    assert verdict_problems(FACTS, 400, MEMORY) == []
    (full,) = verdict_problems(FACTS, 970, MEMORY)
    assert full.startswith("the peak is 97% of the memory; ")
    (nothing,) = verdict_problems({}, 400, MEMORY)
    assert nothing.startswith("no step changed a weight")
    (zero,) = verdict_problems({"first_step": {"gradients": 4, "all_zero": 4, "without": []}}, 400, {})
    assert zero.startswith("all gradients are zero")
    assert verdict_problems(FACTS, 400, MEMORY | {"disk_problem": "output_dir: too little."}) == [
        "output_dir: too little"
    ]


def test_the_peak_stands_beside_the_estimate():
    assert describe_peak(400, MEMORY["memory"], 2) == (
        "peak 400 MB of the main process, estimated 300 MB, of 1,000 MB; an evaluation or a longer row may take more"
    )
    assert re.match(r"peak 400 MB; an eval", describe_peak(400, {}, 1))


@pytest.mark.parametrize("first", [True, False])
def test_the_checks_are_said_in_words(first):
    facts = {
        "parameters": {"trainable": 1000, "total": 2000}, "loss_path": "own", "products": {"float32": 9, "int8": 1},
        "num_processes": 2, "weights_hash": None, **(FACTS if first else {}),
    }  # fmt: skip
    text = check_steps.describe_checks(facts)
    assert text.startswith(
        "1,000 of 2,000 parameters are trained; the loss is the model family's (own); most products "
    )
    assert "run in float32; parameters are sharded" in text
    assert text.endswith("4 trained tensors got a gradient, 2 of them all zero") == first
