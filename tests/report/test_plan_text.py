"""What a run says before it starts: data, steps, evaluations, checkpoints, settings, and what is odd about them."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from support import make_rows

from accel_llm.config.options import SftOptions, TrainOptions
from accel_llm.data.ledger import Ledger
from accel_llm.data.stream import Position, Stream, TrainingPlan
from accel_llm.report import display, plan_text
from accel_llm.report.plan_text import (
    changed_settings,
    checkpoints_at_once,
    checkpoints_kept,
    describe_evaluations,
    describe_ledger,
    describe_rows,
    describe_saves,
    describe_size,
    describe_steps,
    describe_time,
    plan_warnings,
    show_lost_rows,
)
from accel_llm.training.schedule import build_schedule


@pytest.mark.parametrize(
    ("options", "plan", "sentences"),
    [
        ({"warmup_steps": 200}, (100, 8, 100, 13),
         ["warmup_steps: the warmup lasts to step 200, and the run to step 13; the learning rate reaches 6.5% of its peak, at the last step."]),
        ({"warmup_steps": 12}, (100, 8, 100, 13), []),
        ({"warmup_steps": 200, "lr_scheduler_type": "constant_with_warmup"}, (100, 8, 100, 13),
         ["warmup_steps: the warmup lasts to step 200, and the run to step 13; the learning rate reaches 6.5% of its peak, at the last step."]),
        ({"lr_scheduler_type": "constant"}, (1, 1, 1, 1), []),
        ({"warmup_steps": 0, "num_train_epochs": 1}, (3, 8, 3, 1),
         ["total_batch_size: a step takes 8 rows, but the run has 3; its only step has fewer."]),
        ({"num_train_epochs": 5}, (3, 8, 15, 2),
         ["total_batch_size: a step takes 8 rows, but an epoch has 3; each row is trained 2.67 times in a step on average."]),
        ({"max_steps": 4}, (3, 8, None, 4),
         ["total_batch_size: a step takes 8 rows, but an epoch has 3; each row is trained 2.67 times in a step on average."]),
        ({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 8, "decay_share": 0.5}, (100, 8, 100, 10),
         ["decay_share: after 8 of 10 steps of warmup the decay has 2 steps instead of 5, and the learning rate is never stable."]),
        ({"early_stopping_patience": 3, "eval_steps": 3}, (100, 8, 100, 13), []),
        ({"early_stopping_patience": 4, "eval_steps": 3}, (100, 8, 100, 13),
         ["early_stopping_patience: the run has 4 evaluations before its last step, too few for 4 in a row after a best one; it never stops early."]),
        ({"early_stopping_patience": 3, "eval_steps": 3}, (100, 8, 100, 12),
         ["early_stopping_patience: the run has 3 evaluations before its last step, too few for 3 in a row after a best one; it never stops early."]),
        ({}, (100, 8, 1000, 125), []),
    ],
)  # fmt: skip
def test_a_run_that_is_too_short_for_its_options_is_said(options, plan, sentences):
    assert plan_warnings(SftOptions(**options), TrainingPlan(*plan)) == sentences


def test_the_plan_says_how_full_packed_rows_are_or_how_much_is_padding():
    rows = make_rows((k, [9] * n, [-100] + [9] * (n - 1)) for k, n in enumerate([2, 4, 6, 8]))
    plan = TrainingPlan(4, 2, 4, 2)
    values = {"max_length": 10, "order": "source", "per_device_train_batch_size": 2}
    assert describe_rows(rows, TrainingPlan(2, 2, 2, 1), TrainOptions(**values)) == (
        "4 documents, 20 tokens (16 trained) in 2 rows of at most 10 (100.0% full)"
    )
    assert describe_rows(rows, plan, TrainOptions(**values, packing=None)) == (
        "4 documents, 20 tokens (16 trained) in 4 rows of at most 10 (padding: 16.7% of the tokens that are computed)"
    )
    texts = replace(rows, targets=np.zeros((4, 1), np.float32))  # of a classifier: no token is trained
    assert describe_rows(texts, plan, TrainOptions(**values, packing=None)).startswith("4 texts, 20 tokens in 4 rows")


def test_pairs_count_a_prompt_that_they_share_once():
    rows = make_rows([(0, [9] * 5, [-100, -100, 9, 9, 9]), (0, [9] * 4, [-100, -100, 9, 9])])
    pairs = replace(rows, shared=np.array([2, 2], np.int32), margin=np.zeros(2, np.float32))
    assert describe_rows(pairs, TrainingPlan(1, 1, 1, 1), TrainOptions(max_length=10)) == (
        "1 pair, 7 tokens (5 trained) in 1 row of at most 10 (70.0% full)"
    )


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (TrainingPlan(10, 2, 30, 15), "15 of 2 rows each, 3 epochs"),
        (TrainingPlan(10, 1, 10, 10), "10 of 1 row each, 1 epoch"),
        (TrainingPlan(10, 2, None, 13), "13 of 2 rows each, 2.6 epochs, as max_steps says"),
        # Continued at step 4 with another number of rows in a step: 8 rows are done, 22 are left.
        (TrainingPlan(10, 11, 30, 6, first_step=4, first_row=8), "2 left after step 4, of 6 of 11 rows each, 3 epochs"),
    ],
)
def test_steps_and_epochs_are_counted(plan, sentence):
    assert describe_steps(plan) == sentence


@pytest.mark.parametrize(
    ("options", "plan", "evaluations", "checkpoints", "kept", "at_once"),
    [
        ({}, (100, 1, 100, 100), "1: at the end, on 5 rows", "1: at the end; the newest one kept", 1, 1),
        (
            {"eval_steps": 20, "save_steps": 50, "eval_on_start": True},
            (100, 1, 100, 100),
            "6: before the first step, every 20 steps and at the end, on 5 rows",
            "2: after step 50 and at the end; the newest 2 kept",
            2,
            2,
        ),
        (
            {"eval_steps": 30, "save_steps": 30, "eval_generate": 8},
            (100, 1, 100, 100),
            "4: every 30 steps and at the end, on 5 rows, with 5 generated answers",
            "4: every 30 steps and at the end; the newest 2 kept",
            2,
            3,
        ),
        (
            {"eval_steps": 30, "save_steps": 60, "metric_for_best_model": "eval/loss", "early_stopping_patience": 2},
            (100, 1, 100, 100),
            "4: every 30 steps and at the end, on 5 rows; 2 in a row without a new best stop the run",
            "2 or more: at each new best, after step 60 and at the end; the newest 2 and the best one kept",
            3,
            4,
        ),
        ({"eval_steps": 200, "save_steps": 200}, (100, 1, 100, 100), "1: at the end, on 5 rows",
         "1: at the end; the newest one kept", 1, 1),
        # Continued after step 60.
        ({"eval_steps": 20, "save_steps": 20}, (100, 1, 100, 100, 60, 60), "2: after step 80 and at the end, on 5 rows",
         "2: after step 80 and at the end; the newest 2 kept", 2, 2),
    ],
)  # fmt: skip
def test_evaluations_and_checkpoints_are_those_of_the_loop(options, plan, evaluations, checkpoints, kept, at_once):
    options, plan = TrainOptions(**options), TrainingPlan(*plan)
    assert describe_evaluations(plan, options, 5) == evaluations
    assert describe_saves(plan, options) == checkpoints
    assert (checkpoints_kept(plan, options), checkpoints_at_once(plan, options)) == (kept, at_once)
    # The oracle: every step is tried, as the loop does.
    steps = range(plan.first_step + 1, plan.total_steps + 1)
    due = [s for s in steps if options.eval_steps and s % options.eval_steps == 0 and s != plan.total_steps]
    assert int(evaluations.split(":")[0]) == len(due) + 1 + (options.eval_on_start and not plan.first_step)
    assert describe_evaluations(plan, options, 0).startswith("none: ")


def test_settings_that_differ_are_listed_and_no_others(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    options = SftOptions(
        method="lora", max_length=128, packing=False, dry_run=True, seed=42, run_name="0123456789abcdef of mine",
        lora_target_modules=["q_proj", "v_proj"], train_files=["a.jsonl"],
    )  # fmt: skip
    assert changed_settings(options).replace("\N{NO-BREAK SPACE}", " ") == (
        "run_name=*** of mine, lora_target_modules=q_proj v_proj, max_length=128, packing=none"
    )
    assert changed_settings(SftOptions()) == "all as by default"
    assert (
        changed_settings(SftOptions(learning_rate=1e-4, num_train_epochs=3))
        == "num_train_epochs=3, learning_rate=0.0001"
    )


def lossy_ledger() -> Ledger:
    ledger = Ledger()
    ledger.read("good.jsonl", rows=1200, supervised=60, context=40)
    ledger.count("good.jsonl", "trained", rows=1100, supervised=55, context=38)
    ledger.count("good.jsonl", "held out", rows=100, supervised=5, context=2)
    ledger.read("bad.jsonl", rows=2, supervised=9)
    ledger.count("bad.jsonl", "trained", rows=1, supervised=9)
    ledger.count("bad.jsonl", "dropped: broken row", rows=1)
    ledger.note("The template closes no turn.")
    return ledger


def test_a_source_without_losses_is_a_few_words_and_others_keep_their_table(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=screen, width=200, highlight=False))
    ledger = lossy_ledger()
    show_lost_rows(ledger)
    printed = screen.getvalue()
    assert "bad.jsonl" in printed and "dropped: broken row" in printed and "good.jsonl" not in printed
    assert printed.endswith("The template closes no turn.\n")
    sentence = describe_ledger(ledger).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == "good.jsonl: 1,200 rows (1,100 trained, 100 held out); and 1 source with losses, above"
    del ledger.inputs["bad.jsonl"], ledger.bins["bad.jsonl"]
    assert describe_ledger(ledger).endswith("; nothing lost")
    screen.truncate(0)
    show_lost_rows(ledger)
    assert "Ledger" not in screen.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_lines_are_wrapped_beside_their_names_on_a_terminal_alone(monkeypatch, width):
    lines = [("model", "word " * 40), ("settings", "a=1, b=2\N{NO-BREAK SPACE}3")]
    screen = io.StringIO()
    monkeypatch.setattr(plan_text, "console", Console(file=screen, width=width, force_terminal=True, color_system=None))
    plan_text.show_lines(lines)
    printed = screen.getvalue().splitlines()
    assert max(map(len, printed)) <= width and len(printed) == -(-199 // (width - 10)) + 1
    assert printed[0].startswith("model     word") and printed[1].startswith(" " * 10 + "word")
    assert printed[-1] == "settings  a=1, b=2 3"
    screen = io.StringIO()
    monkeypatch.setattr(plan_text, "console", Console(file=screen, width=width))
    plan_text.show_lines(lines)
    assert len(screen.getvalue().splitlines()) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (12.3, "12 s"), (99, "99 s"), (240, "4 min"), (7380, "2 h 3 min"), (400_000, "4 days 15 h")],
)
def test_times_are_read_at_a_glance(seconds, text):
    assert describe_time(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(900, "0.9 kB"), (5 * 2**20, "5.0 MB"), (2**30, "1.0 GB"), (141 * 2**30, "141 GB")]
)
def test_sizes_are_in_gigabytes_as_those_of_gpus(size, text):
    assert describe_size(size) == text


def test_what_the_warnings_say_is_what_the_run_does():
    """The rows of the stream and the factor of the schedule, not the formulas of the warnings again."""
    options = SftOptions(max_steps=4, total_batch_size=8, warmup_steps=200, train_files=["a"])
    stream = Stream(make_rows((1, [9] * 2000, [-100] + [9] * 1999) for _ in range(3)), options, Position(), 0)
    repeats = Counter(k for micro in range(8) for k in stream.row_indices(0, micro, 0))
    assert sum(repeats.values()) / 3 == pytest.approx(8 / 3) and set(repeats.values()) == {2, 3}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peak = build_schedule(optimizer, options, 4).lr_lambdas[0](3)
    first, second = plan_warnings(options, stream.plan)
    assert "an epoch has 3; each row is trained 2.67 times" in first and f"reaches {peak:.1%} of its peak" in second
