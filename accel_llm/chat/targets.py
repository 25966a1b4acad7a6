"""Which characters of a conversation's texts are trained: worked out turn by turn, or from a pattern of its shape."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from accel_llm.chat.messages import Message
from accel_llm.chat.span_tokenizer import Span

IGNORED = -100  # the label of a token that no loss asks for: the default ignore_index of cross_entropy


TrainOn = Literal["assistant", "last_assistant", "all"]
Render = Callable[[list[Message], bool], str]  # messages, add_generation_prompt -> text, "" if the template refuses

NO_PROMPT = "the template cannot render the prompt of this turn"
NOT_AFTER_PROMPT = "the template does not continue its own prompt with this turn"
UNKNOWN_END = "the template closes this turn in an unknown way"
NO_CALL = "the template does not write the tool calls of this turn"
REWRITTEN = "the template rewrites this turn once another one follows"


class Target(NamedTuple):
    """Characters of a text that are trained, and how much each of their labels counts."""

    start: int
    end: int
    weight: float


class TargetLayout(NamedTuple):
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


class TargetFinder:
    """What one template makes of conversations: which characters of which texts are trained.

    `frame` is how it writes a last answer, of whose end `closing` characters are trained; `control` is the pattern of
    the tokenizer's added tokens.
    """

    def __init__(self, frame: Frame, closing: int, control: str):
        self._opening, self._tail, self._writes_reasoning = frame
        self._closing = closing
        self._control_at_end = re.compile(rf"({control})\s*$")

    def lay_out(
        self, messages: list[Message], full: str, render: Render, train_on: TrainOn, split_turns: bool
    ) -> TargetLayout:
        """See `chat.Template.encode`. `full` is the text of all messages; it and `render` may speak of stand-ins."""
        if train_on == "all":
            return TargetLayout([(full, [Target(0, len(full), 1.0)])], {}, 0, 0)
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
        return TargetLayout(rows, dict(lost), shown_as_history, without_reasoning)

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
            return UNKNOWN_END
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


def _has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content") or message.get("thinking"))
