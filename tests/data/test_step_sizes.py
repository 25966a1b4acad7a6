"""Rows and steps from tokens: the batch warmup, and budgets in tokens, beside sums that are made one step at a time."""

import numpy as np
import pytest
from support import make_rows

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.batches import collate
from accel_llm.data.step_sizes import StepSizes, fill_token_counts, step_sizes
from accel_llm.data.stream import Position, Stream
from accel_llm.errors import ConfigError

CONFIG = ("--config_name", "x", "--train_files", "x.txt")


@pytest.mark.parametrize("full, warmup", [(1, 0), (7, 0), (8, 3), (8, 7), (3, 10), (64, 100), (1, 5)])
def test_rows_grow_in_equal_parts_and_no_row_is_lost(full, warmup):
    sizes = StepSizes(full, warmup)
    rows = [max(1, round(full * (s + 1) / (warmup + 1) + 1e-9)) if s < warmup else full for s in range(200)]
    assert [sizes.rows(step) for step in range(200)] == rows
    ends = np.cumsum(rows).tolist()
    assert [sizes.rows_before(step) for step in range(1, 201)] == ends and sizes.rows_before(0) == 0
    assert rows == sorted(rows)
    for first in (0, 1, warmup, warmup + 3):
        for wanted in (0, 1, full, 5 * full + 1):
            count = next(n for n in range(200) if sum(rows[first : first + n]) >= wanted)
            assert sizes.steps_for(wanted, first) == count


def test_the_plan_of_a_stream_has_as_many_steps_as_its_rows_fill():
    rows = make_rows([(k, [5, 6, 7], [-100, 6, 7]) for k in range(50)])
    words = {"packing": False, "total_batch_size": 8, "per_device_train_batch_size": 2, "max_length": 4}
    options = PretrainOptions(config_name="x", batch_warmup_steps=3, **words)
    met, streams = [], [Stream(rows, options, Position(rank=r, world=1), 0, collate) for r in (0,)]
    plan = streams[0].plan
    assert [plan.rows_in(step) for step in range(5)] == [2, 4, 6, 8, 8] and plan.total_steps == 8
    assert [streams[0].micro_batches_in(step) for step in range(5)] == [1, 2, 3, 4, 4]
    for step in range(plan.total_steps):
        met += [k for micro in range(4) for k in streams[0].row_indices(step, micro, 0)]
    assert sorted(met) == list(range(50))  # each row once, in all slots together

    # From a checkpoint, the same rows in the same steps; another number of processes takes them too.
    later = Stream(rows, options, Position(step=2, rows=plan.rows_at(2)), 0, collate)
    assert later.plan.total_steps == 8
    for step in range(2, 8):
        expected = [k for micro in range(4) for k in streams[0].row_indices(step, micro, 0)]
        assert [k for micro in range(4) for k in later.row_indices(step, micro, 0)] == expected
        two = [Stream(rows, options, Position(rank=r, world=2, step=2, rows=6), 0, collate) for r in range(2)]
        assert [k for m in range(2) for s in two for k in s.row_indices(step, m, s.rank)] == expected


def filled(*words: object) -> PretrainOptions:
    options = parse_options(PretrainOptions, [*CONFIG, *map(str, words)], PretrainOptions.script_defaults)
    fill_token_counts(options)
    return options


def test_tokens_are_counted_in_steps():
    words = ("--max_length", 1024, "--tokens_per_step", "524288", "--lr_scheduler_type", "warmup_stable_decay")
    options = filled(*words, "--max_tokens", "1B", "--warmup_tokens", "10M", "--decay_tokens", "100M")
    assert options.total_batch_size == 512 and step_sizes(options) == StepSizes(512)
    assert options.max_steps == 1908 and options.max_steps * 524_288 >= 10**9 > 1907 * 524_288
    assert (options.warmup_steps, options.decay_steps) == (20, 191)

    # With a batch warmup: more steps for the same tokens, counted one by one.
    options = filled(*words, "--max_tokens", "1e9", "--batch_warmup_tokens", "50M")
    assert options.batch_warmup_steps == 191
    sizes = step_sizes(options)
    assert 49e6 < sizes.rows_before(191) * 1024 < 52e6
    ends = np.cumsum([sizes.rows(step) * 1024 for step in range(3000)])
    assert options.max_steps == int(np.argmax(ends >= 10**9)) + 1 == 2003
    assert "max_steps" not in options.model_fields_set


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--tokens_per_step", 5000), "tokens_per_step: 5000 is no multiple of max_length 2048; give 4096 or 6144."),
        (("--tokens_per_step", 100), "tokens_per_step: 100 is no multiple of max_length 2048; give 2048."),
        (("--tokens_per_step", 4096, "--total_batch_size", 4), "tokens_per_step: 4096 takes the place of "
         "total_batch_size 4; give one of the two."),
        (("--max_tokens", "2M", "--max_steps", 4), "max_tokens: 2000000 takes the place of max_steps 4; give one of "
         "the two."),
        (("--max_tokens", 9999, "--packing", "false"), "max_tokens: 9999 tokens are those of full rows, which only "
         "packing makes; set packing: true, or give steps and rows."),
        (("--decay_tokens", 9999), "decay_tokens: only lr_scheduler_type warmup_stable_decay uses it, but "
         "lr_scheduler_type is cosine; remove it."),
        (("--decay_steps", 3, "--decay_share", 0.5, "--lr_scheduler_type", "warmup_stable_decay"), "decay_share: 0.5 "
         "and decay_steps 3; give one of the two."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(words, sentence):
    with pytest.raises(ConfigError) as error:
        filled(*words)
    assert str(error.value).splitlines() == [sentence]


def test_a_count_that_is_none_is_refused():
    for text in ("1.5", "3.3333k2", "many", "true", "0", "-5"):
        with pytest.raises(ConfigError, match="max_tokens"):
            filled("--max_tokens", text)
    assert filled("--max_tokens", "1_000_000").max_tokens == filled("--max_tokens", "0.001B").max_tokens == 10**6


def test_other_scripts_count_in_rows():
    options = TrainOptions(total_batch_size=4)
    fill_token_counts(options)
    assert step_sizes(options) == StepSizes(4)
