"""Finds the trained characters of a conversation, turn by turn, from the template's own renders."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from accel_llm.chat.messages import Message
from accel_llm.chat.span_tokenizer import Span

IGNORED = -100  # label of an untrained token: the default ignore_index of PyTorch's cross_entropy


TrainOn = Literal["assistant", "last_assistant", "all"]
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text, "" if the template refuses

# Reasons why an assistant turn is not trained; the ledger counts turns by them.
NO_PROMPT = "the template cannot render the prompt of this turn"
NOT_AFTER_PROMPT = "the template does not continue its own prompt with this turn"
UNKNOWN_END = "the template closes this turn in an unknown way"
NO_CALL = "the template does not write the tool calls of this turn"
REWRITTEN = "the template rewrites this turn once another one follows"


class Target(NamedTuple):
    """Trained characters [start, end) of a text, and the weight of each of their labels in the loss."""

    start: int
    end: int
    weight: float


class TargetLayout(NamedTuple):
    """The rows of a conversation before tokenization: each text with its targets.

    `lost` counts the untrained assistant turns by reason. `shown_as_history` and `without_reasoning` are explained at
    `template.EncodedConversation`.
    """

    rows: list[tuple[str, list[Target]]]
    lost: dict[str, int]
    shown_as_history: int
    without_reasoning: int


class AnswerFrame(NamedTuple):
    """How a template writes the last answer of a conversation.

    `opening` stands between the generation prompt and the content, `tail` after the content; `writes_reasoning` says
    whether the template writes the answer's reasoning.
    """

    opening: str
    tail: str
    writes_reasoning: bool


class TargetFinder:
    """Finds which characters of a template's texts are trained.

    `frame` describes the template's last answer; the first `closing` characters of its tail are trained: the
    end-of-turn token. `added_pattern` is a regular expression that matches the tokenizer's added tokens.
    """

    def __init__(self, frame: AnswerFrame, closing: int, added_pattern: str):
        self._opening, self._tail, self._writes_reasoning = frame
        self._closing = closing
        self._added_token_at_end = re.compile(rf"({added_pattern})\s*$")

    def lay_out(
        self, messages: list[Message], full: str, render: Render, train_on: TrainOn, split_turns: bool
    ) -> TargetLayout:
        """Return the rows of a conversation and their targets; see `Template.encode` for the options.

        `full` is the render of all messages; `render` renders the first messages of the conversation.
        """
        if train_on == "all":
            return TargetLayout([(full, [Target(0, len(full), 1.0)])], {}, 0, 0)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last_assistant":
            turns = turns[-1:]
        in_full: list[Target] = []  # turns that are trained inside the full text
        own_rows: list[tuple[str, list[Target]]] = []  # turns that need a row of their own
        lost: Counter[str] = Counter()
        shown_as_history = without_reasoning = 0
        for turn in turns:
            message = messages[turn]
            weight = float(message.get("weight", 1.0))
            if not message.get("train", True) or not weight:
                continue
            # What the model must generate: the difference between the turn's prompt and the finished turn.
            finished = full if turn == len(messages) - 1 else render(messages[: turn + 1], False)
            span = self._find_span(render(messages[:turn], True), finished, message)
            if isinstance(span, str):
                lost[span] += 1
                continue
            without_reasoning += not self._writes_reasoning and _has_reasoning(message)
            # Where it is trained: in the full text if that contains the finished turn unchanged.
            if full.startswith(finished[: span.end]):
                in_full.append(Target(*span, weight))
            elif split_turns:
                own_rows.append((finished, [Target(*span, weight)]))
            elif history_span := self._find_in_history(message, full, finished, span):
                in_full.append(Target(*history_span, weight))
                shown_as_history += 1
            else:
                lost[REWRITTEN] += 1
        rows = [(full, in_full)] * bool(in_full) + own_rows
        return TargetLayout(rows, dict(lost), shown_as_history, without_reasoning)

    def _find_span(self, prompt: str, finished: str, message: Message) -> Span | str:
        """Return the characters of `finished` that the model must generate after `prompt`, or why there are none."""
        if not prompt or not finished:
            return NO_PROMPT
        if not finished.startswith(prompt):
            return NOT_AFTER_PROMPT
        calls = message.get("tool_calls") or []
        if finished.endswith(self._tail):
            end = len(finished) - len(self._tail) + self._closing
        elif calls and (match := self._added_token_at_end.search(finished)):
            end = match.end(1)  # gpt-oss closes a tool call with another token than an answer
        else:
            return UNKNOWN_END
        if any(call["function"]["name"] not in finished[len(prompt) : end] for call in calls):
            return NO_CALL
        return Span(len(prompt), end) if end > len(prompt) else NOT_AFTER_PROMPT

    def _find_in_history(self, message: Message, full: str, finished: str, span: Span) -> Span | None:
        """Return where `full` shows a turn without the template's opening of a last answer, else None.

        The turn must follow the same prompt, and all of its own text must still be there (Qwen3 removes only its empty
        think block).
        """
        text = finished[span.start : span.end].removeprefix(self._opening)
        if not self._opening or _has_reasoning(message) or message["content"].strip() not in text:
            return None
        if not full.startswith(finished[: span.start] + text):
            return None
        return Span(span.start, span.start + len(text))


def _has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content") or message.get("thinking"))
