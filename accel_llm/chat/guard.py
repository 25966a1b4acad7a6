"""Marks control tokens in people's text, so that they are tokenized as text.

The marks are Unicode noncharacters: no text contains them, and Jinja's `trim` does not remove them.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from accel_llm.errors import DataError

GUARD_OPEN, GUARD_CLOSE = "\ufdd0", "\ufdd1"
_MARKS = f"{GUARD_OPEN}{GUARD_CLOSE}\ufdd6\ufdd7"  # those of this module and of `segments`
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# How JSON with ensure_ascii, and Python's repr, write the marks.
_ESCAPES = {GUARD_OPEN: "\\ufdd0", GUARD_CLOSE: "\\ufdd1"}
_LOOSE_MARK = re.compile(f"({GUARD_OPEN}[^{GUARD_OPEN}{GUARD_CLOSE}]+{GUARD_CLOSE})|[{GUARD_OPEN}{GUARD_CLOSE}]")
_ESCAPED = "\\ufdd"
# Some tokenizers have these as special tokens, but people write them in their data on purpose.
_TAG = re.compile(r"</?(?:think|thinking|reasoning|answer|tool_calls?|tool_response|tools)>")


class ControlGuard:
    """Marks the control tokens of a tokenizer in texts; `allow_special_in_text` marks none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allow_special_in_text: bool = False):
        named_tokens = set(tokenizer.special_tokens_map.values())
        control_tokens = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special
            and not allow_special_in_text
            and (token.content in named_tokens or not _TAG.fullmatch(token.content))
        ]
        # A quick test that most texts pass: no first character of a control token, no mark, no surrogate.
        starts = "".join(sorted({re.escape(token[0]) for token in control_tokens}))
        self._needs_guard = re.compile(f"[{starts}{_MARKS}\ud800-\udfff]").search
        self._control = re.compile(match_any(control_tokens))
        self._mark = re.compile(f"[{_MARKS}]").search

    def guard(self, value: Any) -> Any:
        """Return `value` with each control token in a text marked as plain text.

        `value` is text, or messages, tools or variables: nested lists and objects, whose keys are texts, too.

        Raises:
            DataError: a text contains the marks themselves, or half of a surrogate pair.
        """
        if isinstance(value, str):
            return self._guard_text(value) if self._needs_guard(value) else value
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(item) for item in value]
        return value

    def _guard_text(self, text: str) -> str:
        check_encodable(text)
        if mark := self._mark(text):
            raise DataError(
                f"content: holds {mark[0]!a}, a Unicode noncharacter, which no text may hold", "noncharacters"
            )
        return self._control.sub(rf"{GUARD_OPEN}\g<0>{GUARD_CLOSE}", text)


def restore_marks(text: str, conversation: Any) -> str:
    """Return a rendered text with the marks that the template wrote as escapes (JSON, repr) as characters again.

    Marks without a token between them are removed: some templates cut control tokens out of texts. `conversation` is
    what was rendered. If people wrote such an escape themselves, the two cannot be told apart.

    Raises:
        DataError: people wrote the escape, and there are marks.
    """
    if _ESCAPED not in text:
        return _LOOSE_MARK.sub(r"\1", text) if GUARD_OPEN in text or GUARD_CLOSE in text else text
    texts = list(_texts_in(conversation))
    if not any(GUARD_OPEN in one for one in texts):
        return text
    if any(_ESCAPED in one for one in texts):
        raise DataError(f"content: holds {_ESCAPED!r}, the escape of a Unicode noncharacter", "noncharacters")
    return _LOOSE_MARK.sub(r"\1", unescape_marks(text))


def unescape_marks(text: str) -> str:
    """Return `text` with the marks as characters where it has them as escapes."""
    for mark, escape in _ESCAPES.items():
        text = text.replace(escape, mark)
    return text


def check_encodable(text: str) -> None:
    """Check that `text` can be written as UTF-8.

    Raises:
        DataError: it contains half of a surrogate pair, which JSON can express.
    """
    if match := _LONE_SURROGATE.search(text):
        raise DataError(f"found {match[0]!a} in the text, half of a surrogate pair, which is no character", "not text")


def match_any(literals: Iterable[str]) -> str:
    """Return a pattern that matches any of the texts, the longest first; nothing if there are none."""
    longest_first = sorted(literals, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _texts_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts_in(key)
            yield from _texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)
