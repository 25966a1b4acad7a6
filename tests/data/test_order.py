"""The order of rows is a pure function of seed and epoch; a mix keeps every row, and its shares follow the weights."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from accel_llm.config.options import TrainOptions
from accel_llm.data.order import GROUP_ROWS, arrange_epoch, mix_sources
from accel_llm.data.packing import pack_in_order

LENGTHS = np.random.default_rng(3).integers(1, 17, 200)
ROWS = np.arange(200)


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"max_length": 16, **changes})


def bins(epoch: int, **changes: Any) -> list[list[int]]:
    result = arrange_epoch(ROWS, LENGTHS, options(**changes), epoch)
    return [part.tolist() for part in np.split(result.order, result.offsets[1:-1])]


@pytest.mark.parametrize("packing", ["per_epoch", "static", None])
@pytest.mark.parametrize("order", ["shuffle", "length", "source"])
def test_every_row_is_there_once_and_no_bin_is_too_long(order, packing):
    for epoch in range(3):
        parts = bins(epoch, order=order, packing=packing)
        assert sorted(row for part in parts for row in part) == ROWS.tolist()
        assert max(sum(LENGTHS[part]) for part in parts) <= 16 and all(parts)
        assert len(parts) == len(bins(0, order=order, packing=packing))
        assert parts == bins(epoch, order=order, packing=packing)
        if packing is None:
            assert {len(part) for part in parts} == {1}


def test_per_epoch_packs_anew_and_static_only_reorders():
    anew, static = ([bins(epoch, packing=packing) for epoch in range(3)] for packing in ("per_epoch", "static"))
    as_sets = [[set(map(frozenset, epoch)) for epoch in run] for run in (anew, static)]
    assert len(as_sets[0][0] & as_sets[0][1]) < len(as_sets[0][0]) / 2
    assert as_sets[1][0] == as_sets[1][1] == as_sets[1][2]
    assert static[0] != static[1] != static[2]
    assert anew[0] == static[0]


def test_seeds_differ():
    for packing in ("per_epoch", "static", None):
        assert bins(0, packing=packing, seed=1) != bins(0, packing=packing, seed=2)
    assert grouped(ROWS, LENGTHS, 0, seed=1) != grouped(ROWS, LENGTHS, 0, seed=2)


def test_the_shortest_first_and_the_order_of_the_sources():
    by_length = [row for part in bins(5, order="length") for row in part]
    assert LENGTHS[by_length].tolist() == sorted(LENGTHS.tolist())
    equal = LENGTHS[by_length][:-1] == LENGTHS[by_length][1:]
    assert (np.diff(by_length)[equal] > 0).all()
    for packing in ("per_epoch", None):
        assert [row for part in bins(5, order="source", packing=packing) for row in part] == ROWS.tolist()


def grouped(rows: np.ndarray, lengths: np.ndarray, epoch: int, **changes: Any) -> list[int]:
    changes = {"order": "group_by_length", **changes}
    result = arrange_epoch(rows, lengths, options(packing=None, **changes), epoch)
    assert result.offsets.tolist() == list(range(len(rows) + 1))
    return result.order.tolist()


# A long tail: the middle length is 55, the mean 89, the longest 2,790.
LONG_TAIL = np.random.default_rng(1).lognormal(4, 1, 20_000).astype(np.int64) + 1


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200, 1000, 20_000])
def test_groups_of_similar_length_have_every_row_once(count):
    rows, lengths = np.arange(count), LONG_TAIL[:count]
    epochs = [grouped(rows, lengths, epoch) for epoch in range(4)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert [grouped(rows, lengths, epoch) for epoch in (3, 2, 1, 0)] == epochs[::-1]
    # How many rows are a step, or a batch of a process, changes nothing.
    assert grouped(rows, lengths, 1, per_device_train_batch_size=4, total_batch_size=12) == epochs[1]
    if count > 2:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_rows_that_a_weight_repeats_stay_repeated():
    rows = mix_sources(np.repeat([0, 1], [300, 20]), [1.0, 1.0], 0)
    assert sorted(grouped(rows, LONG_TAIL, 0)) == sorted(rows.tolist())
    assert np.bincount(rows, minlength=320)[300:].tolist() == [15] * 20


def padding_share(order: list[int], lengths: np.ndarray, size: int) -> float:
    """The share of padding in batches of `size` rows, batch by batch."""
    batches = [lengths[order[k : k + size]] for k in range(0, len(order), size)]
    return 1 - lengths[order].sum() / sum(int(batch.max()) * len(batch) for batch in batches)


@pytest.mark.parametrize("count, most", [(20_000, [0.04, 0.08, 0.15, 0.3]), (2_000, [0.12, 0.25, 0.4, 0.6])])
def test_groups_need_far_less_padding_and_no_more_than_those_of_transformers(count, most):
    rows, lengths = np.arange(count), LONG_TAIL[:count]
    for size, limit in zip((8, 16, 32, 64), most, strict=True):
        plain, in_groups = (
            padding_share([k for epoch in range(3) for k in grouped(rows, lengths, epoch, order=order)], lengths, size)
            for order in ("shuffle", "group_by_length")
        )
        theirs = get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(0))
        other = padding_share(theirs, lengths, size)
        print(
            f"{count:,} rows, batches of {size}: {plain:.1%} padding shuffled, {in_groups:.1%} in groups, {other:.1%} by "
            "transformers"
        )
        assert in_groups < limit < plain and in_groups < other


@pytest.mark.parametrize("count", [20_000, 1_001])
def test_groups_begin_at_multiples_of_their_size_in_all_epochs_together(count):
    """Each group has rows of one window, so what it spans is little beside what all rows span."""
    rows, lengths = np.arange(count), np.arange(count)  # all lengths differ
    order = np.array([row for epoch in range(5) for row in grouped(rows, lengths, epoch)])
    inside = [k for k in range(0, len(order) - GROUP_ROWS, GROUP_ROWS) if k // count == (k + GROUP_ROWS - 1) // count]
    spans = [np.ptp(order[k : k + GROUP_ROWS]) for k in inside]
    shifted = [np.ptp(order[k + 32 : k + 96]) for k in inside]
    assert np.median(spans) * 1.3 < np.median(shifted)
    # A half of a group, and a half of that, has neighbors in length; and neither half is always the shorter one.
    parts = [order[k : k + GROUP_ROWS].reshape(-1, 2, 8).mean(2) for k in inside]
    assert 0.3 < np.mean([part[:, 0] < part[:, 1] for part in parts]) < 0.7
    for k in inside[:50]:
        for size in (8, 16, 32):
            blocks = order[k : k + GROUP_ROWS].reshape(-1, size)
            borders = sorted((block.min(), block.max()) for block in blocks)
            assert all(one[1] < other[0] for one, other in pairwise(borders))


def test_the_order_of_groups_is_random():
    """Rows that are together in one epoch are seldom together in the next, and no part of an epoch has longer rows."""
    rows = np.arange(20_000)
    first, second = (np.array(grouped(rows, LONG_TAIL, epoch)) for epoch in range(2))
    place = np.empty(len(rows), np.int64)
    place[second] = (np.arange(len(rows)) + len(rows)) // GROUP_ROWS
    group = first[GROUP_ROWS : 2 * GROUP_ROWS]
    assert max(np.bincount(place[group])) < GROUP_ROWS / 2
    quarters = [LONG_TAIL[part].mean() for part in np.split(first, 4)]
    assert max(quarters) < 1.5 * min(quarters)


def test_packed_rows_need_no_groups():
    sentence = (
        "order: group_by_length saves padding, but packed rows need none; set packing: false, or leave order out."
    )
    assert sentence in options(order="group_by_length").problems()
    assert sentence not in options(order="group_by_length", packing=False).problems()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40))
def test_packing_in_order_fills_a_row_until_the_next_does_not_fit(lengths):
    result = pack_in_order(np.array(lengths, np.int64), 12)
    expected: list[list[int]] = []
    for row, length in enumerate(lengths):
        if not expected or sum(lengths[k] for k in expected[-1]) + length > 12:
            expected.append([])
        expected[-1].append(row)
    ends = result.offsets.tolist()
    assert [list(range(a, b)) for a, b in pairwise(ends)] == expected
    assert result.order.tolist() == list(range(len(lengths)))


def test_packing_in_order_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="lengths run from 3 to 13, allowed are 1 to capacity=12"):
        pack_in_order(np.array([3, 13]), 12)


def test_without_weights_every_row_comes_once():
    source = np.array([0, 0, 1])
    assert mix_sources(source, [], 0).tolist() == mix_sources(source, [None, None], 0).tolist() == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 20)), min_size=1, max_size=4), st.integers(0, 5))
def test_shares_are_as_the_weights_and_no_row_is_left_out(sources, seed):
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    source = np.repeat(np.arange(len(counts)), counts)
    drawn = mix_sources(source, weights, seed)
    times = np.bincount(drawn, minlength=len(source))
    assert times.min() >= 1
    for number, count in enumerate(counts):
        of_source = times[source == number]
        assert of_source.max() - of_source.min() <= 1
        expected = weights[number] * max(c / w for c, w in zip(counts, weights, strict=True))
        assert abs(of_source.sum() - expected) <= 1 and of_source.sum() >= count
    assert drawn.tolist() == mix_sources(source, weights, seed).tolist()
