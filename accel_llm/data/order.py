"""The order in which rows are trained: a pure function of seed and epoch, so a step number locates a run in it."""

import numpy as np

from accel_llm.config.options import TrainOptions
from accel_llm.data.packing import Bins, pack, pack_in_order


def mix_sources(source: np.ndarray, weights: list[float | None], seed: int) -> np.ndarray:
    """Return the rows of one epoch, int64 [n], so that the share of each source in the rows follows its weight.

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


def arrange_epoch(rows: np.ndarray, lengths: np.ndarray, options: TrainOptions, epoch: int) -> Bins:
    """Arrange the `rows` of one epoch in bins; without packing each bin holds one row.

    `rows` are indices of documents, and `lengths` holds the tokens of every document. With `order: shuffle` each epoch
    is drawn anew; `packing: static` keeps the bins of epoch 0 and draws only their order. With `order: length`
    (shortest first) and `order: source` all epochs are equal.
    """
    # Without shuffling, the rows keep their order and are packed one after the other.
    if options.order == "length":
        rows = rows[np.argsort(lengths[rows], kind="stable")]
    if options.order != "shuffle":
        bins = pack_in_order(lengths[rows], options.max_length) if options.packing else _one_row_per_bin(len(rows))
        return Bins(rows[bins.order], bins.offsets)

    # Philox gives each (seed, epoch) its own random numbers, with no state to save.
    rng = np.random.Generator(np.random.Philox(key=[options.seed, epoch]))
    if options.packing is None:
        return Bins(rng.permutation(rows), np.arange(len(rows) + 1))

    # Static packing fills the bins with the generator of epoch 0, whatever the epoch is.
    static = options.packing == "static"
    packing_rng = np.random.Generator(np.random.Philox(key=[options.seed, 0])) if static else rng
    bins = pack(lengths[rows], options.max_length, packing_rng)
    bins = Bins(rows[bins.order], bins.offsets)
    return bins if not static or epoch == 0 else _shuffle_bins(bins, rng)


def _one_row_per_bin(count: int) -> Bins:
    return Bins(np.arange(count), np.arange(count + 1))


def _shuffle_bins(bins: Bins, rng: np.random.Generator) -> Bins:
    """Return the same bins in another order."""
    order, sizes = rng.permutation(len(bins.offsets) - 1), np.diff(bins.offsets)
    contents = np.split(bins.order, bins.offsets[1:-1])
    return Bins(np.concatenate([contents[k] for k in order]), np.concatenate([[0], np.cumsum(sizes[order])]))
