"""The end of a run: its weights are on the disk before the last evaluation, and nothing that fails later loses them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, STEPS, checkpoint_path, equal_tensors, metrics, run_json, saved_steps, spoil, weights
from transformers import GenerationMixin

from accel_llm.errors import ConfigError

EVALUATES = ("--eval_generate", 3, "--eval_share", 0.2)


def fail(*_: Any, **__: Any) -> None:
    raise ValueError("this attention cannot generate")


def eval_steps(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run) if "eval/loss" in line]


@pytest.mark.long
def test_a_last_evaluation_that_fails_loses_nothing_and_is_done_again(train, tmp_path, monkeypatch):
    whole, run = train(tmp_path / "whole", *EVALUATES), tmp_path / "run"
    generate = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", fail)
    reason = (
        "The evaluation after the last step failed (ValueError: this attention cannot generate). The trained model is "
        f"complete in {run / 'adapter'}; the same command evaluates it again."
    )
    for _ in range(2):  # once more from the last checkpoint
        with pytest.raises(RuntimeError) as error:
            train(run, *EVALUATES)
        assert str(error.value) == reason
        facts = run_json(run)
        assert (facts["status"], facts["error"]) == ("failed", f"RuntimeError: {reason}")
        assert facts["exported_step"] == STEPS and facts["export"]["tensors"] == 28
        assert equal_tensors(weights(run), weights(whole)) and STEPS in saved_steps(run)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    train(run, *EVALUATES)
    assert run_json(run)["status"] == "done" and run_json(run)["samples"] == run_json(whole)["samples"]
    assert metrics(run) == metrics(whole) and eval_steps(run) == [STEPS]
    assert equal_tensors(weights(run), weights(whole))


# The program for the next test: a tracker whose package makes the generation get a signal and then hang.
SIGNALLING = """
import os, signal, time
from transformers import GenerationMixin

