import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_llm.chat.targets import IGNORED
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.data.packing import Bins, pack, pack_in_order, spread

CORPORA = st.integers(1, 64).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=200), st.just(capacity))
)


def bin_contents(bins) -> list[list[int]]:
    return [bins.order[a:b].tolist() for a, b in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook algorithm, document by document: the space left in each bin."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


@given(CORPORA, st.booleans())
def test_every_document_is_placed_once_as_the_textbook_algorithm_would(corpus, shuffled):
    lengths, capacity = corpus
    bins = pack(np.array(lengths, np.int64), capacity, np.random.default_rng(0) if shuffled else None)
    rows = bin_contents(bins)
    assert sorted(bins.order.tolist()) == list(range(len(lengths)))
    spaces = [capacity - sum(lengths[document] for document in row) for row in rows]
    assert all(rows)
    assert sorted(spaces) == best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [512, 2048, 70_000])
def test_short_documents_fill_the_rows(capacity):
    lengths = np.random.default_rng(1).integers(1, capacity // 16, 30_000)
    bins = pack(lengths, capacity, np.random.default_rng(2))
    assert len(bins.offsets) - 1 <= -(-lengths.sum() // capacity) + 1
    assert np.add.reduceat(lengths[bins.order], bins.offsets[:-1]).max() <= capacity


def test_rng_shuffles_documents_and_rows_and_nothing_else():
    lengths = np.random.default_rng(3).integers(1, 100, 1000)
    plain, first, again, second = (
        pack(lengths, 128, rng)
        for rng in (None, np.random.default_rng(4), np.random.default_rng(4), np.random.default_rng(5))
    )
    assert np.array_equal(first.order, again.order) and np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.order, second.order)

    def contents(bins):
        return sorted(tuple(sorted(lengths[row])) for row in bin_contents(bins))

    assert contents(plain) == contents(first) == contents(second)
    assert {frozenset(row) for row in bin_contents(first)} != {frozenset(row) for row in bin_contents(second)}
    assert [tuple(lengths[row]) for row in bin_contents(plain)] != [tuple(lengths[row]) for row in bin_contents(first)]


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3]])
def test_a_length_that_fits_no_row_is_refused(lengths):
    with pytest.raises(ValueError, match="capacity=8"):
        pack(np.array(lengths), 8)


def test_a_list_of_lengths_is_packed_like_an_array():
    for function in (pack, pack_in_order):
        from_list, from_array = function([3, 5, 8, 2], 8), function(np.array([3, 5, 8, 2]), 8)
        assert bin_contents(from_list) == bin_contents(from_array) and from_list.order.dtype == from_array.order.dtype


def test_nothing_to_pack():
    assert pack([], 8).offsets.tolist() == [0]
    bins = pack(np.array([], np.int64), 8, np.random.default_rng(0))
    assert bins.order.tolist() == [] and bins.offsets.tolist() == [0]


ROWS = [
    (np.array([5, 6, 7]), np.array([5, IGNORED, 7])),
    (np.array([8]), np.array([8])),
    (np.array([9, 10]), np.array([IGNORED, 10])),
]


def test_packed_batch():
    batch = collate_packed(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, IGNORED, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 3 and batch["lengths"] == [3, 1, 2]
    assert ROWS[0][1].tolist() == [5, IGNORED, 7], "the caller's labels are untouched"


def test_padded_batch():
    batch = collate_padded(ROWS, pad_token_id=7)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 7, 7], [9, 10, 7]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, IGNORED, IGNORED], [IGNORED, 10, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["lengths"] == [3, 1, 2]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_says_where_its_targets_are_and_what_they_weigh(packed, weighted):
    """Compared with what is read off the shifted labels themselves, one by one."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, 4)
        rows = [(np.arange(n), np.where(rng.random(n) < 0.3, np.arange(n) + 3, IGNORED)) for n in lengths]
        weights = [rng.random(n).astype(np.float32) for n in lengths] if weighted else None
        batch = collate_packed(rows, weights) if packed else collate_padded(rows, 0, weights)
        labels, found, columns, total = batch["labels"], [], set(), 0.0
        for row in range(labels.shape[0]):
            for column in range(labels.shape[1] - 1):
                if labels[row, column + 1] != IGNORED:
                    found.append(row * labels.shape[1] + column)
                    columns.add(column)
                    total += float(batch["weights"][row, column + 1]) if weighted else 1
        assert batch["target_positions"].tolist() == found and batch["num_targets"] == len(found)
        assert batch["target_columns"].tolist() == (sorted(columns) or [0])
        assert batch["total_weight"] == pytest.approx(total, rel=1e-12)
        # The first token of a document is never one of them.
        assert len(found) == sum(int((row_labels[1:] != IGNORED).sum()) for _, row_labels in rows)


def means_of_rows(lengths: np.ndarray, bins: Bins) -> np.ndarray:
    return np.add.reduceat(lengths[bins.order], bins.offsets[:-1]) / np.diff(bins.offsets)


@pytest.mark.parametrize("capacity", [128, 512])
def test_spread_rows_have_documents_of_all_lengths_and_about_as_many_tokens(capacity):
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 13, 20_000) + 2, capacity)
    spread_out, best_fit = (fill(lengths, capacity, np.random.default_rng(1)) for fill in (spread, pack))
    assert sorted(spread_out.order.tolist()) == list(range(len(lengths)))
    tokens = np.add.reduceat(lengths[spread_out.order], spread_out.offsets[:-1])
    assert tokens.max() <= capacity and tokens.min() > 0.95 * capacity
    assert len(spread_out.offsets) <= 1.02 * len(best_fit.offsets)
    # The mean length of a row says little about the row; with best fit it says nearly all.
    assert means_of_rows(lengths, spread_out).std() < 0.2 * means_of_rows(lengths, best_fit).std()


def test_spread_draws_the_rows_anew_but_not_their_number():
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    first, second = (spread(lengths, 64, np.random.default_rng(seed)) for seed in (1, 2))
    assert len(first.offsets) == len(second.offsets) and first.order.tolist() != second.order.tolist()
    again = spread(lengths, 64, np.random.default_rng(1))
    assert again.order.tolist() == first.order.tolist() and again.offsets.tolist() == first.offsets.tolist()
    plain = spread(lengths, 64)
    assert plain.order.tolist() == spread(lengths, 64).order.tolist()


def test_spread_of_few_or_long_documents():
    assert spread([], 8).offsets.tolist() == [0]
    assert [len(spread([n] * 3, 8).offsets) - 1 for n in (8, 5, 4, 2)] == [3, 3, 2, 1]
    with pytest.raises(ValueError, match=r"lengths run from 3 to 9, allowed are 1 to capacity=8"):
        spread([3, 9], 8)
