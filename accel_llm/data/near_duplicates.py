"""Finds documents that resemble an earlier one, by MinHash and locality-sensitive hashing (Broder 1997; Indyk and Motwani
1998). The signatures come from rensa, which computes them in Rust from hashes of token n-grams.

A part holds for each document its signature, 504 bytes, and a hash of each band of it, 168 bytes. Sealing holds one band
of all documents in memory at a time: 8 bytes a document, and what it takes to sort them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from accel_llm.errors import ConfigError

BANDS, HASHES_PER_BAND = 21, 6
HASHES = BANDS * HASHES_PER_BAND  # of a signature; documents that are alike to 0.8 share a band with a chance of 0.998
NGRAM = 5  # tokens
_SEED = 42
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, The Art of Computer Programming 3, 6.4)


def import_rensa() -> Any:
    """Return the MinHash of rensa.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from rensa import RMinHash  # type: ignore
    except ImportError:
        raise ConfigError(
            'deduplicate: near needs the package rensa, which is not installed; run pip install "accel-llm[dedup]", or '
            "set deduplicate: exact."
        ) from None
    return RMinHash


def sign_documents(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the MinHash signature of each document, uint32 [documents, HASHES].

    `ids`, int32 [tokens], are those of all documents, of `lengths` tokens each. A document of fewer than NGRAM tokens
    has the hash of all of them.
    """
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    grams = _hash_ngrams(ids)
    counts = np.maximum(lengths.astype(np.int64) - NGRAM + 1, 1)  # n-grams of each document
    last = np.cumsum(counts)
    places = np.arange(last[-1] if len(last) else 0) + np.repeat(starts[:-1] - (last - counts), counts)
    hashes = grams[places]
    for k in np.flatnonzero(lengths < NGRAM).tolist():
        tokens = ids[starts[k] : starts[k + 1]].astype(np.uint64)
        hashes[last[k] - 1] = np.uint64(len(tokens)) if not len(tokens) else combine_hashes(tokens[:, None])[0]
    offsets = np.concatenate([[0], last]).astype(np.uint64)
    signatures = import_rensa().digest_matrix_from_flat_token_hashes(hashes, offsets, HASHES, _SEED)
    return np.array(signatures.to_rows(), np.uint32).reshape(len(lengths), HASHES)


def hash_bands(signatures: np.ndarray) -> np.ndarray:
    """Return a hash of each band of each signature, uint64 [BANDS, documents]."""
    bands = signatures.astype(np.uint64).reshape(len(signatures), BANDS, HASHES_PER_BAND)
    return np.ascontiguousarray(combine_hashes(bands.transpose(2, 0, 1)).T)


def find_similar(
    read_band: Callable[[int], np.ndarray],
    read_signatures: Callable[[np.ndarray], np.ndarray],
    threshold: float,
    present: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents, int64 [n], that resemble an earlier one at least by `threshold`, and for each that one.

    `read_band(b)` gives the hashes of band b of all documents, `read_signatures(documents)` the signatures of some. Only
    documents that are `present` (bool [documents]) count. The likeness is the share of equal hashes of two signatures,
    which estimates the share of common n-grams (Jaccard) with a standard error of at most 0.045.
    """
    twin = np.full(len(present), -1, np.int64)
    candidates = np.flatnonzero(present)
    for band in range(BANDS):
        hashes = read_band(band)[candidates]
        order = np.argsort(hashes, kind="stable")
        same = np.concatenate([[False], hashes[order[1:]] == hashes[order[:-1]]])[: len(order)]
        first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
        # Each is compared with the first of its group and with the one before it.
        for other in (first[same], order[np.flatnonzero(same) - 1]):
            _compare(candidates[order[same]], candidates[other], read_signatures, threshold, twin)
    found = np.flatnonzero(twin >= 0)
    return found, twin[found]


def _compare(
    later: np.ndarray,
    earlier: np.ndarray,
    read_signatures: Callable[[np.ndarray], np.ndarray],
    threshold: float,
    twin: np.ndarray,
) -> None:
    """Write into `twin` of each of `later` the document of `earlier` that it resembles, if it has none yet."""
    unknown = twin[later] < 0
    later, earlier = later[unknown], earlier[unknown]
    for start in range(0, len(later), 10_000):
        pairs = later[start : start + 10_000], earlier[start : start + 10_000]
        alike = (read_signatures(pairs[0]) == read_signatures(pairs[1])).mean(axis=1) >= threshold
        twin[pairs[0][alike]] = pairs[1][alike]


def _hash_ngrams(ids: np.ndarray) -> np.ndarray:
    """Return the hash of the n-gram that begins at each token, uint64 [tokens]; those past the end have zeros in them."""
    padded = np.concatenate([ids.astype(np.uint64), np.zeros(NGRAM - 1, np.uint64)])
    return combine_hashes(np.stack([padded[k : k + len(ids)] for k in range(NGRAM)]))


def combine_hashes(parts: np.ndarray) -> np.ndarray:
    """Hash along the first axis of uint64 numbers, [n, ...] to [...], with the mixer of SplitMix64 (Steele et al. 2014)."""
    value = np.full(parts.shape[1:], len(parts), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            value = (value + part + np.uint64(1)) * _FACTOR
            value ^= value >> np.uint64(30)
            value *= np.uint64(0xBF58476D1CE4E5B9)
            value ^= value >> np.uint64(27)
    return value
