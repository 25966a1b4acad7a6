"""Byte-level BPE word by word: the ids of a word are worked out once and remembered.

Tokenizers of the GPT-2 kind (Llama 3, Qwen, SmolLM, Phi-4, OLMo, ...) cut a text into words by a regular expression and
encode each word by itself. Text repeats its words, so looking them up costs a fraction of encoding them again.
"""

import json
import re
import unicodedata
from itertools import chain
from typing import Any

import regex
from tokenizers import Tokenizer, models

# What GPT-2's pre-tokenizer cuts by, built into tokenizers' ByteLevel.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS, _DIGITS = r"\p{N}|[^\p{N}]+", r"\p{N}+|[^\p{N}]+"
_ASCII_CLASSES = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z"}
_ASCII_CLASSES |= dict.fromkeys((r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{M}"), "")
_MOST_WORDS = 1 << 19  # remembered at most, about 100 MB


class BpeCache:
    """Encodes text that holds no added token, or says that it cannot."""

    def __init__(self, backend: Tokenizer):
        self._model: Any = backend.model
        self._normalizer: Any = backend.normalizer
        self._splitter: Any = backend.pre_tokenizer
        kinds = [part["type"] for part in _parts_of(backend.normalizer, "normalizers")]
        patterns = _patterns(_parts_of(backend.pre_tokenizer, "pretokenizers"))
        bpe = isinstance(backend.model, models.BPE) and not backend.model.dropout
        self.supported = bool(bpe and patterns and kinds in ([], ["NFC"]))
        self._must_be_nfc = kinds == ["NFC"]
        self._patterns = [regex.compile(pattern) for pattern in patterns or []]
        self._ascii_patterns: list[Any] = [_for_ascii(pattern) for pattern in patterns or []]
        self._ids: dict[str, tuple[int, ...]] = {}
        self._known_characters: set[str] = set()
        self.supported = self.supported and self._get_to_know(set(map(chr, range(128))))

    def encode(self, text: str) -> list[int] | None:
        """The ids of `text`; None where only the tokenizer itself can tell."""
        ascii_only = text.isascii()
        if not ascii_only:
            if not self._known_characters.issuperset(text) and not self._get_to_know(set(text)):
                return None
            if self._must_be_nfc and not unicodedata.is_normalized("NFC", text):
                return None
        words = _cut(text, self._ascii_patterns if ascii_only else self._patterns)
        if len("".join(words)) != len(text):
            return None
        try:
            return list(chain.from_iterable(map(self._ids.__getitem__, words)))
        except KeyError:
            self._remember(words)
            return list(chain.from_iterable(map(self._ids.__getitem__, words)))

    def _remember(self, words: list[str]) -> None:
        if len(self._ids) > _MOST_WORDS:
            self._ids.clear()
        for word in words:
            if word not in self._ids:
                written = "".join(map(_LETTERS.__getitem__, word.encode("utf-8")))
                # A tuple of numbers is nothing to the garbage collector, which would walk through half a million lists.
                self._ids[word] = tuple(token.id for token in self._model.tokenize(written))

    def _get_to_know(self, characters: set[str]) -> bool:
        """Whether all of `characters` are cut here as the tokenizer cuts them: engines differ in what is a letter or a
        space, by their Unicode version above all. Other than by such classes no pattern tells characters apart."""
        for character in characters - self._known_characters:
            probe = f"a{character}a {character}{character} 1{character}1 .{character}. \n{character}\n '{character}"
            probe = unicodedata.normalize("NFC", probe) if self._must_be_nfc else probe
            cut = [probe[start:end] for _, (start, end) in self._splitter.pre_tokenize_str(probe)]
            if cut != _cut(probe, self._patterns) or (
                self._normalizer and self._normalizer.normalize_str(probe) != probe
            ):
                return False
            if character.isascii() and cut != _cut(probe, self._ascii_patterns):
                self._ascii_patterns = self._patterns
            self._known_characters.add(character)
        return True


def _cut(text: str, patterns: list[Any]) -> list[str]:
    words: list[str] = patterns[0].findall(text)
    for pattern in patterns[1:]:
        words = list(chain.from_iterable(map(pattern.findall, words)))
    return words


def _for_ascii(pattern: str) -> Any:
    """The same for text of ASCII alone in the standard library's engine, which is twice as fast."""
    within, written = False, ""
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        within = {"[": True, "]": False}.get(part, within)
        letters = _ASCII_CLASSES.get(part)
        written += part if letters is None else letters if within else f"[{letters}]" if letters else "(?!)"
    try:
        return re.compile(written, re.ASCII)
    except re.error:
        return regex.compile(pattern)


def _byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al., 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


_LETTERS = _byte_letters()


def _parts_of(component: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer as its file has them."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]


def _patterns(steps: list[dict[str, Any]]) -> list[str] | None:
    """What the pre-tokenizer cuts by, one after the other; None if it does more than that."""
    found = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if (
            step["type"] == "Split"
            and step["behavior"] == "Isolated"
            and not step["invert"]
            and "Regex" in step["pattern"]
        ):
            found.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits":
            found.append(_SINGLE_DIGITS if step["individual_digits"] else _DIGITS)
        elif step["type"] == "ByteLevel" and last and not step["add_prefix_space"]:
            return [*found, _GPT2] if step.get("use_regex", True) else found
        else:
            return None
    return None
