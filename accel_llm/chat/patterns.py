"""For speed only: reuses the target layout of conversations that have the same shape.

Without this module every turn of every row is rendered (`targets.TargetFinder.lay_out`), with the same result.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from accel_llm.chat.guard import GUARD_OPEN
from accel_llm.chat.messages import Message
from accel_llm.chat.renderer import Renderer
from accel_llm.chat.sandbox import MAX_GROWTH, TEMPLATE_ERRORS, begin_render
from accel_llm.chat.stand_ins import (
    Question,
    Trace,
    Untraceable,
    compile_traceable,
    fill_stand_ins,
    format_string,
    replay,
    stand_in_numbers,
)
from accel_llm.chat.targets import Render, Target, TargetFinder, TargetLayout

MAX_SHAPES, MAX_PATTERNS = 4096, 8  # shapes in the cache, and patterns for each; others are worked out each time
# Learning takes a render for each turn, and longer conversations hardly share a shape: these are learned when a shape
# comes again, if at all.
MANY_MESSAGES, MAX_MESSAGES = 64, 512
_PLAIN_FIELDS = {"role", "content", "reasoning_content", "thinking", "train", "weight"}


class Pattern(NamedTuple):
    """The target layout of all conversations of one shape whose texts give the same answers to `questions`.

    A row is a list of pieces, context and target in turn, each a format string with the numbers of its texts
    (`stand_ins.format_string`), and the weights of its targets. The other fields are those of `TargetLayout`.
    """

    questions: list[Question]
    rows: list[tuple[list[tuple[str, tuple[int, ...]]], list[float]]]
    lost: dict[str, int]
    shown_as_history: int
    without_reasoning: int
    closed_thoughts: int
    left_out: tuple[str, ...]
    built: int


class PatternCache:
    """The target layouts of one template, cached by the shape of the conversation.

    `finder` works a layout out from renders. `options` are those of `TargetFinder.lay_out`.
    """

    def __init__(self, renderer: Renderer, finder: TargetFinder):
        self._renderer, self._finder = renderer, finder
        self._patterns: dict[Any, list[Pattern]] = {}
        self._renders: dict[Any, list[tuple[list[Question], str]]] = {}
        self._long_shapes: set[int] = set()
        frame = finder.frame
        self._openings = [frame.opening.strip(), *(frame.thought.tags if frame.thought else ())]

    def recall(
        self, messages: list[Message], variables: dict[str, Any] | None, options: tuple[Any, ...]
    ) -> TargetLayout | None:
        """Return a conversation's layout from a cached pattern; None if no pattern fits."""
        texts = _texts(messages) if self._patterns else None
        if texts is None:
            return None
        for pattern in self._patterns.get(_cache_key(messages, variables, options), ()):
            layout = self._fill(pattern, texts)
            if layout is not None:
                return layout
        return None

    def learn(
        self, messages: list[Message], render: Render, variables: dict[str, Any] | None, options: tuple[Any, ...]
    ) -> TargetLayout | None:
        """Return a conversation's layout from a new pattern, which is cached; None if it has no pattern."""
        texts = _texts(messages) if len(messages) <= MAX_MESSAGES else None
        if texts is None or compile_traceable(self._renderer.source) is None:
            return None
        key = _cache_key(messages, variables, options)
        if len(messages) > MANY_MESSAGES and not self._has_come_before(key):
            return None

        # Full caches learn nothing more.
        patterns = self._patterns.get(key, [])
        if len(patterns) >= MAX_PATTERNS or (not patterns and len(self._patterns) >= MAX_SHAPES):
            return None
        pattern = self._make_pattern(messages, texts, render, variables, options)
        layout = self._fill(pattern, texts) if pattern else None
        if pattern and layout:
            self._patterns[key] = [*patterns, pattern]
        return layout

    def _has_come_before(self, key: Any) -> bool:
        known = hash(key) in self._long_shapes
        if len(self._long_shapes) < MAX_SHAPES:
            self._long_shapes.add(hash(key))
        return known

    def _make_pattern(
        self,
        messages: list[Message],
        texts: list[str],
        render: Render,
        variables: dict[str, Any] | None,
        options: tuple[Any, ...],
    ) -> Pattern | None:
        trace = Trace(texts)
        stand_ins = _with_stand_ins(messages, trace)

        def render_traced(count: int, add_generation_prompt: bool) -> str:
            return self._render_stand_ins(stand_ins[:count], add_generation_prompt, variables, trace, len(texts))

        # Lay the conversation out with stand-ins for its texts.
        try:
            full = render_traced(len(messages), False)
            layout = self._finder.lay_out(stand_ins, full, render_traced, *options)
        except (Untraceable, *TEMPLATE_ERRORS):
            return None  # the real renders decide

        # Refuse what may not hold for other conversations of this shape. A turn is lost if one text does not begin with
        # another, and a real text might begin with it where its stand-in does not.
        unusual = layout.shown_as_history or layout.without_reasoning or layout.built or len(layout.rows) > 1
        if layout.lost or (len(trace.texts) > len(texts) and unusual):
            return None
        known = self._finder.frame.around_reasoning is None and all(message.get("train", True) for message in messages)
        if layout.without_reasoning and not (known and options[0] != "all"):
            return None  # the words of a reasoning that is not written may stand elsewhere
        if not full or fill_stand_ins(full, trace.texts) != render(len(messages), False):
            return None
        if not _arrive(_content_numbers(messages), full, trace, len(texts)):
            return None
        rows = [
            (_split_at_targets(text, targets), [target.weight for target in targets]) for text, targets in layout.rows
        ]
        if any(sum(len(numbers) for _, numbers in pieces) > MAX_GROWTH * len(texts) for pieces, _ in rows):
            return None  # it repeats texts, and a pattern is filled in without the limits that a render has
        return Pattern(trace.questions, rows, *layout[1:])

    def _fill(self, pattern: Pattern, texts: list[str]) -> TargetLayout | None:
        """Return the layout of a conversation with these texts; None if the pattern may not hold for them."""
        # An answer that itself begins with the template's opening may continue the prompt where others do not.
        unsure = pattern.shown_as_history or pattern.built or pattern.without_reasoning
        if any(question.new_texts for question in pattern.questions) and any(GUARD_OPEN in text for text in texts):
            return None  # the template may cut a control token out of a text, and leave its marks
        if unsure and any(opening and opening in text for opening in self._openings for text in texts):
            return None
        return _fill(pattern, texts)

    def _render_stand_ins(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        variables: dict[str, Any] | None,
        trace: Trace,
        text_count: int,
    ) -> str:
        """Render messages of stand-ins. Raises as the template does, and Untraceable.

        Conversations often begin alike, so renders are cached, unless the template made new texts of the conversation's
        `text_count` texts.
        """
        template = compile_traceable(self._renderer.source)
        if not messages or template is None:
            return ""

        # A cached render, if its questions have the same answers here.
        key = _shape(messages), add_generation_prompt, repr(variables) if variables else None
        renders = self._renders.get(key, [])
        for questions, text in renders:
            if trace.agrees(questions):
                return text

        # A new render, whose questions are collected in `trace.recent`.
        trace.recent.clear()
        values = {"documents": None, **self._renderer.variables, **(variables or {}), "tools": None}
        begin_render()
        text = template.render(
            messages=self._renderer.spelling.spell(messages), add_generation_prompt=add_generation_prompt, **values
        )
        if len(trace.texts) == text_count and len(renders) < MAX_PATTERNS and len(self._renders) < MAX_SHAPES:
            self._renders.setdefault(key, []).append((list(trace.recent), text))
        return text


