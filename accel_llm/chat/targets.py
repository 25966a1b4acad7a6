"""Finds the trained characters of a conversation, turn by turn, from the template's own renders."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from accel_llm.chat.messages import Message
from accel_llm.chat.span_tokenizer import Span
from accel_llm.chat.thoughts import after_thought, reasoning_of

IGNORED = -100  # label of an untrained token: the default ignore_index of PyTorch's cross_entropy


TrainOn = Literal["assistant", "last_assistant", "all"]
SplitTurns = Literal[True, False, "auto"]
OpenThought = Literal["refuse", "close", "history"]
# (number of messages, add_generation_prompt) -> text of the first messages, "" if the template refuses them
Render = Callable[[int, bool], str]

# Reasons why an assistant turn is not trained; the ledger counts turns by them.
NO_PROMPT = "the template cannot render the prompt of this turn"
NOT_AFTER_PROMPT = "the template does not continue its own prompt with this turn"
NO_THOUGHT = "the template's prompt opens a thought, which this turn does not continue"
CLOSED_THOUGHT = "the template's prompt closes the thought of this turn, which has reasoning"
UNKNOWN_END = "the template closes this turn in an unknown way"
NO_CALL = "the template does not write the tool calls of this turn"
REWRITTEN = "the template rewrites this turn once another one follows"


LONGEST_TOKEN = 256  # characters, of a control token


class Target(NamedTuple):
    """Trained characters [start, end) of a text, and the weight of each of their labels in the loss."""

    start: int
    end: int
    weight: float


class TargetLayout(NamedTuple):
    """The rows of a conversation before tokenization: each text with its targets.

    `lost` counts the untrained assistant turns by reason. The other counts are explained at
    `template.EncodedConversation`.
    """

    rows: list[tuple[str, list[Target]]]
    lost: dict[str, int]
    shown_as_history: int = 0
    without_reasoning: int = 0
    closed_thoughts: int = 0
    left_out: tuple[str, ...] = ()
    built: int = 0  # turns that were put together here


class Thought(NamedTuple):
    """A thought with which the generation prompt ends, and that finished turns need not continue.

    `opening` is the end of the prompt (DeepSeek-R1's `<think>` and a line end). `closing` is what the template writes
    between a thought and its answer; "" if the prompt itself closes the thought (Gemma 4). `empty` is what the template
    writes in place of both if the last answer has no thought.
    """

    opening: str
    closing: str
    empty: str
    tags: tuple[str, str]  # what opens it, what closes it


class AnswerFrame(NamedTuple):
    """How a template writes the last answer of a conversation.

    `opening` stands between the generation prompt and the content, `tail` after the content; the first `closing`
    characters of `tail` close the turn; `header` is what the generation prompt adds. `around_reasoning` stands before and after an answer's reasoning; None if the
    template does not write it. `thought` is None if the prompt opens none.
    """

    opening: str
    tail: str
    closing: int
    header: str
    around_reasoning: tuple[str, str] | None
    thought: Thought | None


class _Turn(NamedTuple):
    """An assistant turn as the model must generate it: `text[span]`."""

    text: str
    span: Span
    closing: int  # the last characters of the span, which close the turn
    own: int  # where the turn's own text begins, after the template's opening or the reasoning
    history: int  # where history may begin the turn: before a thought that the prompt opens, else at the span
    built: bool = False  # put together here, because the template itself does not continue its prompt
    as_history: bool = False  # trained without the thought that the prompt opens


class TargetFinder:
    """Finds which characters of a template's texts are trained.

    `frame` describes the template's last answer. `added_pattern` is a regular expression that matches the tokenizer's
    added tokens.
    """

    def __init__(self, frame: AnswerFrame, added_pattern: str):
        self.frame = frame
        self._added_token = re.compile(added_pattern)
        ends, header = self._added_token.findall(frame.tail[: frame.closing]), frame.header.lstrip()
        self._end_and_header = (
            re.compile(f"{re.escape(ends[-1])}(\\s*{re.escape(header)})") if ends and header else None
        )
        self._added_token_at_end = re.compile(rf"(?:{added_pattern})$")

    def lay_out(
        self,
        messages: list[Message],
        full: str,
        render: Render,
        train_on: TrainOn,
        split_turns: SplitTurns,
        open_thought: OpenThought,
    ) -> TargetLayout:
        """Return the rows of a conversation and their targets; see `Template.encode` for the options.

        `full` is the render of all messages.
        """
        if train_on == "all":
            unwritten = sum(not self._is_written(message, full) for message in messages)
            return TargetLayout([(full, [Target(0, len(full), 1.0)])], {}, without_reasoning=unwritten)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last_assistant":
            turns = turns[-1:]
        in_full: list[Target] = []  # turns that are trained inside the full text
        own_rows: list[tuple[str, list[Target]]] = []  # turns that need a row of their own
        lost: Counter[str] = Counter()
        history = without_reasoning = closed_thoughts = built = 0
        for index in turns:
            message, is_last = messages[index], index == len(messages) - 1
            weight = float(message.get("weight", 1.0))
            if not message.get("train", True) or not weight:
                without_reasoning += not self._is_written(message, full)
                continue
            # What the model must generate: the difference between the turn's prompt and the finished turn.
            finished = full if is_last else render(index + 1, False)
            turn = self._find_turn(render(index, True), finished, message, open_thought)
            if turn == NOT_AFTER_PROMPT:
                turn = self._find_after_header(index, finished, message, render)
            if isinstance(turn, str):
                lost[turn] += 1
                continue
            if turn.built and is_last:
                full = turn.text
            # Where it is trained: in the full text if that contains the finished turn unchanged.
            if full.startswith(turn.text[: turn.span.end]):
                in_full += self._cut_headers(turn, message, weight)
            elif split_turns is True:
                own_rows.append((turn.text, self._cut_headers(turn, message, weight)))
            elif history_span := self._find_in_history(message, full, turn, open_thought == "history"):
                in_full.append(Target(*history_span, weight))
                turn = turn._replace(built=False, as_history=True)
            elif split_turns == "auto":
                own_rows.append((turn.text, self._cut_headers(turn, message, weight)))
            else:
                lost[REWRITTEN] += 1
                continue
            history += turn.as_history
            built += turn.built
            closed_thoughts += turn.built and not _has_reasoning(message)
            without_reasoning += not (turn.built or self._is_written(message, turn.text, turn.as_history))
        rows = [(full, in_full)] * bool(in_full) + own_rows
        return TargetLayout(rows, dict(lost), history, without_reasoning, closed_thoughts, built=built)

    def _find_turn(self, prompt: str, finished: str, message: Message, open_thought: OpenThought) -> _Turn | str:
        """Return the turn that the model must generate after `prompt`, or why there is none."""
        if not prompt or not finished:
            return NO_PROMPT
        thought = self.frame.thought
        turn = self._end_turn(prompt, finished, message) if finished.startswith(prompt) else None
        if isinstance(turn, _Turn) and thought and thought.closing and prompt.endswith(thought.opening):
            # Nemotron Nano v2 leaves the thought open, and writes the answer into it.
            turn = turn if thought.tags[1] in finished[len(prompt) :] else None
        if turn is None:
            if thought is None or not prompt.endswith(thought.opening):
                return NOT_AFTER_PROMPT
            turn = self._close_thought(prompt, finished, message, thought, open_thought)
        if isinstance(turn, str):
            return turn
        calls = message.get("tool_calls") or []
        if any(call["function"]["name"] not in turn.text[turn.span.start : turn.span.end] for call in calls):
            return NO_CALL
        return turn

    def _end_turn(self, prompt: str, text: str, message: Message) -> _Turn | str:
        """Return the turn that `text` adds to `prompt`, which it begins with; or why there is none."""
        end, closing = self._find_end(text, message)
        if end is None:
            return UNKNOWN_END
        if end <= len(prompt):
            return NOT_AFTER_PROMPT
        start = own = len(prompt)
        if _has_reasoning(message):
            own += self._length_of_reasoning(text[start:], message)
        elif text.startswith(self.frame.opening, start):
            own += len(self.frame.opening)
        thought = self.frame.thought
        history = start - len(thought.opening) if thought and prompt.endswith(thought.opening) else start
        return _Turn(text, Span(start, end), closing, own, history)

    def _length_of_reasoning(self, text: str, message: Message) -> int:
        """Return how many characters of `text`, which follows the prompt, are the reasoning and the words around it."""
        before, after = self.frame.around_reasoning or ("", "")
        reasoning = reasoning_of(message)
        for form in (reasoning, reasoning.strip(), reasoning.strip("\n")):
            if text.startswith(before + form + after):
                return len(before + form + after)
        return 0

    def _is_written(self, message: Message, text: str, as_history: bool = False) -> bool:
        """Return whether the reasoning of a message, if it has any, is in `text`."""
        if message["role"] != "assistant" or not _has_reasoning(message):
            return True
        # The same words may stand elsewhere; but what a template never writes is not there.
        never = as_history or self.frame.around_reasoning is None
        if message.get("reasoning_content") and not message.get("tool_calls") and never:
            return False
        return reasoning_of(message).strip() in text

    def _cut_headers(self, turn: _Turn, message: Message, weight: float) -> list[Target]:
        """Return the targets of a turn: without the header that some templates write between an answer and its calls.

        Nemotron Nano v2 makes two turns of them: generation ends with the first, and a new prompt writes the header.
        """
        targets, place = [], turn.span.start
        if message.get("tool_calls") and self._end_and_header:
            # People's tokens have marks around them, so the template's own end is followed by its own header.
            for match in self._end_and_header.finditer(turn.text, *turn.span):
                targets.append(Target(place, match.start(1), weight))
                place = match.end()
        return [*targets, Target(place, turn.span.end, weight)]

    def _close_thought(
        self, prompt: str, finished: str, message: Message, thought: Thought, open_thought: OpenThought
    ) -> _Turn | str:
        """Return a turn that the template writes without the thought that its prompt opens; or why there is none."""
        start = len(prompt) - len(thought.opening)
        if not finished.startswith(prompt[:start]):
            return NOT_AFTER_PROMPT
        reasoning = str(message.get("reasoning_content") or "")
        answer = finished[len(prompt) :]
        if not finished.startswith(prompt):
            answer = after_thought(finished[start:], thought.tags, thought.empty)
        if reasoning and not thought.closing:
            return CLOSED_THOUGHT
        if not reasoning and thought.closing and open_thought == "refuse":
            return NO_THOUGHT
        if not reasoning and thought.closing and open_thought == "history":
            start += len(thought.empty) if finished.startswith(thought.empty, start) else 0
            turn = self._end_turn(finished[:start], finished, message)
            return turn._replace(as_history=True) if isinstance(turn, _Turn) else turn
        # Close the thought, around the row's reasoning if it has one.
        text = prompt + reasoning + thought.closing + answer
        turn = self._end_turn(prompt, text, message)
        if isinstance(turn, _Turn):
            turn = turn._replace(own=len(text) - len(answer), history=start, built=True)
        return turn

    def _find_end(self, text: str, message: Message) -> tuple[int | None, int]:
        """Return where the turn that ends `text` ends, and how many characters before that close it."""
        frame = self.frame
        if text.endswith(frame.tail):
            return len(text) - len(frame.tail) + frame.closing, frame.closing
        # gpt-oss closes a tool call with another token than an answer.
        bare = text.removesuffix(frame.tail[frame.closing :]).rstrip()
        if message.get("tool_calls") and (
            match := self._added_token_at_end.search(bare, max(0, len(bare) - LONGEST_TOKEN))
        ):
            return match.end(), len(match[0])
        return None, 0

    def _find_after_header(self, index: int, finished: str, message: Message, render: Render) -> _Turn | str:
        """Return a turn whose context the template writes in another way than in its prompt; or why there is none.

        Hermes 3 writes a line end after a tool result once an answer follows. The turn is trained where the template
        shows it, if its whole text stands between the last header, as the prompt ends with it, and its own end.
        """
        prompt, before = render(index, True), render(index, False)
        header = prompt.removeprefix(before) if before and prompt.startswith(before) else ""
        content, (end, closing) = str(message["content"]).strip(), self._find_end(finished, message)
        # People's text holds no control token without marks around it, so the last header is that of this turn.
        if end is None or not self._added_token.search(header):
            return NOT_AFTER_PROMPT
        start = finished.rfind(header, 0, end) + len(header)
        own = finished[start : end - closing]
        calls = message.get("tool_calls") and own.lstrip().startswith(content) and not self._holds_an_end(own)
        if start < len(header) or not own.strip() or not (calls or own.strip() == content):
            return NOT_AFTER_PROMPT
        return _Turn(finished, Span(start, end), closing, start, start, as_history=True)

    def _holds_an_end(self, text: str) -> bool:
        ends = self._added_token.findall(self.frame.tail[: self.frame.closing])
        return bool(ends) and ends[-1] in text

    def _find_in_history(self, message: Message, full: str, turn: _Turn, drop_reasoning: bool) -> Span | None:
        """Return where `full` shows a turn without the template's own words of a last answer, else None.

        Missing may be the words before the answer (Qwen3's empty think block) and those that close it (gpt-oss, OLMo).
        The turn must follow the same prompt, and all of its own text must still be there. `drop_reasoning` allows that
        its reasoning is not.
        """
        (start, end), own = turn.span, turn.text[turn.own : turn.span.end]
        # Where the turn may stand: after how many characters of its own row, and after which words of the template.
        candidates = [(start, "", turn.text[start:end])]
        if str(message["content"]).strip() in own and (drop_reasoning or not _has_reasoning(message)):
            leads = [self.frame.thought.empty, self.frame.thought.closing.strip()] if self.frame.thought else []
            candidates += [(start, "", own), *((turn.history, lead, own) for lead in (*leads, ""))]
        for place, lead, text in candidates:
            first = place + len(lead)
            if not (full.startswith(turn.text[:place]) and full.startswith(lead, place)):
                continue
            for length in (len(text), len(text) - turn.closing):
                if length > 0 and full.startswith(text[:length], first):
                    return Span(first, first + length)
        return None


def _has_reasoning(message: Message) -> bool:
    return bool(reasoning_of(message))
