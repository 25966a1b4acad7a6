"""The guard against spikes: what is one, what it does to a run, and where it cannot be."""

import json
from itertools import pairwise

import numpy as np
import pytest
from safetensors.torch import load_file

from accel_llm.config.options import TrainOptions
from accel_llm.training import bad_steps as bad_steps_module
from accel_llm.training.bad_steps import SPIKE_WINDOW, describe_spike, spike_problems


def recent(seed: int = 0) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [
        (float(a), float(b))
        for a, b in zip(rng.normal(3, 0.1, SPIKE_WINDOW), rng.normal(1, 0.2, SPIKE_WINDOW), strict=True)
    ]


def test_a_spike_is_far_above_the_mean_of_the_steps_before():
    steps = recent()
    mean, deviation = np.mean(steps, 0), np.std(steps, 0, ddof=1)
    for k, name in enumerate(("loss", "gradient norm")):
        for sigmas, is_one in ((5.9, False), (6.1, True), (-50, False)):
            now = list(mean)
            now[k] = mean[k] + sigmas * deviation[k]
            said = describe_spike(steps, (now[0], now[1]), 6.0)
            assert bool(said) == is_one
            if is_one:
                assert said.startswith(f"its {name} ") and "is 6.1 standard deviations above the mean" in said
    assert describe_spike(steps[1:], (1e9, 1e9), 6.0) == ""  # too few steps to judge by
    assert describe_spike([(1.0, 1.0)] * SPIKE_WINDOW, (1.1, 1.0), 6.0) == ""  # no deviation is known


def test_steps_that_stay_high_are_skipped_for_a_while_only():
    steps, skipped = recent(), 0
    for _ in range(SPIKE_WINDOW):
        skipped += bool(describe_spike(steps, (6.0, 1.0), 6.0))
        steps = [*steps[1:], (6.0, 1.0)]
    assert 1 <= skipped <= 8
    assert describe_spike(steps, (6.0, 1.0), 6.0) == ""


def test_a_skipped_spike_changes_no_weight_and_is_said(script, tiny, chats, tmp_path, monkeypatch, capsys):
    """The same run without the bad step's update: negative control without the guard."""
    monkeypatch.setattr(bad_steps_module, "SPIKE_WINDOW", 4)
    words = ("--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--method", "full")
    words += ("--max_steps", 7, "--logging_steps", 1, "--learning_rate", 1e-3, "--save_steps", 1)
    words += ("--save_total_limit", 9, "--order", "source", "--lr_scheduler_type", "constant")
    judged = []

    def at_the_sixth(recent: list, now: tuple, threshold: float) -> str:
        judged.append(now)
        return "its loss is what this test says" if len(judged) == 6 else ""

    monkeypatch.setattr(bad_steps_module, "describe_spike", at_the_sixth)
    script("sft", *words, "--spike_threshold", 6, "--output_dir", tmp_path / "out")
    assert len(judged) == 7 and "step 6 skipped: its loss is what this test says; " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if "update_ratio" not in line] == [6]
    assert [line.get("skipped_steps") for line in lines] == [None] * 5 + [1, 1]
    for line, (loss, norm) in zip(lines, judged, strict=True):  # what it judges by is what the run reports
        assert loss == pytest.approx(line["loss"], rel=1e-6) and norm == line["grad_norm"]

    folders = [tmp_path / "out" / "checkpoints" / f"step-{step:08d}" for step in (5, 6, 7)]
    tensors = [load_file(folder / "rank-00000.safetensors") for folder in folders]
    same = [all((a[name] == b[name]).all() for name in a) for a, b in pairwise(tensors)]
    assert same == [True, False]  # weights and the optimizer's state


def test_it_is_refused_where_deepspeed_steps_by_itself(monkeypatch):
    guarded = TrainOptions(spike_threshold=6)
    assert spike_problems(guarded) == []
    monkeypatch.setattr(bad_steps_module, "engine", lambda: "deepspeed")
    monkeypatch.setattr(bad_steps_module, "strategy", lambda: "zero2")
    assert spike_problems(guarded) == [
        "spike_threshold: under zero2 DeepSpeed steps inside the backward pass, before anybody knows the norm of the "
        "gradient, so no spike can be skipped; remove it, or use ddp.yaml or fsdp2.yaml."
    ]
    assert spike_problems(TrainOptions()) == []
