"""Speed only: the targets of a conversation's shape, learnt once and recalled. Without it every row is rendered turn by turn."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError

from accel_llm.chat.messages import Message
from accel_llm.chat.sandbox import MAX_GROWTH, begin_render
from accel_llm.chat.stand_ins import Asked, Trace, Untraceable, fill_in, formatted, replay, traceable
from accel_llm.chat.targets import Render, Target, TargetLayout, TrainOn

MAX_SHAPES, MAX_PATTERNS = 4096, 8  # remembered; what is beyond them is worked out each time
_PLAIN_FIELDS = {"role", "content", "reasoning_content", "thinking", "train", "weight"}


class Pattern(NamedTuple):
    """The layout of every conversation of one shape that answers `asked` alike. A row is cut into pieces, context and
    target in turn, each of them written as `traces.formatted`; `weights` are those of the targets."""

    asked: list[Asked]
    rows: list[tuple[list[tuple[str, tuple[int, ...]]], list[float]]]
    lost: dict[str, int]
    shown_as_history: int
    without_reasoning: int


class PatternCache:
    """The layouts that one template gives to conversations, remembered by the shape of the conversation.

    `source` and `variables` are the template's, `find` works a layout out from renders (`TargetFinder.lay_out`).
    """

    def __init__(self, source: str, variables: dict[str, Any], find: Callable[..., TargetLayout]):
        self._source, self._variables, self._lay_out = source, variables, find
        self._patterns: dict[Any, list[Pattern]] = {}
        self._renders: dict[Any, list[tuple[list[Asked], str]]] = {}

    def recall(
        self, messages: list[Message], variables: dict[str, Any] | None, train_on: TrainOn, split_turns: bool
    ) -> TargetLayout | None:
        """The layout of a conversation from a pattern learnt before; None if no pattern fits."""
        texts = _texts(messages) if self._patterns else None
        if texts is None:
            return None
        for pattern in self._patterns.get(_key(messages, variables, train_on, split_turns), ()):
            layout = _filled(pattern, texts)
            if layout is not None:
                return layout
        return None

    def learn(
        self,
        messages: list[Message],
        render: Render,
        variables: dict[str, Any] | None,
        train_on: TrainOn,
        split_turns: bool,
    ) -> TargetLayout | None:
        """The layout of a conversation from a pattern that is learnt now and kept; None if no pattern can tell."""
        texts = _texts(messages)
        if texts is None or traceable(self._source) is None:
            return None
        key = _key(messages, variables, train_on, split_turns)
        known = self._patterns.get(key, [])
        if len(known) >= MAX_PATTERNS or (not known and len(self._patterns) >= MAX_SHAPES):
            return None
        pattern = self._learn(messages, texts, render, variables, train_on, split_turns)
        if pattern is None:
            return None
        self._patterns[key] = [*known, pattern]
        return _filled(pattern, texts)

    def _learn(
        self,
        messages: list[Message],
        texts: list[str],
        render: Render,
        variables: dict[str, Any] | None,
        train_on: TrainOn,
        split_turns: bool,
    ) -> Pattern | None:
        trace = Trace(texts)

        def traced(some: list[Message], add_generation_prompt: bool) -> str:
            return self._traced(some, add_generation_prompt, variables, trace, len(texts))

        stand_ins = _stand_ins(messages, trace)
        try:
            full = traced(stand_ins, False)
            layout = self._lay_out(stand_ins, full, traced, train_on, split_turns)
        except (Untraceable, TypeError):
            return None
        rewritten = layout.lost or layout.shown_as_history or layout.without_reasoning or len(layout.rows) > 1
        if len(trace.texts) > len(texts) and rewritten:
            return None  # whether a made text equals another one is beyond a pattern
        if not full or fill_in(full, trace.texts) != render(messages, False):
            return None
        rows = [(_cut(text, targets), [target.weight for target in targets]) for text, targets in layout.rows]
        if any(sum(len(numbers) for _, numbers in pieces) > MAX_GROWTH * len(texts) for pieces, _ in rows):
            return None  # filled in without bounds, long texts that are written again and again would be too much
        return Pattern(trace.asked, rows, *layout[1:])

    def _traced(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        variables: dict[str, Any] | None,
        trace: Trace,
        given: int,
    ) -> str:
        """The text of stand-ins, "" if the template refuses them. Conversations begin alike, so a beginning that was
        rendered before is remembered, as long as nothing was made of the `given` texts."""
        template = traceable(self._source)
        if not messages or template is None:
            return ""
        key = _shape(messages), add_generation_prompt, repr(variables) if variables else None
        known = self._renders.get(key, [])
        for asked, text in known:
            if trace.agrees(asked):
                return text
        trace.touched.clear()
        values = {**self._variables, **(variables or {}), "tools": None, "documents": None}
        begin_render()
        try:
            text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except TemplateError:
            text = ""
        if len(trace.texts) == given and len(known) < MAX_PATTERNS and len(self._renders) < MAX_SHAPES:
            self._renders.setdefault(key, []).append((list(trace.touched), text))
        return text


def _key(messages: list[Message], variables: dict[str, Any] | None, train_on: TrainOn, split_turns: bool) -> Any:
    return _shape(messages), train_on, split_turns, repr(variables) if variables else None


def _shape(messages: list[Message]) -> tuple[tuple[Any, ...], ...]:
    """What a template can tell apart without looking at a text."""
    return tuple([(m["role"], m.get("train"), m.get("weight"), "reasoning_content" in m) for m in messages])


def _texts(messages: list[Message]) -> list[str] | None:
    """What people wrote in `messages`, in order; None if there is more in them than texts."""
    texts = []
    for message in messages:
        content = message["content"]
        if not message.keys() <= _PLAIN_FIELDS or not isinstance(content, str):
            return None
        if message.get("thinking", message.get("reasoning_content")) != message.get("reasoning_content"):
            return None
        texts.append(content)
        if "reasoning_content" in message:
            texts.append(message["reasoning_content"])
    return texts


def _stand_ins(messages: list[Message], trace: Trace) -> list[Message]:
    """`messages` with stand-ins for the texts of `_texts`."""
    changed, number = [], 0
    for message in messages:
        texts = {"content": trace.stand_in(number)}
        if "reasoning_content" in message:
            # transformers writes a thought under each name that templates read it by.
            texts |= dict.fromkeys(("reasoning_content", "thinking"), trace.stand_in(number + 1))
            number += 1
        changed.append({**message, **texts})
        number += 1
    return changed


def _cut(text: str, targets: list[Target]) -> list[tuple[str, tuple[int, ...]]]:
    borders = [0, *(border for target in targets for border in (target.start, target.end)), len(text)]
    return [formatted(text[start:end]) for start, end in pairwise(borders)]


def _filled(pattern: Pattern, texts: list[str]) -> TargetLayout | None:
    """The layout of a conversation with these texts; None if it answers otherwise."""
    every = replay(pattern.asked, texts)
    if every is None:
        return None
    rows = []
    for pieces, weights in pattern.rows:
        written = [form % tuple([every[number] for number in numbers]) for form, numbers in pieces]
        ends = list(accumulate(map(len, written)))
        targets = [Target(*target) for target in zip(ends[0::2], ends[1::2], weights, strict=False)]
        rows.append(("".join(written), targets))
    return TargetLayout(rows, *pattern[2:])
