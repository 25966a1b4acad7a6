"""The tokenizer as inference uses it, with exact borders between what is context and what is trained."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from accel_llm.chat.bpe_cache import BpeCache
from accel_llm.errors import DataError

# Unicode noncharacters: never part of a text that is meant to be read, and untouched by `trim`.
GUARD_OPEN, GUARD_CLOSE = "\ufdd0", "\ufdd1"
SHORT_TEXT, MAX_SHORT_TEXTS = 16, 4096  # characters of texts whose ids are remembered, and how many of them
_HALF = re.compile("[\ud800-\udfff]")
_GUARDED = re.compile(f"{GUARD_OPEN}([^{GUARD_OPEN}{GUARD_CLOSE}]+){GUARD_CLOSE}")
# Special tokens of some tokenizers, yet people write them in their data on purpose.
_TAG = re.compile(r"</?(?:think|thinking|reasoning|answer|tool_calls?|tool_response|tools)>")


class Span(NamedTuple):
    """What is trained, in characters of a text or in tokens: [start, end)."""

    start: int
    end: int


class SpanTokenizer:
    """A fast tokenizer without all that its files may switch on: nothing is added, padded or cut.

    With `allow_special_in_text` control tokens in what people wrote are control tokens, not text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, allow_special_in_text: bool = False):
        # A copy: files saved during a training run carry padding and truncation (and any padded call switches them on
        # again), and the post-processor would report offsets without the space that belongs to a token.
        backend: Any = tokenizer.backend_tokenizer
        written: str = backend.to_str()
        self.digest = hashlib.sha256(written.encode()).hexdigest()
        self._backend = Tokenizer.from_str(written)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.post_processor = processors.Sequence([])
        added = list(tokenizer.added_tokens_decoder.values())
        self._literals = tuple(token.content for token in added)
        self._swallows_spaces = tuple(token.content for token in added if token.rstrip)
        self.added_pattern = _any_of(self._literals)
        named = set(tokenizer.special_tokens_map.values())
        control_tokens = [
            token.content
            for token in added
            if token.special
            and not allow_special_in_text
            and (token.content in named or not _TAG.fullmatch(token.content))
        ]
        starts = "".join(sorted({re.escape(token[0]) for token in control_tokens}))
        self._may_matter = re.compile(f"[{starts}{GUARD_OPEN}{GUARD_CLOSE}\ud800-\udfff]").search
        self._control = re.compile(_any_of(control_tokens))
        self._added = re.compile(f"({self.added_pattern})")
        self._added_ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._words = BpeCache(self._backend)
        self._short: dict[str, list[int]] = {}
        splits_plainly = not any(token.lstrip or token.rstrip or token.single_word for token in added)
        self._words_alone = self._words.supported and splits_plainly
        self._newline_ids = self._ids("\n")
        # SentencePiece-like tokenizers put a space before a text; others can be fed piece by piece.
        self._cuts_freely = self._ids("\na") == self._newline_ids + self._ids("a")

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def is_single(self, token: str) -> bool:
        return len(self._ids(token)) == 1

    def guard(self, value: Any) -> Any:
        """Marks control tokens inside what people wrote, all through nested messages or tools, as text.

        Raises DataError where people wrote the marks themselves.
        """
        if isinstance(value, str):
            if not self._may_matter(value):
                return value
            check_encodable(value)
            if GUARD_OPEN in value or GUARD_CLOSE in value:
                raise DataError(
                    f"content: holds {GUARD_OPEN!a} or {GUARD_CLOSE!a}, Unicode noncharacters that no text may hold",
                    "noncharacters",
                )
            return self._control.sub(rf"{GUARD_OPEN}\g<0>{GUARD_CLOSE}", value)
        if isinstance(value, dict):
            return {key: self.guard(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.guard(item) for item in value]
        return value

    def encode(self, text: str, spans: list[Span]) -> tuple[list[int], list[Span]]:
        """Ids of `text` (marks of `guard` removed) and, for each span of characters in order, its span of tokens."""
        guarded = GUARD_OPEN in text and _GUARDED.search(text) is not None
        if not guarded and not (
            self._cuts_freely and all(text.endswith(self._literals, 0, span.end) for span in spans)
        ):
            return self._encode_whole(text, spans)
        # A target that ends with an added token can be cut out before tokenising: no offsets, a third of the time.
        cuts = [0]
        for span in spans:
            cuts += [span.start, self._after_swallowed_spaces(text, span.end)]
        pieces = [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
        if guarded:
            parts = [self._guarded_ids(piece, continued=index > 0) for index, piece in enumerate(pieces)]
        elif self._words_alone:
            parts = list(map(self._piece_ids, pieces))
        else:
            parts = [part.ids for part in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]
        borders = list(accumulate(map(len, parts)))
        return list(chain.from_iterable(parts)), [
            Span(*pair) for pair in zip(borders[0::2], borders[1::2], strict=False)
        ]

    def _piece_ids(self, piece: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._added.split(piece)):
            if index % 2:
                ids.append(self._added_ids[part])
            elif part:
                ids += self._short.get(part) or self._part_ids(part)
        return ids

    def _part_ids(self, part: str) -> list[int]:
        """Ids of a text without added tokens. Role names and line ends come again and again."""
        ids = self._words.encode(part)
        ids = self._ids(part) if ids is None else ids
        if len(part) <= SHORT_TEXT and len(self._short) < MAX_SHORT_TEXTS:
            self._short[part] = ids
        return ids

    def _encode_whole(self, text: str, spans: list[Span], continued: bool = False) -> tuple[list[int], list[Span]]:
        """One tokenisation with offsets. A token belongs where it begins; one that reaches from a prompt into a target
        is not what inference would see there, so such a text is cut in two."""
        ids, offsets = self._ids_and_offsets(text, continued)
        starts = [start for start, _ in offsets]
        found: list[Span] = []
        for index, span in enumerate(spans):
            first = bisect_left(starts, span.start)
            if first and offsets[first - 1][1] > span.start:
                head, placed = self._encode_whole(text[: span.start], spans[:index], continued)
                later = [Span(start - span.start, end - span.start) for start, end in spans[index:]]
                tail, moved = self._encode_whole(text[span.start :], later, continued=True)
                return head + tail, placed + [Span(len(head) + start, len(head) + end) for start, end in moved]
            found.append(Span(first, bisect_left(starts, span.end)))
        return ids, found

    def _ids_and_offsets(self, text: str, continued: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """`continued`: the text goes on from another, so it must not get the space of a text's beginning."""
        if continued and not self._cuts_freely:
            lead = len(self._newline_ids)
            encoding = self._backend.encode("\n" + text, add_special_tokens=False)
            if encoding.ids[:lead] == self._newline_ids:
                return encoding.ids[lead:], [(start - 1, end - 1) for start, end in encoding.offsets[lead:]]
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _guarded_ids(self, piece: str, continued: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(_GUARDED.split(piece)):
            written_by_person = index % 2 == 1
            self._backend.encode_special_tokens = written_by_person
            part_ids, _ = self._ids_and_offsets(part, continued=continued or index > 0)
            self._backend.encode_special_tokens = False
            if written_by_person and self.id_of(part) in part_ids:
                raise DataError(
                    f"content: {part!r} stands in the text, and the tokenizer knows it only as a control token"
                )
            ids += part_ids
        return ids

    def _after_swallowed_spaces(self, text: str, end: int) -> int:
        """Tokens such as Phi-3's `<|end|>` take the whitespace after them into themselves."""
        if self._swallows_spaces and text.endswith(self._swallows_spaces, 0, end):
            return len(text) - len(text[end:].lstrip())
        return end

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def check_encodable(text: str) -> None:
    """Raises DataError for what JSON can say and no encoding can write."""
    if half := _HALF.search(text):
        raise DataError(f"found {half[0]!a} in the text, half of a surrogate pair, which is no character", "not text")


def _any_of(literals: Iterable[str]) -> str:
    longest_first = sorted(literals, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int] | np.ndarray) -> str:
    """The text of `ids`, special tokens included."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text
