"""Which characters of a conversation's texts are trained: worked out turn by turn, or from a pattern of its shape."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from accel_llm.chat.sandbox import TIMES, begin
from accel_llm.chat.span_tokenizer import Span
from accel_llm.chat.stand_ins import Asked, Trace, Untraceable, fill, formatted, replay, traceable

Message = dict[str, Any]
TrainOn = Literal["assistant", "last_assistant", "all"]
Render = Callable[[list[Message], bool], str]  # messages, add_generation_prompt -> text, "" if the template refuses

NO_PROMPT = "the template cannot render the prompt of this turn"
NOT_AFTER_PROMPT = "the template does not continue its own prompt with this turn"
NO_END = "the template closes this turn in an unknown way"
NO_CALL = "the template does not write the tool calls of this turn"
REWRITTEN = "the template rewrites this turn once another one follows"

MOST_SHAPES, MOST_PATTERNS = 4096, 8  # remembered; what is beyond them is worked out each time
_PLAIN_FIELDS = {"role", "content", "reasoning_content", "thinking", "train", "weight"}


class Target(NamedTuple):
    """Characters of a text that are trained, and how much each of their labels counts."""

    start: int
    end: int
    weight: float


class Layout(NamedTuple):
    """The texts of a conversation's rows with what is trained in each, before anything is tokenised."""

    rows: list[tuple[str, list[Target]]]
    lost: dict[str, int]
    shown_as_history: int
    without_reasoning: int


class Frame(NamedTuple):
    """How a template writes an answer that is the last: what stands between the generation prompt and its content, what
    follows the content, and whether its reasoning is written."""

    opening: str
    tail: str
    writes_reasoning: bool


class Pattern(NamedTuple):
    """The layout of every conversation of one shape that answers `asked` alike. A row is cut into pieces, context and
    target in turn, each of them written as `traces.formatted`; `weights` are those of the targets."""

    asked: list[Asked]
    rows: list[tuple[list[tuple[str, tuple[int, ...]]], list[float]]]
    lost: dict[str, int]
    shown_as_history: int
    without_reasoning: int


