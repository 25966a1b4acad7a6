"""Sources mixed by weight take turns: after any number of rows each has given its share of them, within one row."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_rows

from accel_llm.config.fields import Source
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.epochs import Epochs
from accel_llm.data.mixture import LONGEST_PERIOD, Turns, whole_shares
from accel_llm.data.rows import Origin, Rows
from accel_llm.data.stream import Position, Stream

WEIGHTS = st.lists(st.one_of(st.integers(1, 60), st.sampled_from([0.1, 0.25, 1.5, 7.125])), min_size=1, max_size=12)


def largest_difference(order: list[int], weights: list[float]) -> float:
    """How far the number of rows of a source is ever from its share of the rows so far."""
    given_rows = np.cumsum(np.array(order)[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(weights) / sum(weights)
    return float(np.abs(given_rows - np.arange(1, len(order) + 1)[:, None] * shares).max())


def most_lacking_first(weights: list[float], rows: int) -> list[int]:
    """The simple way: the source that lacks most of its share gives the next row."""
    shares, given_rows, order = np.array(weights) / sum(weights), np.zeros(len(weights)), []
    for row in range(1, rows + 1):
        order.append(int(np.argmax(row * shares - given_rows)))
        given_rows[order[-1]] += 1
    return order


@given(WEIGHTS)
@settings(max_examples=150, deadline=None)
def test_after_any_number_of_rows_each_source_is_within_one_row_of_its_share(weights):
    turns = Turns(weights)
    order = [turns.place(row)[0] for row in range(min(2 * turns.period, 4000))]
    assert largest_difference(order, weights) < 1 + 1e-9


def test_the_source_that_lacks_most_first_is_not_enough():
    weights = [6.0, 6.0, 1.0, 1.0, 1.0, 6.0, 1.0]
    assert largest_difference(most_lacking_first(weights, 22), weights) > 1.09
    turns = Turns(weights)
    assert largest_difference([turns.place(row)[0] for row in range(22)], weights) < 1


@given(WEIGHTS, st.integers(0, 10**13))
@settings(max_examples=60, deadline=None)
def test_any_place_is_found_at_once_and_counts_agree(weights, row):
    turns = Turns(weights)
    source, index = turns.place(row)
    before, after = turns.counts(row), turns.counts(row + 1)
    assert before[source] == index and sum(before) == row
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(k == source) for k in range(len(weights))]


def test_proportions_alone_matter_and_long_numbers_are_rounded():
    assert whole_shares([0.7, 0.2, 0.1]) == whole_shares([7, 2, 1]) == whole_shares([70.0, 20, 10]) == [7, 2, 1]
    exact, shares = np.array([0.123456789, 1, 2.718281828]), np.array(whole_shares([0.123456789, 1, 2.718281828]))
    assert shares.sum() <= LONGEST_PERIOD + 3
    assert np.abs(shares / shares.sum() - exact / exact.sum()).max() < 1 / LONGEST_PERIOD


def mixed_rows(sizes: list[int], longest: int = 9) -> Rows:
    """Documents of several sources; document k is the token k + 1, repeated 2 to `longest` times."""
    lengths = np.random.default_rng(7).integers(2, longest + 1, sum(sizes)).tolist()
    rows = make_rows((0, [k + 1] * n, [-100] + [k + 1] * (n - 1)) for k, n in enumerate(lengths))
    origins = tuple(Origin(k, f"{k}.txt") for k in range(len(sizes)))
    return Rows(**{**vars(rows), "origin": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), "origins": origins})


def mixed(rows: Rows, weights: list[float], world: int = 1, rank: int = 0, **more: Any) -> Stream:
    files = [Source(path=f"{k}.txt", weight=weight) for k, weight in enumerate(weights)]
    options = PretrainOptions(config_name="x", train_files=files, max_length=16, **more)
    return Stream(rows, options, Position(rank=rank, world=world), 0)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_the_stream_are_of_one_source_each_and_follow_the_weights(packing):
    rows, weights = mixed_rows([300, 50, 7]), [0.5, 0.3, 0.2]
    stream = mixed(rows, weights, packing=packing, max_steps=1)
    sources = [set(rows.source[stream.documents(position)]) for position in range(2000)]
    assert all(len(each) == 1 for each in sources)
    assert largest_difference([each.pop() for each in sources], weights) < 1
    # Each source is passed through evenly, epoch by epoch.
    met = Counter(k for position in range(2000) for k in stream.documents(position))
    for source in range(3):
        times = [met[k] for k in np.flatnonzero(rows.source == source).tolist()]
        assert max(times) - min(times) <= stream.sequences[source].passes
    epochs = stream.plan.source_epochs(2000)
    counted = [np.mean([met[k] for k in np.flatnonzero(rows.source == source).tolist()]) for source in range(3)]
    assert list(epochs.values()) == pytest.approx(counted, rel=0.02) and list(epochs) == ["0.txt", "1.txt", "2.txt"]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_document_once_at_least(packing):
    rows = mixed_rows([300, 50, 7])
    stream = mixed(rows, [0.5, 0.3, 0.2], packing=packing)
    met = Counter(k for position in range(stream.plan.bins) for k in stream.documents(position))
    assert set(met) == set(range(357)) and min(met.values()) == 1
    with_one_less = Counter(k for position in range(stream.plan.bins - 1) for k in stream.documents(position))
    assert set(with_one_less) < set(met)


def test_a_small_source_fills_its_rows_too():
    """Seven documents alone leave a row half empty; so they are packed as often as an epoch of the mixture needs them."""
    rows = mixed_rows([3000, 7], longest=5)
    stream = mixed(rows, [0.5, 0.5])
    small = [sum(len(rows[k][0]) for k in stream.sequences[1].documents(row)) for row in range(64)]
    assert np.mean(small) / 16 > 0.95 and stream.plan.full is not None and stream.plan.full > 0.95
    first, lengths = Epochs(np.arange(3000, 3007), rows.lengths, stream.options).first_round()
    assert stream.sequences[1].passes > 1 and lengths.sum() / (16 * (len(first.offsets) - 1)) < 0.9


def test_a_source_has_draws_of_its_own():
    rows = mixed_rows([40, 40])
    first, second = mixed(rows, [1, 1], packing=False).sequences
    assert [first.documents(k)[0] for k in range(40)] != [second.documents(k)[0] - 40 for k in range(40)]


@pytest.mark.parametrize("world, size", [(2, 2), (4, 1), (3, 1)])
def test_a_step_has_the_same_rows_on_any_processes(monkeypatch, world, size):
    rows, weights = mixed_rows([300, 50, 7]), [0.5, 0.3, 0.2]
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = mixed(rows, weights, max_steps=9, total_batch_size=12)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    more = {"per_device_train_batch_size": size, "total_batch_size": 12, "max_steps": 9}
    ranks = [mixed(rows, weights, world, rank, **more) for rank in range(world)]
    for step in (0, 5, 1000):
        expected = sorted(k for micro in range(alone.accumulation) for k in alone.row_indices(step, micro, 0))
        dealt = [k for s in ranks for micro in range(s.accumulation) for k in s.row_indices(step, micro, s.rank)]
        assert sorted(dealt) == expected
