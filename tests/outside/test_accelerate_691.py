"""accelerate 691: what a person gives as the name of a run becomes the name of the project, and runs get random names.

`init_trackers` takes one name, that of the project. Right is a project for all runs (WANDB_PROJECT, or this program's
name) and the run's name beside it, as in transformers' Trainer.
"""

import pytest

from accel_llm.report.trackers import build_tracker


def test_a_run_has_its_own_name_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tracker = build_tracker("wandb", "lr-3e-4", None)
    assert (tracker.run_name, tracker.init_kwargs) == (
        "accel-llm",
        {"name": "lr-3e-4"},
    )  # Accelerate's word for project
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    assert build_tracker("wandb", "lr-3e-4", None).run_name == "ours"
    assert build_tracker("wandb", None, None).init_kwargs == {}
