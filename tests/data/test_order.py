"""The order of rows is a pure function of seed and epoch; a mix keeps every row, and its shares follow the weights."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_llm.config.options import TrainOptions
from accel_llm.data.order import arrange_epoch, mix_sources
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


def test_the_shortest_first_and_the_order_of_the_sources():
    by_length = [row for part in bins(5, order="length") for row in part]
    assert LENGTHS[by_length].tolist() == sorted(LENGTHS.tolist())
    equal = LENGTHS[by_length][:-1] == LENGTHS[by_length][1:]
    assert (np.diff(by_length)[equal] > 0).all()
    for packing in ("per_epoch", None):
        assert [row for part in bins(5, order="source", packing=packing) for row in part] == ROWS.tolist()


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