class Turns:
    """What one template makes of conversations: which characters of which texts are trained.

    `frame` is how it writes a last answer, of whose end `closing` characters are trained; `control` is the pattern of
    the tokenizer's added tokens.
    """

    def __init__(self, source: str, variables: dict[str, Any], frame: Frame, closing: int, control: str):
        self._source, self._variables = source, variables
        self._opening, self._tail, self._writes_reasoning = frame
        self._closing = closing
        self._control_at_end = re.compile(rf"({control})\s*$")
        self._patterns: dict[Any, list[Pattern]] = {}
        self._renders: dict[Any, list[tuple[list[Asked], str]]] = {}

    def recall(
        self, messages: list[Message], variables: dict[str, Any] | None, train_on: TrainOn, split_turns: bool
    ) -> Layout | None:
        """What `lay_out` returns, from a pattern learnt before; None where none fits."""
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
    ) -> Layout | None:
        """What `lay_out` returns, from a pattern that is learnt now and kept; None where no pattern can tell."""
        texts = _texts(messages)
        if texts is None or traceable(self._source) is None:
            return None
        key = _key(messages, variables, train_on, split_turns)
        known = self._patterns.get(key, [])
        if len(known) >= MOST_PATTERNS or (not known and len(self._patterns) >= MOST_SHAPES):
            return None
        pattern = self._learn(messages, texts, render, variables, train_on, split_turns)
        if pattern is None:
            return None
        self._patterns[key] = [*known, pattern]
        return _filled(pattern, texts)

    def lay_out(
        self, messages: list[Message], full: str, render: Render, train_on: TrainOn, split_turns: bool
    ) -> Layout:
        """See `chat.Template.encode`. `full` is the text of all messages; it and `render` may speak of stand-ins."""
        if train_on == "all":
            return Layout([(full, [Target(0, len(full), 1.0)])], {}, 0, 0)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last_assistant":
            turns = turns[-1:]
        inside: list[Target] = []
        alone: list[tuple[str, list[Target]]] = []
        lost: Counter[str] = Counter()
        shown_as_history = without_reasoning = 0
        for turn in turns:
            message = messages[turn]
            weight = float(message.get("weight", 1.0))
            if not message.get("train", True) or not weight:
                continue
            finished = full if turn == len(messages) - 1 else render(messages[: turn + 1], False)
            span = self._target(render(messages[:turn], True), finished, message)
            if isinstance(span, str):
                lost[span] += 1
                continue
            without_reasoning += not self._writes_reasoning and _has_reasoning(message)
            if full.startswith(finished[: span.end]):
                inside.append(Target(*span, weight))
            elif split_turns:
                alone.append((finished, [Target(*span, weight)]))
            elif shown := self._shown_as_history(message, full, finished, span):
                inside.append(Target(*shown, weight))
                shown_as_history += 1
            else:
                lost[REWRITTEN] += 1
        rows = [(full, inside)] * bool(inside) + alone
        return Layout(rows, dict(lost), shown_as_history, without_reasoning)

    def _target(self, prompt: str, finished: str, message: Message) -> Span | str:
        """The characters of `finished` that the model must generate after `prompt`, or why there are none."""
        if not prompt or not finished:
            return NO_PROMPT
        if not finished.startswith(prompt):
            return NOT_AFTER_PROMPT
        calls = message.get("tool_calls") or []
        if finished.endswith(self._tail):
            end = len(finished) - len(self._tail) + self._closing
        elif calls and (control := self._control_at_end.search(finished)):
            end = control.end(1)  # a call may be closed by a token of its own (gpt-oss)
        else:
            return NO_END
        if any(call["function"]["name"] not in finished[len(prompt) : end] for call in calls):
            return NO_CALL
        return Span(len(prompt), end) if end > len(prompt) else NOT_AFTER_PROMPT

    def _shown_as_history(self, message: Message, full: str, finished: str, span: Span) -> Span | None:
        """Where `full` shows the turn after the same prompt, whole but for the template's own opening of a last answer."""
        shown = finished[span.start : span.end].removeprefix(self._opening)
        if not self._opening or _has_reasoning(message) or message["content"].strip() not in shown:
            return None
        if not full.startswith(finished[: span.start] + shown):
            return None
        return Span(span.start, span.start + len(shown))

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
            layout = self.lay_out(stand_ins, full, traced, train_on, split_turns)
        except (Untraceable, TypeError):
            return None
        rewritten = layout.lost or layout.shown_as_history or layout.without_reasoning or len(layout.rows) > 1
        if len(trace.texts) > len(texts) and rewritten:
            return None  # whether a made text equals another one is beyond a pattern
        if not full or fill(full, trace.texts) != render(messages, False):
            return None
        rows = [(_cut(text, targets), [target.weight for target in targets]) for text, targets in layout.rows]
        if any(sum(len(numbers) for _, numbers in pieces) > TIMES * len(texts) for pieces, _ in rows):
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
        begin()
        try:
            text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except TemplateError:
            text = ""
        if len(trace.texts) == given and len(known) < MOST_PATTERNS and len(self._renders) < MOST_SHAPES:
            self._renders.setdefault(key, []).append((list(trace.touched), text))
        return text


def _key(messages: list[Message], variables: dict[str, Any] | None, train_on: TrainOn, split_turns: bool) -> Any:
    return _shape(messages), train_on, split_turns, repr(variables) if variables else None


def _shape(messages: list[Message]) -> tuple[tuple[Any, ...], ...]:
    """What a template can tell apart without looking at a text."""
    return tuple([(m["role"], m.get("train"), m.get("weight"), "reasoning_content" in m) for m in messages])


def _has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content") or message.get("thinking"))


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


def _filled(pattern: Pattern, texts: list[str]) -> Layout | None:
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
    return Layout(rows, *pattern[2:])
