"""Pretraining that is resumed: with another end, from the stable part; with its batch warmup, its guard and its samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Stopped, checkpoint_path, equal_tensors, metrics, run_json, weights

from accel_llm.errors import ConfigError
from accel_llm.training import bad_steps as bad_steps_module

Pretrain = Callable[..., Path]
STABLE = ("--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", 2)


@pytest.fixture
def pretrain(script, tiny, tmp_path) -> Pretrain:
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"Number {k} is followed by {k + 1}, and {k * k} is its square."}) for k in range(80)]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(folder: Path, *more: object) -> Path:
        words = ("--model_name_or_path", tiny, "--train_files", texts, "--output_dir", folder, "--max_length", 64)
        steps = ("--tokens_per_step", 256, "--learning_rate", 1e-2, "--logging_steps", 1)
        script("pretrain", *words, *steps, *more)
        return folder

    return run


def rates(folder: Path) -> list[float]:
    return [line["learning_rate"] for line in metrics(folder) if "learning_rate" in line]


def test_a_decay_may_begin_at_any_checkpoint_of_the_stable_part(pretrain, tmp_path):
    long = pretrain(tmp_path / "long", *STABLE, "--max_steps", 10, "--decay_steps", 3, "--save_steps", 2,
                    "--save_total_limit", 9)  # fmt: skip
    for step, end, more in (
        (4, 6, ("--decay_steps", 2)),  # at the checkpoint itself
        (4, 7, ("--decay_steps", 2)),  # some stable steps later
        (6, 14, ("--decay_share", 0.5)),  # a longer run, with a share
        (4, 6, ("--decay_steps", 2, "--min_lr_rate", 0.3)),
    ):
        name = f"{step}-{end}-{len(more)}"
        whole = pretrain(tmp_path / f"whole-{name}", *STABLE, "--max_steps", end, *more)
        start = ("--resume_from_checkpoint", checkpoint_path(long, step))
        branch = pretrain(tmp_path / f"branch-{name}", *STABLE, "--max_steps", end, *more, *start)
        assert run_json(branch)["status"] == "done" and equal_tensors(weights(branch), weights(whole))
        assert rates(branch) == rates(whole)[step:] and rates(branch)[-1] < 1e-2
    assert not equal_tensors(weights(long), weights(branch))


@pytest.mark.parametrize(
    "step, more",
    [
        (8, ("--max_steps", 9, "--decay_steps", 3)),  # the old decay has begun
        (6, ("--max_steps", 7, "--decay_steps", 3)),  # the new one would have begun
        (6, ("--max_steps", 12, "--decay_steps", 3, "--warmup_steps", 4)),  # another warmup
        (6, ("--max_steps", 12, "--lr_scheduler_type", "cosine")),
    ],
)
def test_an_end_that_would_change_what_was_trained_is_refused(pretrain, tmp_path, step, more):
    long = pretrain(tmp_path / "long", *STABLE, "--max_steps", 10, "--decay_steps", 3, "--save_steps", 2,
                    "--save_total_limit", 9)  # fmt: skip
    start = ("--resume_from_checkpoint", checkpoint_path(long, step))
    with pytest.raises(ConfigError) as error:
        pretrain(tmp_path / "branch", *STABLE, *more, *start)
    sentences = str(error.value).splitlines()
    assert all("was saved with" in sentence for sentence in sentences)
    assert any(sentence.startswith("max_steps: ") for sentence in sentences)
    assert not (tmp_path / "branch").exists()


def test_constant_rates_may_end_in_a_decay(pretrain, tmp_path):
    constant = ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 2)
    first = pretrain(tmp_path / "first", *constant, "--max_steps", 4)
    decay = (*STABLE, "--max_steps", 6, "--decay_steps", 2)
    start = ("--resume_from_checkpoint", checkpoint_path(first, 4))
    branch = pretrain(tmp_path / "branch", *decay, *start)
    assert equal_tensors(weights(branch), weights(pretrain(tmp_path / "whole", *decay)))


def test_a_resumed_run_with_growing_steps_guard_and_samples_is_bit_equal(
    pretrain, interrupt, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bad_steps_module, "SPIKE_WINDOW", 3)
    options = (*STABLE, "--max_steps", 8, "--batch_warmup_steps", 5, "--save_steps", 4, "--eval_share", 0.1)
    options += ("--spike_threshold", 1.0, "--sample_text", "Number 3", "--sample_steps", 2, "--eval_steps", 3)
    whole = pretrain(tmp_path / "whole", *options)
    said = [line.split(" skipped: ")[0] for line in capsys.readouterr().out.splitlines() if " skipped: " in line]
    interrupt(4)
    with pytest.raises(Stopped):
        pretrain(tmp_path / "parts", *options)
    parts = pretrain(tmp_path / "parts", *options)
    assert metrics(parts) == metrics(whole) and equal_tensors(weights(parts), weights(whole))
    answers = [(folder / "answers.jsonl").read_bytes() for folder in (parts, whole)]
    assert answers[0] == answers[1] and [json.loads(line)["step"] for line in answers[0].splitlines()] == [2, 4, 6, 8]
    # The guard has skipped steps, after the interruption too, by what it saw before.
    lines = [line for line in metrics(whole) if "loss" in line]
    assert said and lines[-1]["skipped_steps"] == len(said) > 0
    skipped = [a["step"] for a in lines if "update_ratio" not in a]
    assert [f"step {step}" for step in skipped] == said and max(skipped) > 4
