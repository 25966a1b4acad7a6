"""Tokenizes many texts at once: each chunk of text, a word or less, is encoded once and then looked up.

The ids are those of the tokenizer's own call. That holds where the tokenizer splits a text by one of the patterns below
before it merges bytes within each piece: a text is then cut only where every such pattern begins a new piece, whatever
stands before. Texts with added tokens, and all texts of other tokenizers, go to the tokenizer as they are.
"""

import json
import re
from array import array
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

# Patterns that split texts before byte-level BPE: first that of GPT-2; then those of cl100k (also Llama 3), of Qwen2 and
# 3, and o200k, which have line breaks at the end of pieces.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_WITH_LINE_BREAKS = {
    CL100K,
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# In each of the patterns white space is the first character of a piece, or the piece is white space and line breaks, or
# line breaks end it. So a piece begins at a space after a letter, a digit or a visible ASCII character. One also begins
# at an ASCII sign after an ASCII letter or digit, but for the apostrophe of a contraction.
_SIGNS = r"!-&(-/:-@\[-`{-~"
_BORDER = rf"(?=[ {_SIGNS}])(?:(?<=[A-Za-z0-9])|(?<=[\w!-~])(?= ))"
# Where line breaks end a piece, one begins behind the last of them; o200k takes a slash there to the piece before.
_BORDER_BELOW = rf"{_BORDER}|(?<=\n)(?=[ \t]+[\w!-~]|[\w!-.0-~])"
# In a row of chunks of one of these kinds there is a border between each two.
_ROWS = (rf"[ {_SIGNS}][\x00-\x7f]*[A-Za-z0-9]", r" [\x00-\x7f]*[!-~]")
KNOWN_PATTERNS = {_GPT2, *_WITH_LINE_BREAKS}
MAX_CHUNKS = 400_000  # that are kept: about 60 MB
MAX_KEPT_LENGTH = 32  # characters of a chunk that is kept: longer ones hardly come again
_CHUNKS_AT_ONCE = 2000
_FITS_IN_A_ROW = [re.compile(pattern).fullmatch for pattern in _ROWS]


class ChunkTokenizer:
    """Returns the token ids of texts as a tokenizer's own call does, mostly without it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = tokenizer.backend_tokenizer
        specification = json.loads(self._backend.to_str())
        self._chunks = _chunk_pattern(specification)
        # Bytes of each token: byte-level vocabularies write each byte as one character.
        vocabulary = specification["model"]["vocab"] if self._chunks else {}
        self._sizes = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
        self._sizes[list(vocabulary.values())] = list(map(len, vocabulary))
        self._ids: dict[str, bytes] = {}  # chunk -> int32 ids
        added = "|".join(re.escape(token["content"]) for token in specification["added_tokens"])
        self._added = re.compile(added or "(?!)")
        # What the tokenizer puts before and after each text.
        whole, plain = (self._backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        at = next(k for k in range(len(whole)) if whole[k : k + len(plain)] == plain)
        self._before, self._after = array("i", whole[:at]), array("i", whole[at + len(plain) :])

    def encode(self, texts: list[str]) -> list[array]:
        """Return the ids of each text, int32, with the special tokens that the tokenizer adds."""
        is_whole = [self._chunks is None or self._added.search(text) is not None for text in texts]
        chunks = [
            self._chunks.findall(text) if self._chunks and not whole else []
            for text, whole in zip(texts, is_whole, strict=True)
        ]
        long = self._learn(set().union(*chunks))
        wholes = iter(self.encode_whole([text for text, whole in zip(texts, is_whole, strict=True) if whole]))
        rows = [next(wholes) if whole else self._join(parts) for parts, whole in zip(chunks, is_whole, strict=True)]
        for chunk in long:
            del self._ids[chunk]
        return rows

    def encode_whole(self, texts: list[str]) -> list[array]:
        """Return the same ids by the tokenizer itself."""
        return [array("i", encoding.ids) for encoding in self._backend.encode_batch_fast(texts)]

    def _learn(self, chunks: set[str]) -> list[str]:
        """Encode the chunks that are not known yet; return those that are too long to be kept."""
        if len(self._ids) > MAX_CHUNKS:
            self._ids.clear()
        missing = [chunk for chunk in chunks if chunk not in self._ids]
        others = missing
        for fits in _FITS_IN_A_ROW:
            row, others = [chunk for chunk in others if fits(chunk)], [chunk for chunk in others if not fits(chunk)]
            for start in range(0, len(row), _CHUNKS_AT_ONCE):
                others += self._learn_row(row[start : start + _CHUNKS_AT_ONCE])
        for chunk, encoding in zip(
            others, self._backend.encode_batch_fast(others, add_special_tokens=False), strict=True
        ):
            self._ids[chunk] = array("i", encoding.ids).tobytes()
        return [chunk for chunk in missing if len(chunk) > MAX_KEPT_LENGTH]

    def _learn_row(self, row: list[str]) -> list[str]:
        """Encode chunks in one text, where the sizes of its tokens say where each chunk ends.

        Return those that are to be encoded by themselves: all, if the vocabulary lacks a byte, so that sizes tell nothing.
        """
        (encoding,) = self._backend.encode_batch_fast(["".join(row)], add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        token_ends, ends = np.cumsum(self._sizes[ids]), np.cumsum(list(map(len, row)))
        last = np.searchsorted(token_ends, ends)
        if last[-1] != len(ids) - 1 or not np.array_equal(token_ends[last], ends):
            return row
        start = 0
        for chunk, stop in zip(row, (last + 1).tolist(), strict=True):
            self._ids[chunk] = ids[start:stop].tobytes()
            start = stop
        return []

    def _join(self, chunks: list[str]) -> array:
        row = self._before[:]
        row.frombytes(b"".join(map(self._ids.__getitem__, chunks)))
        return row + self._after


def _chunk_pattern(specification: dict[str, Any]) -> re.Pattern[str] | None:
    """Return what finds the chunks of a text for a tokenizer, given as its JSON; None if that is not known for sure."""
    normalizer, model = specification["normalizer"], specification["model"]
    steps = specification["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if steps and steps[0].get("type") == "Digits":  # cuts around digits, where borders are anyway
        steps = steps[1:]
    # In a text with other letters NFC may make an added token that is not there before.
    is_safe = all(token["content"].isascii() for token in specification["added_tokens"])
    if not (normalizer is None or (normalizer["type"] == "NFC" and is_safe)):
        return None
    *splits, last = steps or [{}]
    is_plain = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
    if model["type"] != "BPE" or model.get("dropout") or not is_plain or last["use_regex"] == bool(splits):
        return None
    if not splits:
        return _chunks_between(_BORDER)
    split = splits[0]
    known = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"] and len(splits) == 1
    pattern = split["pattern"].get("Regex") if known else None
    if pattern not in KNOWN_PATTERNS:
        return None
    return _chunks_between(_BORDER_BELOW if pattern in _WITH_LINE_BREAKS else _BORDER)


def _chunks_between(border: str) -> re.Pattern[str]:
    """Return a pattern that finds all chunks of a text one after the other; words are found fastest."""
    return re.compile(rf"[ {_SIGNS}]?[A-Za-z0-9]+(?=[ {_SIGNS}])|[\s\S]+?(?:{border}|\Z)")
