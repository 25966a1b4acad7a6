"""Tokenizes a text as inference would, with exact token borders between context and trained spans."""

import hashlib
import re
from bisect import bisect_left
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from accel_llm.chat.bpe_cache import BpeCache
from accel_llm.chat.guard import GUARD_CLOSE, GUARD_OPEN, match_any
from accel_llm.errors import DataError

SHORT_TEXT, MAX_SHORT_TEXTS = 16, 4096  # texts up to this many characters are cached, and this many of them
_GUARDED = re.compile(f"{GUARD_OPEN}([^{GUARD_OPEN}{GUARD_CLOSE}]+){GUARD_CLOSE}")


class Span(NamedTuple):
    """A trained span [start, end), in characters of a text or in tokens."""

    start: int
    end: int


class SpanTokenizer:
    """A fast tokenizer that adds, pads and truncates nothing, whatever its files switch on.

    Control tokens between the marks of `guard` are tokenized as text. `in_one_piece`: no text is cut at its spans, so it
    has the tokens that it has for a model that only reads it; a token may then begin before a span and end in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, in_one_piece: bool = False):
        self._in_one_piece = in_one_piece
        # A copy, because any padded call switches padding and truncation on again in the original. Files saved during a
        # training run have both, too. A post-processor would report offsets without the space that belongs to a token.
        backend: Any = tokenizer.backend_tokenizer
        serialized: str = backend.to_str()
        self.digest = hashlib.sha256(serialized.encode()).hexdigest()
        self._backend = Tokenizer.from_str(serialized)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.post_processor = processors.Sequence([])

        added_tokens = list(tokenizer.added_tokens_decoder.values())
        self._added_texts = tuple(token.content for token in added_tokens)
        self._space_eaters = tuple(token.content for token in added_tokens if token.rstrip)
        self.added_pattern = match_any(self._added_texts)

        # Faster ways to the same ids, where the tokenizer allows them.
        self._added = re.compile(f"({self.added_pattern})")
        self._added_ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._bpe_cache = BpeCache(self._backend)
        self._short_texts: dict[str, list[int]] = {}
        splits_plainly = not any(token.lstrip or token.rstrip or token.single_word for token in added_tokens)
        self._uses_cache = self._bpe_cache.supported and splits_plainly
        self._newline_ids = self._ids("\n")
        # SentencePiece tokenizers put a space before a text, so their texts cannot be tokenized in pieces.
        self._cuts_freely = self._ids("\na") == self._newline_ids + self._ids("a")

    def token_id(self, token: str) -> int | None:
        """Return the id of `token`, or None if the vocabulary has no such token."""
        return self._backend.token_to_id(token)

    def is_single(self, token: str) -> bool:
        """Return whether the tokenizer keeps `token` in one piece."""
        return len(self._ids(token)) == 1

    def encode(self, text: str, spans: list[Span]) -> tuple[list[int], list[Span]]:
        """Return the token ids of `text` and, for each span of characters, its span of tokens.

        `spans` are in order and do not overlap. The marks of `guard` are removed from the text.
        """
        guarded = GUARD_OPEN in text and _GUARDED.search(text) is not None
        may_cut = self._cuts_freely and not self._in_one_piece
        if not guarded and not (may_cut and all(text.endswith(self._added_texts, 0, span.end) for span in spans)):
            return self._encode_whole(text, spans)

        # Cut the text at the spans: context, target, context, ... Without offsets this takes a third of the time. It is
        # exact because a target ends with an added token.
        cuts = [0]
        for span in spans:
            cuts += [span.start, self._skip_eaten_spaces(text, span.end)]
        pieces = [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]

        # Tokenize each piece; the lengths give the borders.
        if guarded:
            parts = [self._guarded_ids(piece, continued=index > 0) for index, piece in enumerate(pieces)]
        elif self._uses_cache:
            parts = list(map(self._cached_ids, pieces))
        else:
            parts = [part.ids for part in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]
        borders = list(accumulate(map(len, parts)))
        return list(chain.from_iterable(parts)), [
            Span(*pair) for pair in zip(borders[0::2], borders[1::2], strict=False)
        ]

    def _cached_ids(self, piece: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._added.split(piece)):
            if index % 2:  # `split` gives text and added tokens in turn
                ids.append(self._added_ids[part])
            elif part:
                ids += self._short_texts.get(part) or self._plain_ids(part)
        return ids

    def _plain_ids(self, part: str) -> list[int]:
        """Return the ids of a text without added tokens; short ones (role names, line ends) are cached."""
        ids = self._bpe_cache.encode(part)
        ids = self._ids(part) if ids is None else ids
        if len(part) <= SHORT_TEXT and len(self._short_texts) < MAX_SHORT_TEXTS:
            self._short_texts[part] = ids
        return ids

    def _encode_whole(self, text: str, spans: list[Span], continued: bool = False) -> tuple[list[int], list[Span]]:
        """Tokenize the whole text with offsets; a token belongs to the span in which it begins.

        Inference cannot produce a token that reaches from a prompt into a target, so such a text is cut at the target.
        In one piece the token stays, and belongs to the target.
        """
        ids, offsets = self._ids_and_offsets(text, continued)
        starts = [start for start, _ in offsets]
        token_spans: list[Span] = []
        for index, span in enumerate(spans):
            first = bisect_left(starts, span.start)
            crosses = first > 0 and offsets[first - 1][1] > span.start
            if crosses and self._in_one_piece:
                first -= 1
            elif crosses:
                # This token crosses the border: encode the text before it and the text after it separately.
                head, head_spans = self._encode_whole(text[: span.start], spans[:index], continued)
                later = [Span(start - span.start, end - span.start) for start, end in spans[index:]]
                tail, tail_spans = self._encode_whole(text[span.start :], later, continued=True)
                moved = [Span(len(head) + start, len(head) + end) for start, end in tail_spans]
                return head + tail, head_spans + moved
            token_spans.append(Span(first, bisect_left(starts, span.end)))
        return ids, token_spans

    def _ids_and_offsets(self, text: str, continued: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize `text`. If it continues another text (`continued`), no space may be put before it."""
        if continued and not self._cuts_freely:
            # The space goes before a line end, whose tokens are then removed.
            lead = len(self._newline_ids)
            encoding = self._backend.encode("\n" + text, add_special_tokens=False)
            if encoding.ids[:lead] == self._newline_ids:
                return encoding.ids[lead:], [(start - 1, end - 1) for start, end in encoding.offsets[lead:]]
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _guarded_ids(self, piece: str, continued: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(_GUARDED.split(piece)):
            # `split` gives the template's text and people's control tokens in turn; only the latter become plain text.
            is_guarded = index % 2 == 1
            self._backend.encode_special_tokens = is_guarded
            part_ids, _ = self._ids_and_offsets(part, continued=continued or index > 0)
            self._backend.encode_special_tokens = False
            if is_guarded and self.token_id(part) in part_ids:
                raise DataError(
                    f"content: the tokenizer knows {part!r} only as a control token, so it cannot be in a text"
                )
            ids += part_ids
        return ids

    def _skip_eaten_spaces(self, text: str, end: int) -> int:
        """Return the end of the whitespace that belongs to the token before `end` (Phi-3's `<|end|>` includes it)."""
        if self._space_eaters and text.endswith(self._space_eaters, 0, end):
            return len(text) - len(text[end:].lstrip())
        return end

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int] | np.ndarray) -> str:
    """Return the text of `ids`, special tokens included."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text
