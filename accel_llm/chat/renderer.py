"""Renders conversations with one template, under the keys that it reads, and finds out how it writes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from accel_llm.chat.arrival import CALL_NAMES, has_tools, left_out, probe_conversations, said_kinds
from accel_llm.chat.frame import FRAME_CHAT, find_frame
from accel_llm.chat.guard import ControlGuard
from accel_llm.chat.messages import Message
from accel_llm.chat.prefixes import Prefixes
from accel_llm.chat.reads import template_reads
from accel_llm.chat.sandbox import TEMPLATE_ERRORS, begin_render, check_template_size, run_bounded
from accel_llm.chat.spelling import Spelling
from accel_llm.chat.targets import AnswerFrame, Render
from accel_llm.errors import DataError

Tools = list[Any] | None  # JSON schemas

TEMPLATE_REFUSED = "refused by the chat template"  # reason to refuse a row, see `values`
MAX_REFUSAL_LENGTH = 500  # characters of a template's own error message
PROBES = probe_conversations()
LONG_CHAT = 6  # messages from which on `Prefixes` is faster than a render for each turn
KEPT_TEXTS = 8  # of the first messages of a conversation; each is asked for again soon or not at all


class Renderer:
    """A template's source with the variables of every render; `guard` marked the control tokens in what it renders.

    Its renders have no limits: call it in `run_bounded`.

    Raises:
        ConfigError: the source is implausibly long, or the template exceeds a limit of `sandbox`.
        DataError: it cannot be compiled.
    """

    def __init__(self, source: str, variables: dict[str, Any], guard: ControlGuard):
        check_template_size(source)
        self.source, self.variables, self._guard = source, variables, guard
        with _refusals():
            self.reads = run_bounded(template_reads, source)
        self.spelling = Spelling(self.reads)
        self.frame_prompt = ""  # the prompt after the question of `FRAME_CHAT`
        self.frame_tools: Tools = None  # tools, if the template renders nothing without them

    def find_frame(self, added_pattern: str) -> AnswerFrame:
        """Find out how an answer is written; some templates need tools, or content in parts, to write one at all.

        `added_pattern` matches the tokenizer's added tokens. Must be called before anything is rendered.

        Raises:
            DataError: the template refuses a question with its answer, or leaves out the answer.
        """
        problem: DataError | None = None
        for self.spelling.in_parts in (False, True):
            for tools in (None, PROBES[0][1]):
                try:
                    frame = self._try_frame(tools, added_pattern)
                    self.frame_tools = tools
                except DataError as error:
                    problem = problem or error
                else:
                    self._choose_empty_content()
                    return frame
        assert problem is not None
        raise problem

    def find_tool_frame(self, added_pattern: str) -> AnswerFrame | None:
        """Find out how an answer is written in a conversation with tools; None if the template refuses one.

        Command R7B's template then ends every text with an open prompt.
        """
        prompt = self.frame_prompt
        try:
            return self._try_frame(PROBES[0][1], added_pattern)
        except DataError:
            return None
        finally:
            self.frame_prompt = prompt

    def _try_frame(self, tools: Tools, added_pattern: str) -> AnswerFrame:
        def try_render(messages: list[Message], add_generation_prompt: bool) -> str:
            return self.try_render(self.spelling.place_tools(messages, tools), add_generation_prompt, tools)

        text = run_bounded(self.render, self.spelling.place_tools(FRAME_CHAT, tools), False, tools)
        self.frame_prompt = run_bounded(self.render, self.spelling.place_tools(FRAME_CHAT[:1], tools), True, tools)
        return run_bounded(find_frame, text, self.frame_prompt, try_render, added_pattern)

    def _choose_empty_content(self) -> None:
        """DeepSeek-R1's template writes the calls of a message only if its content is null."""
        if "tool_calls" in self.reads.message_keys and CALL_NAMES in self._never_written:
            del self._never_written
            self.spelling.empty_content = None
            if CALL_NAMES in self._never_written:
                self.spelling.empty_content = ""

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: Tools = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Return the text of `apply_chat_template(tokenize=False)`.

        A content that is None stays (transformers 5.24 drops it): DeepSeek-R1's template asks for it beside calls.

        Raises:
            DataError: the template refuses the conversation; the template's own message is in the error.
        """
        begin_render()
        spelled = self.spelling.spell(messages)
        options = {
            **self.variables,
            **(variables or {}),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        with _refusals():
            text = render_jinja_template([spelled], chat_template=self.source, **options)[0][0]
        return self._guard.restore(text, (messages, tools, variables))

    def try_render(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: Tools = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Render a part of a conversation; "" if the template refuses it. It may refuse a part and accept the whole."""
        try:
            return self.render(messages, add_generation_prompt, tools, variables) if messages else ""
        except DataError:
            return ""

    def of_first_messages(
        self, messages: list[Message], tools: Tools = None, variables: dict[str, Any] | None = None
    ) -> Render:
        """Return a function that renders the first messages of a conversation; "" if the template refuses them.

        All of them together cost about one render. The last texts are kept.
        """
        prefixes: Prefixes | None = None
        if len(messages) >= LONG_CHAT:
            all_variables = {**self.variables, **(variables or {})}
            prefixes = Prefixes(self.source, all_variables, self.spelling.spell(messages), tools)

        @lru_cache(KEPT_TEXTS)
        def render(count: int, add_generation_prompt: bool) -> str:
            if prefixes is None:
                return self.try_render(messages[:count], add_generation_prompt, tools, variables)
            try:
                with _refusals():
                    text = prefixes.render(count, add_generation_prompt) if count else ""
                return self._guard.restore(text, (messages, tools, variables))
            except DataError:
                return ""

        return render

    def left_out(self, messages: list[Message], tools: Tools, text: str) -> tuple[str, ...]:
        """Return what of a conversation is not in `text`, its render, as `arrival` names it."""
        missing = left_out(messages, tools, text)
        if has_tools(messages, tools):
            # What the template never writes is missing, even if the same words happen to stand elsewhere.
            missing |= self._never_written & said_kinds(messages, tools)
        return tuple(sorted(missing))

    @cached_property
    def _never_written(self) -> set[str]:
        missing: set[str] = set()
        for messages, tools in PROBES:
            text = run_bounded(self.try_render, self.spelling.place_tools(messages, tools), False, tools)
            if text:
                missing |= left_out(messages, tools, text)
        return missing


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn an error of a template into a DataError: it is a program, and may fail in any of Python's ways.

    A TemplateSyntaxError stays as it is: it does not depend on the conversation.
    """
    try:
        yield
    except TemplateSyntaxError:
        raise
    except TEMPLATE_ERRORS as error:
        words = str(error)[:MAX_REFUSAL_LENGTH]
        if any(hint in words for hint in ("no attribute 'parameters'", "Undefined is not JSON serializable")):
            words += '; a tool has no parameters: give it {"type": "object", "properties": {}} if it takes none'
        raise DataError(f"the chat template refuses this conversation: {words}", TEMPLATE_REFUSED) from error
