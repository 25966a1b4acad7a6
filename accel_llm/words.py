"""Byte-level BPE word by word: the ids of a word are worked out once and remembered.

Tokenizers of the GPT-2 kind (Llama 3, Qwen, SmolLM, Phi-4, OLMo, ...) cut a text into words by a regular expression and
encode each word by itself. Text repeats its words, so looking them up costs a fraction of encoding them again.
"""

import json
import unicodedata
from itertools import chain
from typing import Any

import regex
from tokenizers import Tokenizer

# What GPT-2's pre-tokenizer cuts by, built into tokenizers' ByteLevel.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS, _DIGITS = r"\p{N}|[^\p{N}]+", r"\p{N}+|[^\p{N}]+"
_MOST_WORDS = 1 << 19  # remembered at most, about 100 MB


class Words:
    """Encodes text that holds no added token, or says that it cannot."""

    def __init__(self, backend: Tokenizer):
        self._model: Any = backend.model
        self._normalizer: Any = backend.normalizer
        self._splitter: Any = backend.pre_tokenizer
        state = json.loads(backend.to_str())
        kinds = [part["type"] for part in _flat(state["normalizer"], "normalizers")]
        patterns = _patterns(_flat(state["pre_tokenizer"], "pretokenizers"))
        bpe = state["model"]["type"] == "BPE" and not state["model"].get("dropout")
        self.supported = bool(bpe and patterns and kinds in ([], ["NFC"]))
        self._must_be_nfc = kinds == ["NFC"]
        self._patterns = [regex.compile(pattern) for pattern in patterns or []]
        self._ids = _Ids(self._model)
        self._known_characters: set[str] = set()
        self.supported = self.supported and self._get_to_know(set(map(chr, range(128))))

    def encode(self, text: str) -> list[int] | None:
        """The ids of `text`; None where only the tokenizer itself can tell."""
        if not text.isascii():
            unseen = set(text) - self._known_characters
            if unseen and not self._get_to_know(unseen):
                return None
            if self._must_be_nfc and not unicodedata.is_normalized("NFC", text):
                return None
        words = self._cut(text)
        if sum(map(len, words)) != len(text):
            return None
        if len(self._ids) > _MOST_WORDS:
            self._ids.clear()
        return list(chain.from_iterable(map(self._ids.__getitem__, words)))

    def _cut(self, text: str) -> list[str]:
        words = self._patterns[0].findall(text)
        for pattern in self._patterns[1:]:
            words = list(chain.from_iterable(map(pattern.findall, words)))
        return words

    def _get_to_know(self, characters: set[str]) -> bool:
        """Whether all of `characters` are cut here as the tokenizer cuts them: engines differ in what is a letter or a
        space, by their Unicode version above all. Other than by such classes no pattern tells characters apart."""
        for character in characters:
            probe = f"a{character}a {character}{character} 1{character}1 .{character}. \n{character}\n '{character}"
            probe = unicodedata.normalize("NFC", probe) if self._must_be_nfc else probe
            cut = [probe[start:end] for _, (start, end) in self._splitter.pre_tokenize_str(probe)]
            if cut != self._cut(probe) or (self._normalizer and self._normalizer.normalize_str(probe) != probe):
                return False
            self._known_characters.add(character)
        return True


class _Ids(dict[str, list[int]]):
    """Word -> ids, worked out when first asked for."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = model
        self._letters = _byte_letters()

    def __missing__(self, word: str) -> list[int]:
        written = "".join(map(self._letters.__getitem__, word.encode("utf-8")))
        ids = self[word] = [token.id for token in self._model.tokenize(written)]
        return ids


def _byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al., 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _flat(state: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if state is None:
        return []
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