def generate(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

GenerationMixin.generate = generate
raise ImportError("this tracker is broken")
"""


@pytest.mark.long
def test_a_signal_in_the_last_evaluation_ends_the_run_at_once_and_it_can_go_on(train, tiny, chats, tmp_path):
    """In a process of its own. The tracker fails too, which is a problem of the run but does not end it."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(SIGNALLING, encoding="utf-8")
    run = tmp_path / "run"
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--max_steps", STEPS]
    words += ["--save_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-2, "--output_dir", run, *EVALUATES]
    command = [sys.executable, ROOT / "launch" / "sft.py", *words, "--report_to", "wandb"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    ended = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert (
        "problem: report_to: wandb failed at the start of the run (ImportError: this tracker is broken)" in ended.stdout
    )
    assert ended.stderr.endswith("nothing is lost; run the same command to continue\n")
    facts = run_json(run)
    assert facts["status"] == "preempted" and facts["exported_step"] == STEPS and len(facts["problems"]) == 1
    exported = weights(run)
    train(run, *EVALUATES)
    assert run_json(run)["status"] == "done" and eval_steps(run) == [STEPS] and equal_tensors(weights(run), exported)


@pytest.mark.parametrize("last, step", [(0.5, STEPS), (2.5, 3)])
def test_the_best_so_far_is_exported_until_a_better_last_evaluation_replaces_it(
    train, chats, tmp_path, monkeypatch, last, step
):
    run, seen = tmp_path / "run", []
    losses = iter([2.0, 1.0, last])

    def mean_loss(*_: Any) -> dict[str, float]:
        if eval_steps(run)[-1:] == [4]:
            seen.append((run_json(run)["exported_step"], weights(run)))
        return {"eval/loss": next(losses)}

    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / "run.json").write_text('{"status": "failed"}')
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", mean_loss)
    words = ("--method", "full", "--eval_files", chats, "--save_total_limit", 1)
    losses = iter([2.0, 1.0, last])
    train(run, *words, "--eval_steps", 2, "--metric_for_best_model", "eval/loss")
    assert eval_steps(run) == [2, 4, 6]
    ((before, exported),) = seen
    best = 4
    assert before == best and run_json(run)["exported_step"] == (STEPS if last < 1.0 else best)
    assert saved_steps(run) == ([STEPS] if last < 1.0 else [best, STEPS])
    assert equal_tensors(weights(run), exported) == (last > 1.0)
    # The last evaluation was that of the last weights, and the export has those of its step.
    saved = load_file(checkpoint_path(run, run_json(run)["exported_step"]) / "rank-00000.safetensors")
    assert all(torch.equal(tensor.view(-1), saved[f"{name}|weight|0"]) for name, tensor in weights(run).items())


def test_without_the_best_checkpoint_the_last_weights_are_exported_and_this_is_told(
    train, chats, at_step, tmp_path, monkeypatch, capsys
):
    losses, run = iter([1.0, 2.0, 3.0]), tmp_path / "run"
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", lambda *_: {"eval/loss": next(losses)})
    at_step(STEPS, lambda _: spoil(checkpoint_path(run, 2) / "rank-00000.safetensors", "truncated"))
    words = ("--eval_files", chats, "--eval_steps", 2, "--metric_for_best_model", "eval/loss")
    with pytest.raises(
        ConfigError, match="weights are complete, but something beside the training failed, as said above"
    ):
        train(run, *words)
    assert (
        f"problem: metric_for_best_model: the best checkpoint, {checkpoint_path(run, 2)}, " in capsys.readouterr().out
    )
    facts = run_json(run)
    assert facts["status"] == "done" and facts["exported_step"] == STEPS and len(facts["problems"]) == 1


@pytest.mark.parametrize(
    "values",
    [
        [{"eval/perplexity": 2.0}] * 3,  # the rows do not define the metric
        [{"eval/loss": float("nan")}] * 3,
    ],
)
def test_if_no_evaluation_has_the_metric_the_last_weights_are_exported_and_this_is_told(
    train, chats, tmp_path, monkeypatch, capsys, values
):
    results, run = iter(values), tmp_path / "run"
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", lambda *_: next(results))
    with pytest.raises(ConfigError, match="something beside the training failed, as said above"):
        train(run, "--eval_files", chats, "--eval_steps", 2, "--metric_for_best_model", "eval/loss")
    told = [line for line in capsys.readouterr().out.splitlines() if "metric_for_best_model: " in line]
    begin, end = (
        "metric_for_best_model: the evaluation after step",
        "has no finite eval/loss, so it is not the best one",
    )
    assert told[:3] == [f"{begin} {step} {end}" for step in (2, 4, 6)]
    problem = (
        "metric_for_best_model: no evaluation had a finite eval/loss, so the export has the weights of step 6, the last "
        "ones."
    )
    facts = run_json(run)
    assert told[3:] == [f"problem: {problem}"] and facts["problems"] == [problem]
    assert facts["status"] == "done" and facts["exported_step"] == STEPS


def test_one_evaluation_without_the_metric_leaves_the_best_of_the_others(train, chats, tmp_path, monkeypatch, capsys):
    results, run = iter([{"eval/loss": 1.0}, {"eval/perplexity": 2.0}, {"eval/loss": 2.0}]), tmp_path / "run"
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", lambda *_: next(results))
    train(run, "--eval_files", chats, "--eval_steps", 2, "--metric_for_best_model", "eval/loss")
    assert run_json(run)["exported_step"] == 2 and "problems" not in run_json(run)
    assert "the evaluation after step 4 has no finite eval/loss" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_told_after_everything_else(train, tmp_path, monkeypatch, capsys):
    """A folder in its place, made by the tracker at the last step; the run had removed one that was there before."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(
        "import os, types\nconfig = types.SimpleNamespace(update=lambda *_, **__: None)\n"
        "def init(**_):\n    return types.SimpleNamespace(log=log, finish=lambda: None)\n"
        f"def log(_, step):\n    os.makedirs({str(tmp_path / 'run' / 'report.html')!r}, exist_ok=True)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    with pytest.raises(ConfigError, match="see problems in "):
        train(tmp_path / "run", "--report_to", "wandb")
    monkeypatch.delitem(sys.modules, "wandb")
    printed, facts = capsys.readouterr().out, run_json(tmp_path / "run")
    assert "problem: report.html could not be written (IsADirectoryError: " in printed and "load it:" in printed
    assert facts["status"] == "done" and facts["problems"][0].endswith("; everything else is there.")
    assert len(weights(tmp_path / "run")) == 28 and json.dumps(facts["export"]["logits"]).startswith('{"tokens": 32')
