"""Finds documents that share words in a row with evaluation data, as GPT-3 and others did (Brown et al. 2020, appendix C)."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from accel_llm.config.fields import Source
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.near_duplicates import combine_hashes
from accel_llm.data.sources import read_source

# A word is letters and digits without case; each character of Chinese, Japanese and Korean is a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_MAX_WORDS = 1_000_000  # whose hashes are kept


class EvaluationNgrams:
    """All n-grams of words in the texts of evaluation data."""

    def __init__(self, sources: list[Source], ngram: int):
        self.ngram, self.short_texts = ngram, 0
        self._words: dict[str, int] = {}
        hashes = []
        for source in sources:
            for row in read_source(source):
                for text in _texts(row.fields):
                    found = self._hash(text)
                    self.short_texts += not len(found)
                    hashes.append(found)
        self._hashes = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)

    @property
    def fingerprint(self) -> str:
        """A hash of the n-grams."""
        return data_fingerprint(self.ngram, self._hashes.tobytes())

    def appear_in(self, text: str) -> bool:
        """Tell whether a text has any of the n-grams."""
        hashes = self._hash(text)
        places = np.searchsorted(self._hashes, hashes)
        return bool(len(self._hashes) and (self._hashes[places.clip(max=len(self._hashes) - 1)] == hashes).any())

    def _hash(self, text: str) -> np.ndarray:
        """Return the hash of each n-gram of words, uint64 [n]; none if the text has fewer words."""
        if len(self._words) > _MAX_WORDS:
            self._words.clear()
        words = _WORDS.findall(text.casefold())
        for word in set(words) - self._words.keys():
            self._words[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        values = np.array([self._words[word] for word in words], np.uint64)
        count = max(0, len(values) - self.ngram + 1)
        return combine_hashes(np.stack([values[k : k + count] for k in range(self.ngram)]))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
