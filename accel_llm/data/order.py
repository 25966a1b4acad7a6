"""The order in which rows are trained: a pure function of seed and epoch, so a step number locates a run in it."""

import numpy as np

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import TrainOptions
from accel_llm.data.packing import Bins, pack, pack_in_order, spread

# `order: group_by_length` puts so many rows of similar length together: a power of 2, as batches often are.
GROUP_ROWS = 64
# Rows are sorted in windows of so many groups, or of half the epoch if that is less: sorted as a whole, the same rows
# would meet in every epoch.
WINDOW_GROUPS = 64
MIXED_ROWS = 1.02  # texts of all lengths in each row may take so many times the rows of the best fit


def mix_sources(source: np.ndarray, weights: list[float | None], seed: int) -> np.ndarray:
    """Return the rows of one epoch, int64 [n], so that the share of each source in the rows follows its weight.

    It serves orders by length, for which all rows are arranged together; otherwise sources take turns (mixture.py).
    `source`, int64 [rows], is the index of each row's source. Every row is in the epoch at least once. A source that
    needs more rows than it has repeats them evenly: how often two of its rows appear differs by at most one, and `seed`
    draws the rows that appear once more. Without weights every row appears once. A source with a weight must have rows.
    """
    if not weights or None in weights:
        return np.arange(len(source))

    # The source with the most rows for its weight is used once; its size sets the sizes of the others.
    shares, row_counts = np.array(weights, float), np.bincount(source, minlength=len(weights))
    sizes = np.rint(shares * (row_counts / shares).max()).astype(np.int64)

    # Epochs use the keys from 0 upwards (`arrange_epoch`); 2**63 is far from all of them.
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    parts = []
    for number, (size, row_count) in enumerate(zip(sizes.tolist(), row_counts.tolist(), strict=True)):
        rows, (times, rest) = np.flatnonzero(source == number), divmod(max(size, row_count), row_count)
        parts += [np.tile(rows, times), np.sort(rng.choice(rows, rest, replace=False))]
    return np.concatenate(parts)


def arrange_epoch(rows: np.ndarray, lengths: np.ndarray, options: TrainOptions, epoch: int, source: int = 0) -> Bins:
    """Arrange the `rows` of one epoch in bins; without packing each bin holds one row.

    `rows` are indices of documents, and `lengths` holds the tokens of every document. With `order: shuffle` each epoch
    is drawn anew; `packing: static` keeps the bins of epoch 0 and draws only their order. `order: group_by_length` is
    drawn anew too, see `_group_by_length`. With `order: length` (shortest first) and `order: source` all epochs are equal.
    Each `source` that is arranged by itself has draws of its own.
    """
    # Without shuffling, the rows keep their order and are packed one after the other.
    if options.order == "length":
        rows = rows[np.argsort(lengths[rows], kind="stable")]
    if options.order in ("length", "source"):
        bins = pack_in_order(lengths[rows], options.max_length) if options.packing else _one_row_per_bin(len(rows))
        return Bins(rows[bins.order], bins.offsets)

    # Philox gives each (seed, epoch) its own random numbers, with no state to save.
    first = source << 40  # no run has so many epochs
    rng = np.random.Generator(np.random.Philox(key=[options.seed, first + epoch]))
    if options.packing is None:
        rows = rng.permutation(rows)
        if options.order == "group_by_length":
            rows = _group_by_length(rows, lengths, rng, first=-epoch * len(rows) % GROUP_ROWS)
        return Bins(rows, np.arange(len(rows) + 1))

    # Static packing fills the bins with the generator of epoch 0, whatever the epoch is.
    static = options.packing == "static"
    packing_rng = np.random.Generator(np.random.Philox(key=[options.seed, first])) if static else rng
    bins = pack(lengths[rows], options.max_length, packing_rng)
    if isinstance(options, ClassifyOptions):
        # Steps of a few rows should see texts of all lengths, if that takes hardly more rows.
        mixed = spread(lengths[rows], options.max_length, packing_rng)
        bins = mixed if len(mixed.offsets) <= MIXED_ROWS * len(bins.offsets) else bins
    bins = Bins(rows[bins.order], bins.offsets)
    return bins if not static or epoch == 0 else _shuffle_bins(bins, rng)


def _group_by_length(rows: np.ndarray, lengths: np.ndarray, rng: np.random.Generator, first: int) -> np.ndarray:
    """Return shuffled `rows` in another order, int64 [n]: groups of GROUP_ROWS rows of similar length.

    The `first` rows, and those that are left over at the end, are incomplete groups. `first` completes the group with
    which the epoch before ended: so groups begin at multiples of GROUP_ROWS in the endless sequence of epochs, where
    steps and micro-batches of 8, 16, 32 or 64 rows begin too. Such a micro-batch has the most similar rows of its group.
    """
    groups = max(0, len(rows) - first) // GROUP_ROWS
    end = first + groups * GROUP_ROWS
    head, middle, tail = rows[:first], rows[first:end], rows[end:]
    per_window = GROUP_ROWS * min(WINDOW_GROUPS, max(1, groups // 2))
    middle = middle[np.lexsort((lengths[middle], np.arange(len(middle)) // per_window))].reshape(-1, GROUP_ROWS)

    # A number k < 64 exchanges the places i and i ^ k, which leaves each half, quarter and eighth of a group together.
    # So a small micro-batch is not always shorter than the next one.
    places = np.arange(GROUP_ROWS) ^ rng.integers(GROUP_ROWS, size=(groups, 1))
    middle = rng.permutation(np.take_along_axis(middle, places, axis=1)).ravel()
    head, tail = (part[np.argsort(lengths[part], kind="stable")] for part in (head, tail))
    return np.concatenate([head, middle, tail])


def _one_row_per_bin(count: int) -> Bins:
    return Bins(np.arange(count), np.arange(count + 1))


def _shuffle_bins(bins: Bins, rng: np.random.Generator) -> Bins:
    """Return the same bins in another order."""
    order, sizes = rng.permutation(len(bins.offsets) - 1), np.diff(bins.offsets)
    contents = np.split(bins.order, bins.offsets[1:-1])
    return Bins(np.concatenate([contents[k] for k in order]), np.concatenate([[0], np.cumsum(sizes[order])]))
