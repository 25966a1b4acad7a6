"""accelerate 691: what a person gives as the name of a run becomes the name of the project, and runs get random names.

`init_trackers` takes one name, that of the project. Right is a project for all runs (WANDB_PROJECT, or this program's
name) and the run's name beside it, as in transformers' Trainer.
"""

import pytest

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.report.trackers import build_tracker, new_run

WORDS = ["--model_name_or_path", "m", "--train_files", "t", "--output_dir", "out/first"]


def test_a_run_has_its_own_name_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = new_run("wandb", parse_options(SftOptions, [*WORDS, "--run_name", "lr-3e-4"]))
    tracker = build_tracker("wandb", run, None)
    # Accelerate's word for project is run_name.
    assert (tracker.run_name, tracker.init_kwargs["name"]) == ("accel-llm", "lr-3e-4")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    run = new_run("wandb", parse_options(SftOptions, WORDS))
    tracker = build_tracker("wandb", run, None)
    assert (tracker.run_name, tracker.init_kwargs["name"]) == ("ours", "first")
