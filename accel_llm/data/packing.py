"""Packing: which documents share a row.

`pack` gives the result of the textbook algorithm, best-fit decreasing. It works on counts of equal lengths for speed
alone and may be replaced by a loop over single documents (`best_fit_decreasing` in tests/data/test_packing.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

AT_ONCE = 1 << 20  # documents whose places are worked out together


class Bins(NamedTuple):
    """Documents grouped into rows: row `b` holds the documents `order[offsets[b]:offsets[b + 1]]`."""

    order: np.ndarray  # int32 [documents] (int64 from 2^31 documents on), document indices
    offsets: np.ndarray  # int64 [bins + 1]


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, rng: np.random.Generator | None = None) -> Bins:
    """Assign documents of `lengths` tokens to rows of at most `capacity` tokens, by best-fit decreasing.

    The time grows with `capacity` and with the number of different lengths, and little with the number of documents;
    beside `lengths` the memory is 12 bytes a document and 24 a row at the peak. `rng`
    shuffles the order of the rows, and which of the documents of one length goes where. `rng` does not
    change the number of rows. Without `rng` equal lengths in equal order give equal rows.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    lengths = _check_lengths(lengths, capacity)
    counts = _count_lengths(lengths, capacity)
    groups = _best_fit(counts, capacity)
    order, sizes = _fill_bins(groups, _sort_by_length(lengths, counts, rng), np.cumsum(counts) - counts)
    return _shuffle_rows(order, sizes, rng)


def spread(lengths: Sequence[int] | np.ndarray, capacity: int, rng: np.random.Generator | None = None) -> Bins:
    """Assign documents to rows of at most `capacity` tokens, so that each row has documents of all lengths.

    Best fit puts many short documents of one length into the same row, and a step of few rows would see that length
    alone. Here the documents are dealt out, the longest first, each to the row with the fewest tokens (Graham 1969,
    "Bounds on Multiprocessing Timing Anomalies"; a quarter of the rows gets one each at once, for speed). So all rows
    have about as many tokens. It takes 1% more rows than best fit for texts that are short beside a row. `rng` as in
    `pack`.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    lengths = _check_lengths(lengths, capacity).astype(np.int64)
    order = _sort_by_length(lengths, _count_lengths(lengths, capacity), rng)[::-1]
    rows = -(-int(lengths.sum()) // capacity)
    while len(order) and np.bincount(row := _deal_out(lengths[order], rows), lengths[order]).max() > capacity:
        rows += max(1, rows // 200)
    if not len(order):
        return Bins(order, np.zeros(1, np.int64))
    return _shuffle_rows(order[np.argsort(row, kind="stable")], np.bincount(row, minlength=rows), rng)


def _deal_out(lengths: np.ndarray, rows: int) -> np.ndarray:
    """Return the row of each document, int64 [documents]; `lengths` are sorted, longest first."""
    row, tokens, at_once = np.empty(len(lengths), np.int64), np.zeros(rows, np.int64), -(-rows // 4)
    for start in range(0, len(lengths), at_once):
        dealt = lengths[start : start + at_once]
        emptiest = np.argsort(tokens, kind="stable")[: len(dealt)]
        row[start : start + at_once] = emptiest
        tokens[emptiest] += dealt
    return row


def shuffle_bins(bins: Bins, rng: np.random.Generator) -> Bins:
    """Return the same rows in another order, which `rng` draws."""
    return _shuffle_rows(bins.order, np.diff(bins.offsets), rng)


def _shuffle_rows(order: np.ndarray, sizes: np.ndarray, rng: np.random.Generator | None) -> Bins:
    """Return rows of so many documents of `order`, shuffled by `rng`."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    if rng is None:
        return Bins(order, offsets)

    # Every document moves with its row; a million at a time, so that their places take little memory.
    shuffle = np.arange(len(sizes), dtype=np.int32 if len(sizes) < 2**31 else np.int64)
    rng.shuffle(shuffle)
    new_offsets = np.concatenate([[0], np.cumsum(sizes[shuffle])])
    moved, first = np.empty_like(order), 0
    while first < len(shuffle):
        stop = max(first + 1, int(np.searchsorted(new_offsets, new_offsets[first] + AT_ONCE, "right")) - 1)
        start, end = int(new_offsets[first]), int(new_offsets[stop])
        shift = np.repeat(offsets[shuffle[first:stop]] - new_offsets[first:stop], sizes[shuffle[first:stop]])
        moved[start:end] = order[np.arange(start, end) + shift]
        first = stop
    return Bins(moved, new_offsets)


