"""Rows go to processes and micro-batches so that none waits long for another: figures on a long-tailed corpus."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_rows

import accel_llm.data.stream as stream_module
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.even_work import deal_rows, work_of
from accel_llm.data.rows import Rows
from accel_llm.data.stream import Position, Stream, is_dealt, padding_share

LENGTH = 2048
WORLD = 8
# What a pair of tokens costs in attention beside what a token costs elsewhere, in models of some widths: per layer and
# token attention computes about 4 * width for each earlier token, the rest 24 * width^2.
COSTS = {width: 1 / (12 * width) for width in (512, 1536, 4096)}


def long_tail(documents: int = 20_000) -> np.ndarray:
    """Tokens of documents: half have at most 150, the mean is 400, and some fill a row alone."""
    return np.minimum(np.random.default_rng(0).lognormal(5, 1.4, documents).astype(int) + 2, LENGTH)


def rows_of(lengths: np.ndarray) -> Rows:
    return make_rows((k, [1] * n, [-100] + [1] * (n - 1)) for k, n in enumerate(lengths.tolist()))


ROWS = rows_of(long_tail())


def step_costs(streams: list[Stream], step: int, pair_cost: float) -> np.ndarray:
    """What each micro-batch of a step costs each process, [micro-batches, processes], from the batches themselves."""
    costs = np.zeros((streams[0].accumulation, len(streams)))
    for micro in range(len(costs)):
        for rank, stream in enumerate(streams):
            batch = stream.micro_batch(step, micro)
            if "cu_seqlens" in batch:
                lengths = np.array(batch["lengths"], float)
            else:
                lengths = np.full(len(batch["lengths"]), batch["input_ids"].shape[1], float)
            costs[micro, rank] = (lengths + pair_cost * lengths**2 / 2).sum()
    return costs


def slowest(costs: list[np.ndarray], each_micro_batch: bool) -> float:
    """How much longer the slowest process takes than the mean. Processes wait after a step, or after each micro-batch."""
    waited = sum(float(each.max(1).sum() if each_micro_batch else each.sum(0).max()) for each in costs)
    return waited / sum(float(each.sum()) / each.shape[1] for each in costs) - 1


def streams(monkeypatch: pytest.MonkeyPatch, rows: Rows = ROWS, **more: Any) -> list[Stream]:
    monkeypatch.setenv("WORLD_SIZE", str(WORLD))
    options = PretrainOptions(**{"config_name": "x", "max_length": LENGTH, "max_steps": 1000} | more)
    return [Stream(rows, options, Position(rank=rank, world=WORLD), 0) for rank in range(WORLD)]


def figures_of(found: list[Stream], pair_cost: float, steps: int = 10) -> tuple[float, float]:
    costs = [step_costs(found, step, pair_cost) for step in range(steps)]
    return slowest(costs, False), slowest(costs, True)


@pytest.mark.parametrize("width", COSTS)
def test_the_slowest_process_is_within_2_percent_of_the_mean(monkeypatch, width):
    """As many rows in a step as the 16 x 4 of a usual setting would give; the control deals row k to process k mod 8."""
    even = figures_of(streams(monkeypatch, gradient_accumulation_steps=16), COSTS[width])
    monkeypatch.setattr(stream_module, "is_dealt", lambda *_: False)
    round_robin = figures_of(streams(monkeypatch, gradient_accumulation_steps=16), COSTS[width])
    print(
        f"width {width}: the slowest of {WORLD} is above the mean by {even[0]:.2%} if they wait after a step, "
        f"{even[1]:.2%} if after each micro-batch; round-robin: {round_robin[0]:.2%} and {round_robin[1]:.2%}"
    )
    assert max(even) < 0.01
    assert round_robin[0] > 4 * even[0] and round_robin[1] > 4 * even[1]


def test_padded_rows_are_even_too_and_have_less_padding(monkeypatch):
    chosen = {"packing": False, "gradient_accumulation_steps": 16, "per_device_train_batch_size": 4}
    even_streams = streams(monkeypatch, **chosen)
    even, share = figures_of(even_streams, COSTS[1536], 6), padding_share(ROWS, even_streams[0].options, 512)
    computed = sum(stream.micro_batch(0, micro)["input_ids"].numel() for stream in even_streams for micro in range(16))
    documents = [k for stream in even_streams for m in range(16) for k in stream.row_indices(0, m, stream.rank)]
    monkeypatch.setattr(stream_module, "is_dealt", lambda *_: False)
    round_robin = figures_of(streams(monkeypatch, **chosen), COSTS[1536], 6)
    share_before = padding_share(ROWS, even_streams[0].options, 512)
    print(
        f"padded: {even[0]:.2%} and {even[1]:.2%} with {share:.1%} padding; round-robin {round_robin[0]:.2%} and "
        f"{round_robin[1]:.2%} with {share_before:.1%}"
    )
    assert even[0] < 0.02 and even[0] < round_robin[0] / 4 and even[1] < round_robin[1] / 4
    assert share < share_before / 3
    # What the plan says of padding is what a step has.
    assert 1 - ROWS.lengths[documents].sum() / computed == pytest.approx(share, abs=0.05)


def test_a_single_row_for_each_process_leaves_nothing_to_deal(monkeypatch):
    """Which rows a step has is not changed: the draw of the rows comes first."""
    single = streams(monkeypatch)
    rows = sorted(k for stream in single for k in stream.row_indices(0, 0, stream.rank))
    monkeypatch.setattr(stream_module, "is_dealt", lambda *_: False)
    assert rows == sorted(k for stream in streams(monkeypatch) for k in stream.row_indices(0, 0, stream.rank))


@given(
    st.lists(st.floats(0, 1e6), min_size=12, max_size=12), st.sampled_from([(1, 3), (2, 3), (4, 3), (3, 2), (12, 1)])
)
@settings(max_examples=80, deadline=None)
def test_every_row_is_dealt_once(work, shape):
    size, processes = shape
    for packed in (True, False):
        dealt = deal_rows(np.array(work), size, processes, packed)
        assert dealt.shape == (12 // (size * processes), processes, size)
        assert sorted(dealt.ravel().tolist()) == list(range(12))


def test_work_counts_tokens_and_pairs():
    assert work_of(np.array([], np.int64), 10) == 0
    assert work_of(np.array([10]), 10) == 12.5
    assert work_of(np.array([5, 5]), 10) == 11.25


def test_preferences_and_labelled_texts_keep_their_order():
    assert is_dealt(PretrainOptions(config_name="x"), 2) and is_dealt(SftOptions(), 8)
    assert not is_dealt(PretrainOptions(config_name="x"), 1)
    assert not any(is_dealt(kind(), 2) for kind in (DpoOptions, KtoOptions, RewardOptions, ClassifyOptions))
