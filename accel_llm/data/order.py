"""In what order rows are trained: a pure function of seed and epoch, so that a step number says where a run stands."""

import numpy as np

from accel_llm.config.options import TrainOptions
from accel_llm.data.packing import Bins, pack, pack_in_order


def mix_sources(source: np.ndarray, weights: list[float | None], seed: int) -> np.ndarray:
    """The rows of one epoch, int64 [n], such that the sources' shares of rows are as their weights.

    `source` int64 [rows] says which source a row is of. Every row is there at least once; a source whose share is larger
    than its size gives its rows several times, evenly: no row once more than another one of its source, but for a
    remainder that is drawn. Without weights it is every row once. Each source that has a weight must have rows.
    """
    if not weights or None in weights:
        return np.arange(len(source))
    shares, counts = np.array(weights, float), np.bincount(source, minlength=len(weights))
    wanted = np.rint(shares * (counts / shares).max()).astype(np.int64)
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    parts = []
    for number, (want, count) in enumerate(zip(wanted.tolist(), counts.tolist(), strict=True)):
        rows, (times, rest) = np.flatnonzero(source == number), divmod(max(want, count), count)
        parts += [np.tile(rows, times), np.sort(rng.choice(rows, rest, replace=False))]
    return np.concatenate(parts)


def arrange_epoch(rows: np.ndarray, lengths: np.ndarray, options: TrainOptions, epoch: int) -> Bins:
    """One epoch of `rows` (indices of documents of `lengths` tokens), in bins of one document each without packing.

    Shuffled rows are drawn anew each epoch; `packing: static` keeps the bins of epoch 0 and draws their order. The
    shortest first and the sources' own order are the same in every epoch.
    """
    if options.order == "length":
        rows = rows[np.argsort(lengths[rows], kind="stable")]
    if options.order != "shuffle":
        found = pack_in_order(lengths[rows], options.max_length) if options.packing else _alone(len(rows))
        return Bins(rows[found.order], found.offsets)
    rng = np.random.Generator(np.random.Philox(key=[options.seed, epoch]))
    if options.packing is None:
        return Bins(rng.permutation(rows), np.arange(len(rows) + 1))
    static = options.packing == "static"
    first = np.random.Generator(np.random.Philox(key=[options.seed, 0])) if static else rng
    packed = pack(lengths[rows], options.max_length, first)
    packed = Bins(rows[packed.order], packed.offsets)
    return packed if not static or epoch == 0 else _shuffled(packed, rng)


def _alone(count: int) -> Bins:
    return Bins(np.arange(count), np.arange(count + 1))


def _shuffled(bins: Bins, rng: np.random.Generator) -> Bins:
    """The same bins in another order."""
    order, sizes = rng.permutation(len(bins.offsets) - 1), np.diff(bins.offsets)
    parts = np.split(bins.order, bins.offsets[1:-1])
    return Bins(np.concatenate([parts[k] for k in order]), np.concatenate([[0], np.cumsum(sizes[order])]))