def _cache_key(messages: list[Message], variables: dict[str, Any] | None, options: tuple[Any, ...]) -> Any:
    return _shape(messages), options, repr(variables) if variables else None


def _shape(messages: list[Message]) -> tuple[tuple[Any, ...], ...]:
    """Return everything that a template can distinguish without asking about a text."""
    return tuple([(m["role"], m.get("train"), m.get("weight"), "reasoning_content" in m) for m in messages])


def _texts(messages: list[Message]) -> list[str] | None:
    """Return the contents and reasonings of `messages`, in order; None if a message has anything else (tool calls)."""
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


def _content_numbers(messages: list[Message]) -> list[int]:
    """Return the numbers that the contents have among the texts of `_texts`."""
    numbers, number = [], 0
    for message in messages:
        numbers.append(number)
        number += 2 if "reasoning_content" in message else 1
    return numbers


def _arrive(numbers: list[int], full: str, trace: Trace, text_count: int) -> bool:
    """Return whether the render `full` holds each of these texts whole, but for spaces around it."""
    written = set(stand_in_numbers(full))
    stripped: dict[int, list[int]] = {}  # text -> the same text without spaces around it
    new_text = text_count
    for question in trace.questions:
        if question.new_texts and _keeps_all(question):
            for number in stand_in_numbers(question.marked):
                stripped.setdefault(number, []).append(new_text)
        new_text += question.new_texts

    def arrives(number: int) -> bool:
        return number in written or any(map(arrives, stripped.get(number, ())))

    return all(map(arrives, numbers))


def _keeps_all(question: Question) -> bool:
    """Return whether the new text of a question is the whole text, but for spaces around it."""
    if question.method in ("split", "rsplit"):
        return question.new_texts == 1
    spaces = not any(argument is not None and argument.strip() for argument in question.arguments)
    return question.method in ("strip", "lstrip", "rstrip") and spaces


def _with_stand_ins(messages: list[Message], trace: Trace) -> list[Message]:
    """Return `messages` with stand-ins for the texts, numbered in the order of `_texts`."""
    changed, number = [], 0
    for message in messages:
        texts = {"content": trace.stand_in(number)}
        if "reasoning_content" in message:  # its text comes after the content's
            # Templates read the reasoning under one of these two names.
            texts |= dict.fromkeys(("reasoning_content", "thinking"), trace.stand_in(number + 1))
            number += 1
        changed.append({**message, **texts})
        number += 1
    return changed


def _split_at_targets(text: str, targets: list[Target]) -> list[tuple[str, tuple[int, ...]]]:
    borders = [0, *(border for target in targets for border in (target.start, target.end)), len(text)]
    return [format_string(text[start:end]) for start, end in pairwise(borders)]


def _fill(pattern: Pattern, texts: list[str]) -> TargetLayout | None:
    """Return the layout of a conversation with these texts; None if they give other answers than the pattern's."""
    all_texts = replay(pattern.questions, texts)
    if all_texts is None:
        return None
    rows = []
    for pieces, weights in pattern.rows:
        # Pieces of context and target alternate, so their ends are the starts and ends of the targets.
        parts = [form % tuple([all_texts[number] for number in numbers]) for form, numbers in pieces]
        ends = list(accumulate(map(len, parts)))
        targets = [Target(*target) for target in zip(ends[0::2], ends[1::2], weights, strict=False)]
        rows.append(("".join(parts), targets))
    return TargetLayout(rows, *pattern[2:])
