"""For speed only: a cache of token ids by word. Without it the tokenizer itself gives the same ids, more slowly.

Byte-level BPE tokenizers of the GPT-2 kind (Llama 3, Qwen, SmolLM, Phi-4, OLMo, ...) split a text into words by a
regular expression and encode each word by itself. Texts repeat their words, and a lookup is faster than encoding a word
again.
"""

import json
import re
import sys
import unicodedata
from itertools import chain
from typing import Any

import regex
from tokenizers import Tokenizer, models

# The pattern of GPT-2's pre-tokenizer, which is built into the ByteLevel step of the library tokenizers.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same for its Digits step, with and without `individual_digits`.
_SINGLE_DIGITS, _DIGITS = r"\p{N}|[^\p{N}]+", r"\p{N}+|[^\p{N}]+"
_ASCII_CLASSES = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z"}
_ASCII_CLASSES |= dict.fromkeys((r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{M}"), "")
# Bounds of what is kept. Ordinary texts seldom repeat a longer word, and a longer one could fill the memory.
_MAX_WORD = 128  # characters
_MAX_BYTES = 40 << 20  # of words with their ids, as estimated
_MAX_CHARACTERS = 1 << 15  # checked ones; each takes about 150 bytes
# An estimate of what a word takes beside its text and its tuple of ids: its place in the dict, and each id.
_BYTES_PER_WORD, _BYTES_PER_ID = 100, 32


class BpeCache:
    """Encodes texts without added tokens, if the tokenizer is of a supported kind (`supported`)."""

    def __init__(self, backend: Tokenizer):
        self._model: Any = backend.model
        self._normalizer: Any = backend.normalizer
        self._splitter: Any = backend.pre_tokenizer
        normalizers = [step["type"] for step in _steps(backend.normalizer, "normalizers")]
        patterns = _split_patterns(_steps(backend.pre_tokenizer, "pretokenizers"))
        bpe = isinstance(backend.model, models.BPE) and not backend.model.dropout
        self.supported = bool(bpe and patterns and normalizers in ([], ["NFC"]))
        self._must_be_nfc = normalizers == ["NFC"]
        self._patterns = [regex.compile(pattern) for pattern in patterns or []]
        self._ascii_patterns: list[Any] = [_compile_for_ascii(pattern) for pattern in patterns or []]
        self._ids: dict[str, tuple[int, ...]] = {}
        self._bytes = 0  # that the words and their ids take, as estimated
        self._checked_characters: set[str] = set()
        self.supported = self.supported and self._check_characters(set(map(chr, range(128))))

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of `text`; None if only the tokenizer itself can encode it."""
        # A text that the tokenizer may split differently or would normalize is left to it.
        ascii_only = text.isascii()
        if not ascii_only:
            if not self._checked_characters.issuperset(text) and not self._check_characters(set(text)):
                return None
            if self._must_be_nfc and not unicodedata.is_normalized("NFC", text):
                return None
        words = _split(text, self._ascii_patterns if ascii_only else self._patterns)
        if len("".join(words)) != len(text):
            return None
        # Most texts have only words that are in the cache.
        try:
            return list(chain.from_iterable(map(self._ids.__getitem__, words)))
        except KeyError:
            known = self._ids.get
            return list(chain.from_iterable([known(word) or self._new_word_ids(word) for word in words]))

    def _new_word_ids(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word that is not in the cache, and keep them unless the word is long."""
        letters = "".join(map(_BYTE_LETTERS.__getitem__, word.encode("utf-8")))
        # A tuple, because the garbage collector does not track tuples of integers; it would scan all lists.
        ids = tuple(token.id for token in self._model.tokenize(letters))
        if len(word) <= _MAX_WORD:
            size = sys.getsizeof(word) + sys.getsizeof(ids) + _BYTES_PER_WORD + _BYTES_PER_ID * len(ids)
            if self._bytes + size > _MAX_BYTES:
                self._ids.clear()
                self._bytes = 0
            self._ids[word] = ids
            self._bytes += size
        return ids

    def _check_characters(self, characters: set[str]) -> bool:
        """Return whether our patterns split all of `characters` as the tokenizer does.

        Regular expression engines differ in what is a letter or a space, above all by their Unicode version. A pattern
        can only distinguish characters by such classes, so a few neighbors of each character are enough to tell.
        """
        if len(self._checked_characters) > _MAX_CHARACTERS:
            self._checked_characters.clear()
        for character in characters - self._checked_characters:
            probe = f"a{character}a {character}{character} 1{character}1 .{character}. \n{character}\n '{character}"
            probe = unicodedata.normalize("NFC", probe) if self._must_be_nfc else probe
            words = [probe[start:end] for _, (start, end) in self._splitter.pre_tokenize_str(probe)]
            if words != _split(probe, self._patterns) or (
                self._normalizer and self._normalizer.normalize_str(probe) != probe
            ):
                return False
            if character.isascii() and words != _split(probe, self._ascii_patterns):
                self._ascii_patterns = self._patterns
            self._checked_characters.add(character)
        return True


def _split(text: str, patterns: list[Any]) -> list[str]:
    words: list[str] = patterns[0].findall(text)
    for pattern in patterns[1:]:
        words = list(chain.from_iterable(map(pattern.findall, words)))
    return words


def _compile_for_ascii(pattern: str) -> Any:
    """Compile a pattern for ASCII text with the standard library's engine, which is twice as fast.

    `regex` compiles patterns that the standard library does not understand.
    """
    in_brackets, ascii_pattern = False, ""
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        in_brackets = {"[": True, "]": False}.get(part, in_brackets)
        letters = _ASCII_CLASSES.get(part)
        # A class without ASCII characters is left out of brackets; outside of them it matches nothing.
        ascii_pattern += part if letters is None else letters if in_brackets else f"[{letters}]" if letters else "(?!)"
    try:
        return re.compile(ascii_pattern, re.ASCII)
    except re.error:
        return regex.compile(pattern)


def _byte_letters() -> list[str]:
    """Return the character for each byte in a byte-level vocabulary (Radford et al., 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


_BYTE_LETTERS = _byte_letters()


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, as tokenizer.json lists them under `name`."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]


def _split_patterns(steps: list[dict[str, Any]]) -> list[str] | None:
    """Return the patterns by which the pre-tokenizer splits, in order; None if it does anything else."""
    patterns = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if (
            step["type"] == "Split"
            and step["behavior"] == "Isolated"
            and not step["invert"]
            and "Regex" in step["pattern"]
        ):
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits":
            patterns.append(_SINGLE_DIGITS if step["individual_digits"] else _DIGITS)
        elif step["type"] == "ByteLevel" and last and not step["add_prefix_space"]:
            return [*patterns, _GPT2] if step.get("use_regex", True) else patterns
        else:
            return None
    return None
