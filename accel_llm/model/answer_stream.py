"""Shows an answer while it is generated: every character once, and a thought before the answer dim."""

import sys
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from accel_llm.chat.template import Template
from accel_llm.system.screen import DIM, NO_STYLE, shows_styles

_INCOMPLETE = "\ufffd"  # what a tokenizer writes for a part of a character
_CONTEXT, _WINDOW = 8, 64  # tokens that are decoded again with each new one: at least, and about at most


class TokenText:
    """The text of tokens that come one after the other, special tokens left out except those in `kept`.

    Only the last tokens are decoded anew with each token, together with some before them, since a tokenizer may write a
    token in another way at the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kept: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = {k for k, token in added if token.special and not any(token.content in text for text in kept)}
        self.ids: list[int] = []
        self._start, self._before = 0, ""  # what is decoded again begins here, and this of it is finished
        self._parts: list[str] = []  # of the finished text

    def add(self, token: int) -> str:
        """Return the new characters that no further token can change."""
        if token in self._hidden:
            return ""
        self.ids.append(token)
        text = self._decode(self.ids[self._start :])
        whole = text.rstrip(_INCOMPLETE)
        # Several byte tokens may be nothing whole until the last of them is there.
        if len(whole) <= len(self._before) or not whole.startswith(self._before):
            return ""
        new = whole[len(self._before) :]
        self._parts.append(new)
        self._before = whole
        if whole == text and len(self.ids) - self._start > _WINDOW:
            context = self._decode(self.ids[-_CONTEXT:])
            if _INCOMPLETE not in context and text.endswith(context):
                self._start, self._before = len(self.ids) - _CONTEXT, context
        return new

    def finish(self) -> str:
        """Return the characters that are left, also parts of characters that will never be whole."""
        rest = self._decode(self.ids[self._start :])[len(self._before) :]
        self._parts.append(rest)
        self._before += rest
        return rest

    @property
    def text(self) -> str:
        """All characters that were returned."""
        return "".join(self._parts)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class AnswerStream(BaseStreamer):
    """Prints one answer on `screen` while `generate` makes it.

    If the answer begins with a thought, in the tags of the template, that part is dim where the screen has styles. A tag
    that stands in the prompt is printed too, so that the thought has both. Without a screen only the number of tokens is
    shown, on standard error if that is a terminal. `has_special_tags`: a tag of the template holds a special token, which
    cannot stand in the text of a message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template, screen: TextIO | None):
        self._tags = template.thought_tags
        self.tokens = TokenText(tokenizer, self._tags)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.has_special_tags = any(token in tag for token in special for tag in self._tags)
        self._screen, self._has_styles = screen, screen is not None and shows_styles(screen)
        self._counts = screen is None and sys.stderr.isatty()
        self._knows_prompt, self._ended = False, False
        self._pending = ""  # may be the beginning of a tag
        self._place = "thought" if template.opens_thought else "start"  # then "thought" and "answer"
        if template.opens_thought:
            self._print(f"{self._tags[0]}\n", dim=True)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, int64 [1, n], and then each token, int64 [1]."""
        if not self._knows_prompt:
            self._knows_prompt = True
            return
        for token in value.flatten().tolist():
            self._show(self.tokens.add(token))
        if self._counts:
            print(f"\r[{len(self.tokens.ids):,} tokens]", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Print what is left, and a line end; `generate` calls it, and whoever stops `generate` must."""
        if self._ended:
            return
        self._ended = True
        self._show(self.tokens.finish())
        self._print(self._pending, dim=self._place == "thought")
        self._print("\n")
        if self._counts:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        """Print new text, up to what may be the beginning of a tag."""
        self._pending += text
        if self._place == "start" and self._pending.lstrip():
            opening, begun = self._tags[0], self._pending.lstrip()
            if begun.startswith(opening):
                self._place = "thought"
            elif not opening.startswith(begun):
                self._place = "answer"
        if self._place == "thought":
            thought, tag, rest = self._pending.partition(self._tags[1])
            if tag:
                self._print(thought + tag, dim=True)
                self._place, self._pending = "answer", rest
            else:
                held = _overlap(self._pending, self._tags[1])
                shown = len(self._pending) - held
                self._print(self._pending[:shown], dim=True)
                self._pending = self._pending[shown:]
        if self._place == "answer":
            self._print(self._pending)
            self._pending = ""

    def _print(self, text: str, dim: bool = False) -> None:
        if text and self._screen is not None:
            shown = f"{DIM}{text}{NO_STYLE}" if dim and self._has_styles else text
            print(shown, end="", file=self._screen, flush=True)


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
