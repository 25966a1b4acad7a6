"""Which process computes which rows of a step, so that all have about as much work and none waits for the slowest."""

import numpy as np


def work_of(lengths: np.ndarray, max_length: int) -> float:
    """Return the work of one row of documents with `lengths` tokens, in tokens.

    Most of a model works on each token by itself, and attention on each pair of tokens of a document. Here the pairs of a
    document of `max_length` tokens count a quarter of its tokens. In a model it may be less (6% at 2,048 tokens of 1,536
    numbers each) or more. Packed rows have about as many tokens each, so an even share of this work is an even share of
    the pairs, and of the work in any model.
    """
    lengths = lengths.astype(np.float64)
    return float((lengths + lengths * lengths / (4 * max_length)).sum())


def deal_rows(work: np.ndarray, size: int, processes: int, packed: bool) -> np.ndarray:
    """Return which rows each process computes in each micro-batch, int64 [micro-batches, processes, size].

    `work` float64 [rows] is that of the rows of a step, empty slots included. The rows with most work come first, and
    the micro-batches that processes compute at the same time have rows of similar work: under ZeRO-3 and FSDP2 all wait
    for the slowest in each of them. A row goes to the process that has had least work so far (Graham 1969, "Bounds on
    Multiprocessing Timing Anomalies"). Rows that are padded to the longest of a micro-batch stay together in their order.
    """
    dealt = np.empty((len(work) // (size * processes), processes, size), np.int64)
    order, done = np.argsort(-work, kind="stable").reshape(len(dealt), -1), np.zeros(processes)
    for micro, rows in enumerate(order):
        units = rows[:, None] if packed else rows.reshape(processes, size)
        places = [0] * processes
        for unit in units:
            free = [process for process in range(processes) if places[process] < size]
            process = min(free, key=lambda p: done[p])
            dealt[micro, process, places[process] : places[process] + len(unit)] = unit
            places[process] += len(unit)
            done[process] += work[unit].sum() if packed else work[unit].max()
    return dealt