def pack_in_order(lengths: Sequence[int] | np.ndarray, capacity: int) -> Bins:
    """Assign documents to rows of at most `capacity` tokens in their order: a row ends when the next one does not fit.

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    lengths = _check_lengths(lengths, capacity).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    offsets = [0]
    while offsets[-1] < len(lengths):
        # The last document that ends within `capacity` tokens from the start of this row.
        offsets.append(int(np.searchsorted(ends, ends[offsets[-1]] + capacity, "right")) - 1)
    return Bins(np.arange(len(lengths)), np.array(offsets, np.int64))


def _check_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """Return `lengths` as an array of integers [documents].

    Raises:
        ValueError: a length is outside 1..capacity.
    """
    lengths = np.asarray(lengths) if len(lengths) else np.zeros(0, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, allowed are 1 to capacity={capacity}")
    return lengths


def _count_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return how many documents have each length, int64 [capacity + 1]."""
    counts = np.zeros(capacity + 1, np.int64)
    for start in range(0, len(lengths), AT_ONCE):
        counts += np.bincount(lengths[start : start + AT_ONCE], minlength=capacity + 1)
    return counts


def _sort_by_length(lengths: np.ndarray, counts: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Return document indices, shortest first; `rng` shuffles documents of equal length.

    It is a counting sort, a million documents at a time: what it needs beside its result is the shuffled indices.
    """
    kind = np.int32 if len(lengths) < 2**31 else np.int64
    indices = np.arange(len(lengths), dtype=kind)
    if rng is not None:
        rng.shuffle(indices)
    result, next_places = np.empty(len(lengths), kind), np.cumsum(counts) - counts
    for start in range(0, len(lengths), AT_ONCE):
        chunk = indices[start : start + AT_ONCE]
        keys = lengths[chunk]
        # numpy sorts 16-bit keys by radix sort, in linear time; larger keys take longer.
        chunk_order = np.argsort(keys.astype(np.uint16) if len(counts) <= 2**16 else keys, kind="stable")
        here = np.bincount(keys, minlength=len(counts))
        # The place of each within those of its length, from where the chunks before have left off.
        shift = next_places - (np.cumsum(here) - here)
        result[np.arange(len(chunk)) + np.repeat(shift, here)] = chunk[chunk_order]
        next_places += here
    return result


def _best_fit(counts: np.ndarray, capacity: int) -> list[tuple[int, tuple]]:
    """Return groups (bins, contents) of bins with equal contents; `counts[n]` is the number of documents of n tokens.

    `contents` is a linked list (length, documents per bin, rest), or () at its end. Best fit puts one document into the
    fullest bin that it fits into. That bin is then also the fullest one for the next document of this length. So a bin
    takes as many of them as fit before the next bin is used, and equal bins can be filled together.
    """
    groups: list[list[tuple[int, tuple]]] = [[] for _ in range(capacity + 1)]  # groups[s]: bins with s tokens left
    spaces = 0  # bit s is set if groups[s] is not empty; the best fit is the lowest bit from `length` upwards
    for length in np.flatnonzero(counts)[::-1].tolist():
        documents = int(counts[length])
        while documents:
            # Take the fullest bins with room for this length, or open as many new bins as the documents fill.
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            per_bin = min(space // length, documents)
            bins, contents = groups[space].pop() if fitting else (documents // per_bin, ())

            # Fill as many of them as there are documents for, and put the other bins back.
            filled = min(bins, documents // per_bin)
            if filled < bins:
                groups[space].append((bins - filled, contents))
            elif fitting and not groups[space]:
                spaces ^= 1 << space
            groups[space - per_bin * length].append((filled, (length, per_bin, contents)))
            spaces |= 1 << (space - per_bin * length)
            documents -= filled * per_bin
    return [group for same_space in groups for group in same_space]


def _fill_bins(
    groups: list[tuple[int, tuple]], by_length: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the document indices bin after bin, int64 [documents], and the documents in each bin, int64 [bins].

    `by_length` are document indices sorted by length; those of length n begin at `starts[n]`.
    """
    order = np.empty_like(by_length)
    next_documents = starts.tolist()  # for each length: where its first unused document stands in by_length
    sizes, end = [], 0
    for bins, contents in groups:
        # The linked list of this group's contents, as (length, documents per bin).
        items = []
        while contents:
            length, per_bin, contents = contents
            items.append((length, per_bin))
        size = sum(per_bin for _, per_bin in items)

        # All bins of the group at once: a row of `block` is a bin, and each item fills some columns of it.
        block = order[end : end + bins * size].reshape(bins, size)
        column = 0
        for length, per_bin in items:
            first = next_documents[length]
            next_documents[length] = first + bins * per_bin
            block[:, column : column + per_bin] = by_length[first : first + bins * per_bin].reshape(bins, per_bin)
            column += per_bin
        end += bins * size
        sizes.append(size)
    return order, np.repeat(np.array(sizes, np.int64), np.array([bins for bins, _ in groups], np.int64))
