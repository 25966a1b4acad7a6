"""Which documents share a row, and how documents become a batch of tensors."""

from typing import NamedTuple

import numpy as np


class Bins(NamedTuple):
    """Documents grouped by row: row `b` holds the documents `order[offsets[b]:offsets[b + 1]]`."""

    order: np.ndarray  # int64 [documents], document indices
    offsets: np.ndarray  # int64 [bins + 1]


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None = None) -> Bins:
    """Assign documents of `lengths` tokens to rows of at most `capacity` tokens, best-fit decreasing.

    The work is done on the count of each length, so its cost follows `capacity` and not the corpus, and the number of
    rows depends on the counts alone. `rng` shuffles which document of a length goes where and the order of the rows;
    without it equal inputs in equal order give equal rows. Raises ValueError for a length outside 1..capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, allowed are 1 to capacity={capacity}")
    counts = np.bincount(lengths, minlength=capacity + 1)
    groups = _best_fit(counts, capacity)
    order, sizes = _place(groups, _by_length(lengths, capacity, rng), np.cumsum(counts) - counts)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    if rng is None:
        return Bins(order, offsets)
    shuffle = rng.permutation(len(sizes))
    shuffled = np.concatenate([[0], np.cumsum(sizes[shuffle])])
    shift = np.repeat(offsets[:-1][shuffle] - shuffled[:-1], sizes[shuffle])
    return Bins(order[np.arange(len(order)) + shift], shuffled)


def pack_in_order(lengths: np.ndarray, capacity: int) -> Bins:
    """Assign documents to rows of at most `capacity` tokens in the order in which they come: a row takes the next ones
    until one does not fit. Raises ValueError for a length outside 1..capacity."""
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, allowed are 1 to capacity={capacity}")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(int(np.searchsorted(ends, ends[offsets[-1]] + capacity, "right")) - 1)
    return Bins(np.arange(len(lengths)), np.array(offsets, np.int64))


def _by_length(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None) -> np.ndarray:
    # numpy's stable sort is a radix sort, linear in the documents, for 16-bit keys only
    keys = lengths.astype(np.uint16 if capacity < 2**16 else np.int64)
    if rng is None:
        return np.argsort(keys, kind="stable")
    shuffle = rng.permutation(len(keys))
    return shuffle[np.argsort(keys[shuffle], kind="stable")]


def _best_fit(counts: np.ndarray, capacity: int) -> list[tuple[int, tuple]]:
    """Groups of bins filled alike: (bins, contents), contents being a chain (length, documents a bin, contents) or ().

    One document goes to the fullest bin that takes it, and that bin then is the fullest that takes the next document
    of this length, so a bin is always filled with as many as fit before the next one is touched.
    """
    groups: list[list[tuple[int, tuple]]] = [[] for _ in range(capacity + 1)]  # by the space left in their bins
    spaces = 0  # bit s is set where groups[s] is not empty: the best fit is the lowest bit from `length` upwards
    for length in np.flatnonzero(counts)[::-1].tolist():
        documents = int(counts[length])
        while documents:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = min(space // length, documents)
            bins, contents = groups[space].pop() if fitting else (documents // each, ())
            filled = min(bins, documents // each)
            if filled < bins:
                groups[space].append((bins - filled, contents))
            elif fitting and not groups[space]:
                spaces ^= 1 << space
            groups[space - each * length].append((filled, (length, each, contents)))
            spaces |= 1 << (space - each * length)
            documents -= filled * each
    return [group for same_space in groups for group in same_space]


def _place(groups: list[tuple[int, tuple]], by_length: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Document indices bin after bin, int64 [documents], and documents a bin, int64 [bins]."""
    order = np.empty(len(by_length), np.int64)
    following = starts.tolist()  # for each length, where its next unplaced document stands in by_length
    sizes, end = [], 0
    for bins, contents in groups:
        items = []
        while contents:
            length, each, contents = contents
            items.append((length, each))
        size = sum(each for _, each in items)
        block = order[end : end + bins * size].reshape(bins, size)
        column = 0
        for length, each in items:
            first = following[length]
            following[length] = first + bins * each
            block[:, column : column + each] = by_length[first : first + bins * each].reshape(bins, each)
            column += each
        end += bins * size
        sizes.append(size)
    return order, np.repeat(np.array(sizes, np.int64), np.array([bins for bins, _ in groups], np.int64))
