"""How often a run evaluates and saves if nobody says it."""

import time

import pytest
from support import metrics, saved_steps

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.errors import ConfigError
from accel_llm.training.intervals import MOST_SECONDS, SaveClock, fill_intervals

MODEL = ["--model_name_or_path", "m", "--train_files", "t", "--eval_files", "e"]


@pytest.mark.parametrize(("total", "steps"), [(1, 10), (10, 10), (100, 10), (101, 11), (5_000, 500), (5_001, 501)])
def test_a_kill_costs_a_tenth_of_the_run_or_ten_steps(total, steps):
    options = parse_options(SftOptions, MODEL)
    fill_intervals(options, total)
    assert (options.eval_steps, options.save_steps) == (steps, steps)
    assert not {"eval_steps", "save_steps"} & options.model_fields_set


def test_what_is_given_stays():
    options = parse_options(SftOptions, [*MODEL, "--eval_steps", "0", "--save_steps", "7"])
    fill_intervals(options, 1000)
    assert (options.eval_steps, options.save_steps) == (0, 7)


def test_slow_steps_are_saved_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ours, given = (SaveClock(parse_options(SftOptions, [*MODEL, *more])) for more in ([], ["--save_steps", "500"]))
    assert not ours.is_due() and MOST_SECONDS == 30 * 60
    now[0] = MOST_SECONDS + 1
    assert ours.is_due() and not given.is_due()


def test_early_stopping_needs_evaluations():
    words = [*MODEL, "--metric_for_best_model", "eval/loss", "--early_stopping_patience", "2"]
    assert parse_options(SftOptions, words).early_stopping_patience == 2
    with pytest.raises(ConfigError, match="counts evaluations during the run, but eval_steps is 0"):
        parse_options(SftOptions, [*words, "--eval_steps", "0"])


def test_a_run_evaluates_and_saves_by_itself(script, tiny, chats, tmp_path):
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--eval_files", chats, "--max_length", 128]
    script("sft", *words, "--max_steps", 23, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache")
    assert [line["step"] for line in metrics(tmp_path / "out") if "eval/loss" in line] == [10, 20, 23]
    assert saved_steps(tmp_path / "out") == [20, 23]  # the newest two


def test_a_run_with_slow_steps_saves_each_of_them(script, tiny, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("accel_llm.training.intervals.MOST_SECONDS", 0)
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--save_total_limit", 9]
    cases = ("clock", [], [1, 2, 3]), ("steps", ["--save_steps", 2], [2, 3]), ("end", ["--save_steps", 0], [3])
    for name, more, saved in cases:
        script("sft", *words, "--max_steps", 3, "--output_dir", tmp_path / name, *more)
        assert saved_steps(tmp_path / name) == saved
