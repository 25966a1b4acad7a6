"""Finds documents whose text was there before."""

import numpy as np


def find_equal(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents, int64 [n], whose 128-bit hash an earlier one has, and for each the first that has it.

    `digests` is uint64 [documents, 2]. At 1e9 documents the chance that two different texts share a hash is 1.5e-21.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so the first of equal ones comes first
    previous = digests[order[:-1]]
    is_equal = np.concatenate([[False], (digests[order[1:]] == previous).all(1)])[: len(order)]
    firsts = order[np.maximum.accumulate(np.where(is_equal, 0, np.arange(len(order))))]
    found = order[is_equal]
    by_place = np.argsort(found)
    return found[by_place], firsts[is_equal][by_place]
