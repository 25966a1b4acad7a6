"""A run stops after `early_stopping_patience` evaluations without a new best, at the same step after any interruption."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Stopped, equal_tensors, metrics, run_json, saved_steps, weights

from accel_llm.adapters.saved import save_adapter
from accel_llm.errors import ConfigError
from accel_llm.system.signals import Preempted, handle_signal
from accel_llm.training import evaluation as module

# Evaluated after each of 12 steps. The best evaluation is that of step 3, and the third one after it that of step 6.
LOSSES = dict(enumerate([3.0, 2.0, 1.0, 1.5, math.inf, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], start=1))
REASON = "stopped after step 6 of 12: 3 evaluations in a row had no better eval/loss than 1 of step 3"


class Patient:
    """Runs with evaluations that give LOSSES; `at` calls a function within the next evaluation of a step."""

    def __init__(self, train: Callable[..., Path], chats: Path, monkeypatch: pytest.MonkeyPatch):
        self.train, self.chats, self.at = train, chats, {}
        original = module.Evaluation.run

        def run(evaluation: Any, model: Any, meter: Any, step: int) -> None:
            def measure(*_: Any) -> dict[str, float]:
                self.at.pop(step, lambda: None)()
                return {"eval/loss": LOSSES[step]}

            evaluation.measure = measure
            original(evaluation, model, meter, step)

        monkeypatch.setattr(module.Evaluation, "run", run)

    def run(self, folder: Path, *more: object) -> Path:
        words = ("--eval_files", self.chats, "--eval_steps", 1, "--metric_for_best_model", "eval/loss")
        words += ("--early_stopping_patience", 3, "--save_total_limit", 1, "--logging_steps", 4, "--max_steps", 12)
        words += ("--save_steps", 5, "--lora_dropout", 0.1, "--lr_scheduler_type", "linear", "--warmup_steps", 0)
        return self.train(folder, *words, *more)


@pytest.fixture
def patient(train, chats, monkeypatch) -> Patient:
    return Patient(train, chats, monkeypatch)


def test_a_run_stops_early_and_exports_the_best(patient, tmp_path, capsys):
    run = patient.run(tmp_path / "run")
    facts, lines = run_json(run), metrics(run)
    assert saved_steps(run) == [3, 6]
    assert (facts["status"], facts["exported_step"], facts["early_stopping"]) == ("done", 3, REASON)
    assert f"early stopping: {REASON}; the learning rate followed the schedule of 12 steps" in capsys.readouterr().out
    assert f"| early stopping | {REASON} |" in (run / "adapter" / "README.md").read_text()
    # Loss and evaluation of each step up to the last one, whenever that is; and the rates of a run of 12 steps.
    assert [line["step"] for line in lines if "eval/loss" in line] == [1, 2, 3, 4, 5, 6]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([1e-2 * (12 - k) / 12 for k in range(6)])
    with pytest.raises(ConfigError, match="holds a finished run"):
        patient.run(tmp_path / "run")


def end_after(step: int) -> Callable[..., None]:
    return lambda patient, interrupt, _: interrupt(step)


def interrupt_evaluation(step: int) -> Callable[..., None]:
    def ask() -> None:
        handle_signal(15)
        raise module.EvaluationInterrupted

    return lambda patient, *_: patient.at.update({step: ask})


def signal_at_the_end(patient: Patient, *_: Any) -> None:
    patient.at[6] = lambda: handle_signal(15)


def fail_in_the_export(patient: Patient, _: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = iter([1])

    def fail_once(*arguments: Any) -> None:
        if next(exports, 0):
            raise Stopped
        save_adapter(*arguments)

    monkeypatch.setattr("accel_llm.training.export.save_adapter", fail_once)


INTERRUPTIONS = [end_after(3), end_after(5), interrupt_evaluation(5), interrupt_evaluation(6)]
INTERRUPTIONS += [signal_at_the_end, fail_in_the_export]


# The interrupted evaluation of step 3 is the best one, and only the resumed run knows it.
@pytest.mark.parametrize(
    "interruptions", [[interrupt_evaluation(3)], pytest.param(INTERRUPTIONS, marks=pytest.mark.long)]
)
def test_an_interrupted_run_stops_at_the_same_step(patient, interrupt, tmp_path, monkeypatch, interruptions):
    whole = patient.run(tmp_path / "whole")
    for k, interruption in enumerate(interruptions):
        interruption(patient, interrupt, monkeypatch)
        with pytest.raises((Stopped, Preempted)):
            patient.run(tmp_path / str(k))
        parts = patient.run(tmp_path / str(k))
        facts = run_json(parts)
        assert (facts["status"], facts["exported_step"], facts["early_stopping"]) == ("done", 3, REASON)
        assert metrics(parts) == metrics(whole)
        assert equal_tensors(weights(parts), weights(whole))
