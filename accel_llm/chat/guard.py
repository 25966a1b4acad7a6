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
_ANY_MARK = re.compile(f"[{_MARKS}]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# How JSON with ensure_ascii, and Python's repr, write the marks.
_ESCAPES = {GUARD_OPEN: "\\ufdd0", GUARD_CLOSE: "\\ufdd1"}
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
        control = match_any(control_tokens)
        self._control, self._mark = re.compile(control), re.compile(f"[{GUARD_OPEN}{GUARD_CLOSE}]")
        self._guarded = re.compile(f"({GUARD_OPEN}(?:{control}){GUARD_CLOSE})")
        self._half_guarded = re.compile(f"{GUARD_OPEN}(?:{control})|(?:{control}){GUARD_CLOSE}")

    def guard(self, value: Any) -> Any:
        """Return `value` with each control token in a text marked as plain text.

        `value` is text, or messages, tools or variables: nested lists and objects, whose keys are texts, too.

        Raises:
            DataError: a text contains the marks themselves, or half of a surrogate pair, or a value is nested too deep.
        """
        try:
            return self._guard_value(value)
        except RecursionError:
            raise DataError("found a value that is nested too deep", "nested too deep") from None

    def _guard_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._guard_text(value) if self._needs_guard(value) else value
        if isinstance(value, dict):
            return {self._guard_value(key): self._guard_value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard_value(item) for item in value]
        return value

    def _guard_text(self, text: str) -> str:
        check_encodable(text)
        if mark := _ANY_MARK.search(text):
            raise DataError(
                f"content: holds {mark[0]!a}, a Unicode noncharacter, which no text may hold", "noncharacters"
            )
        return self._control.sub(rf"{GUARD_OPEN}\g<0>{GUARD_CLOSE}", text)

    def restore(self, text: str, conversation: Any) -> str:
        """Return a rendered text with each mark at its token again, and without marks elsewhere.

        A template may write the marks as escapes (JSON, repr), or cut a token out of a text and leave its marks.
        `conversation` is what was rendered.

        Raises:
            DataError: people wrote such an escape themselves, or the template cut off one mark of a token.
        """
        if _ESCAPED in text:
            text = self._unescape(text, list(_texts_in(conversation)))
        if GUARD_OPEN not in text and GUARD_CLOSE not in text:
            return text
        pieces = self._guarded.split(text)
        for index, piece in enumerate(pieces[::2]):
            if self._half_guarded.search(piece):
                raise DataError("content: the chat template cuts a text in the middle of a control token", "not text")
            pieces[2 * index] = self._mark.sub("", piece)
        return "".join(pieces)

    def _unescape(self, text: str, people_wrote: list[str]) -> str:
        own = sum(text.count(_ESCAPED) for text in people_wrote)
        if not any(GUARD_OPEN in one for one in people_wrote) or text.count(_ESCAPED) <= own:
            return text
        if own:
            raise DataError(f"content: holds {_ESCAPED!r}, the escape of a Unicode noncharacter", "noncharacters")
        return unescape_marks(text)


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
