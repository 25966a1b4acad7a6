"""Turns conversations into token ids and labels: a turn's trained span is what the model must generate at inference.

Two renders of the template define the span of assistant turn `i`: the prompt that inference feeds,
`render(messages[:i], add_generation_prompt=True)`, and the finished turn, `render(messages[: i + 1])`. Trained is what
the second adds to the first, up to the end-of-turn token and with it. If the render of the whole conversation contains
the finished turn unchanged, the turn is trained there. If not, the template rewrites history (Qwen3 drops earlier
thinking); then the turn is trained as history shows it, or gets a row of its own, or is counted as lost (`encode`).
Nothing is ever searched for in people's text, so an answer may contain the template's markers.

Token borders are those of inference as well: a prompt ends with the tokens that inference feeds, even if the tokenizer
would merge its last characters with the first ones of the answer.
"""

import re
from functools import cached_property
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from accel_llm.chat.encoded import EncodedConversation, EncodedRow
from accel_llm.chat.frame import ANSWER_OPEN, FRAME_CHAT, REASONING_MARK, find_thought_tags, split_tokens
from accel_llm.chat.guard import GUARD_CLOSE, GUARD_OPEN, ControlGuard
from accel_llm.chat.messages import Message
from accel_llm.chat.patterns import PatternCache
from accel_llm.chat.renderer import Renderer, Tools
from accel_llm.chat.sandbox import check_output_size, run_bounded
from accel_llm.chat.segments import Border, apply_segments, mark_segments
from accel_llm.chat.span_tokenizer import Span, SpanTokenizer
from accel_llm.chat.targets import IGNORED, OpenThought, SplitTurns, Target, TargetFinder, TargetLayout, TrainOn
from accel_llm.chat.template_source import describe_template, read_template
from accel_llm.chat.thoughts import with_own_reasoning
from accel_llm.config.data_options import DataOptions
from accel_llm.errors import ConfigError, DataError

TrainOnEos = Literal["turn", "last", "none"]
THINKING_VARIABLES = frozenset({"enable_thinking", "thinking"})  # names by which templates turn reasoning on


class _Layouts(NamedTuple):
    """What finds the targets of conversations of one kind; without a cache each is worked out by itself."""

    finder: TargetFinder
    patterns: PatternCache | None


class Template:
    """A chat template bound to a tokenizer; `load_template` builds it. It can be pickled.

    `turn_end` is the token that ends generation after an assistant turn, `turn_end_id` its id. Both are None if the
    template closes no turn; a model trained with such a template never learns to stop. `reads` says what the template
    takes from a row. `source_for_tools` is another template of the tokenizer, for conversations with tools. `thinking`
    is a variable that is set for conversations with reasoning, because the template would not write it otherwise.
    `in_one_piece` is for models that only read answers: no token border is put between a prompt and its answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        variables: dict[str, Any] | None = None,
        allow_special_in_text: bool = False,
        source_for_tools: str | None = None,
        in_one_piece: bool = False,
    ):
        self.source, self.source_for_tools = source, source_for_tools
        self._tokenizer = SpanTokenizer(tokenizer, in_one_piece)
        self._guard = ControlGuard(tokenizer, allow_special_in_text)
        self.tokenizer_digest = self._tokenizer.digest
        self._renderer = Renderer(source, {**tokenizer.special_tokens_map, **(variables or {})}, self._guard)
        self.reads = self._renderer.reads

        # How an answer is written, and the tokens that close it.
        added_pattern = self._tokenizer.added_pattern
        frame = self._renderer.find_frame(added_pattern)
        closers = re.findall(added_pattern, frame.tail[: frame.closing])
        self._closing_ids = [self._tokenizer.token_id(token) for token in closers]
        # Generation stops at the last of them, or where the family's own stops.
        self.turn_end: str | None = None
        if closers:
            self.turn_end = str(tokenizer.eos_token) if tokenizer.eos_token in closers else closers[-1]
        self.turn_end_id: int | None = self._tokenizer.token_id(self.turn_end) if self.turn_end else None
        own_tokens = {*re.findall(added_pattern, self._renderer.frame_prompt), *closers, str(tokenizer.eos_token)}
        self._own_marked = [f"{GUARD_OPEN}{token}{GUARD_CLOSE}" for token in own_tokens]
        plain, with_tools = TargetFinder(frame, added_pattern), self._renderer.find_tool_frame(added_pattern) or frame
        self._plain = _Layouts(plain, PatternCache(self._renderer, plain))
        self._with_tools = _Layouts(TargetFinder(with_tools, added_pattern), None)
        # Rows with reasoning may need a variable of the template, and rows with tools a template of their own.
        self.thinking = {} if variables and THINKING_VARIABLES & variables.keys() else self._find_thinking()
        self._with_reasoning = self._plain
        if self.thinking:
            renderer = Renderer(source, {**self._renderer.variables, **self.thinking}, self._guard)
            finder = TargetFinder(renderer.find_frame(added_pattern), added_pattern)
            self._with_reasoning = _Layouts(finder, PatternCache(renderer, finder))
        self._for_tools: Template | None = None
        if source_for_tools is not None:
            self._for_tools = Template(
                tokenizer, source_for_tools, variables, allow_special_in_text, in_one_piece=in_one_piece
            )
            self.reads = self.reads.union(self._for_tools.reads)

    def _find_thinking(self) -> dict[str, bool]:
        """Return the variable that lets the template write reasoning, if it needs one: Gemma 4, DeepSeek-V3.2."""
        if self._writes_reasoning({}):
            return {}
        names = sorted(THINKING_VARIABLES & self.reads.variables)
        return next(({name: True} for name in names if self._writes_reasoning({name: True})), {})

    @cached_property
    def _doubles_thoughts(self) -> bool:
        """Whether the template writes an empty thought before an answer that begins with one (Kimi K2 Thinking)."""
        answer = {"role": "assistant", "content": "<think>c</think>d"}
        text = run_bounded(self._renderer.try_render, [FRAME_CHAT[0], answer], False, self._renderer.frame_tools)
        opening = self._plain.finder.frame.opening
        return bool(opening.strip()) and f"{opening}{answer['content']}" in text

    def _writes_reasoning(self, variables: dict[str, bool]) -> bool:
        """Return whether the template continues its prompt with an answer that has reasoning."""
        question, answer = FRAME_CHAT
        reasoning = {"reasoning_content": REASONING_MARK}
        reasoned = run_bounded(self._renderer.try_render, [question, answer | reasoning], False, None, variables)
        prompt = run_bounded(self._renderer.try_render, [question], True, None, variables)
        if not prompt or not reasoned.startswith(prompt):
            return False
        return REASONING_MARK in reasoned[len(prompt) :].partition(ANSWER_OPEN)[0]

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: Tools = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Return the same text as `tokenizer.apply_chat_template(tokenize=False)`.

        Raises:
            DataError: the template refuses the conversation; the template's own message is in the error.
            ConfigError: the template exceeds a limit of `sandbox`.
        """
        if self._for_tools and tools:
            return self._for_tools.render(messages, add_generation_prompt, tools, variables)
        messages = self._renderer.spelling.place_tools(messages, tools)
        text = run_bounded(self._renderer.render, messages, add_generation_prompt, tools, variables)
        check_output_size(text, (messages, tools))
        return text

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt begins a thought, which the answer goes on with."""
        thought = self._plain.finder.frame.thought
        return bool(thought and thought.closing)

    @property
    def thought_tags(self) -> tuple[str, str]:
        """What opens and closes a thought in an answer; `<think>` and `</think>` if the template does not say it."""
        frame = self._plain.finder.frame
        tags = frame.thought.tags if frame.thought else None
        return tags or find_thought_tags((frame.around_reasoning or ("",))[0]) or ("<think>", "</think>")

    def with_reasoning_apart(self, messages: list[Message]) -> list[Message]:
        """Return the messages as they are trained: a thought at the start of a content is reasoning, if the template has it."""
        if self._plain.finder.frame.thought or self.thinking or self._doubles_thoughts:
            return with_own_reasoning(messages, self.opens_thought)
        return messages

    def prompt_ids(
        self, messages: list[Message], tools: Tools = None, variables: dict[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids that inference feeds. Control tokens in messages stay text. Raises as `render` does."""
        guard = self._guard.guard
        text = self.render(guard(messages), True, guard(tools), guard(variables))
        return self._tokenizer.encode(text, [])[0]

    def encode(
        self,
        messages: list[Message],
        train_on: TrainOn = "assistant",
        tools: Tools = None,
        split_turns: SplitTurns = False,
        train_on_eos: TrainOnEos = "turn",
        variables: dict[str, Any] | None = None,
        open_thought: OpenThought = "refuse",
    ) -> EncodedConversation:
        """Return a conversation's rows of token ids and labels: one, or more with `split_turns`.

        `train_on`: train every assistant turn, only the last one, or every token of the conversation (`all`). A message
        with `train` False is context; `weight` of a message is the weight of its labels, `segments` are pairs
        (characters, weight) that cover its content.
        `train_on_eos`: train the end-of-turn tokens of all trained turns, of the last one, or none.
        `split_turns`: a turn that the conversation's text shows in another way than it was generated gets a row of its
        own. Without it such a turn is trained as the text shows it, if only the template's words are missing (Qwen3's
        empty think block); if some of the turn's own text is missing, the turn is counted as lost. `auto` gives rows of
        their own to just the turns that would be lost.
        `open_thought`: where the prompt opens a thought, and the template writes the answer without one: count the turn
        as lost (`refuse`), close the thought before the answer (`close`), or train the turn as history shows it, after
        a prompt without the thought (`history`). A row's own reasoning is always written into the thought.
        `tools` are JSON schemas, `variables` are set for the template. Raises as `render` does.
        """
        if self._for_tools and tools:
            return self._for_tools.encode(messages, train_on, tools, split_turns, train_on_eos, variables, open_thought)
        messages = people_wrote = self.with_reasoning_apart(messages)
        messages, tools, variables = map(self._guard.guard, (messages, tools, variables))
        rendered_before = messages != people_wrote and self._looks_rendered(messages)
        messages = self._renderer.spelling.place_tools(messages, tools)
        borders: list[Border] = []
        if any("segments" in message for message in messages):
            messages = [_with_segments(message, borders, train_on != "all") for message in messages]

        layouts, variable = self._with_tools if tools else self._plain, ""
        if self.thinking and any("reasoning_content" in message for message in messages):
            variables = {**self.thinking, **(variables or {})}
            if self.thinking.items() <= variables.items():  # the row itself may say otherwise
                layouts, variable = self._with_reasoning, next(iter(self.thinking))

        # The texts of the rows and their trained characters; the cache knows conversations without tools only.
        options = (train_on, split_turns, open_thought)
        patterns = None if tools else layouts.patterns
        layout = patterns.recall(messages, variables, options) if patterns else None
        if layout is None:
            layout = run_bounded(
                self._lay_out, layouts._replace(patterns=patterns), messages, tools, variables, options
            )
        for text, _ in layout.rows:
            check_output_size(text, (messages, tools))

        rows = [self._make_row(text, targets, borders, train_on_eos) for text, targets in layout.rows]
        return EncodedConversation(rows, *layout[1:6], rendered_before=rendered_before, variable=variable)

    def _lay_out(
        self,
        layouts: _Layouts,
        messages: list[Message],
        tools: Tools,
        variables: dict[str, Any] | None,
        options: tuple[Any, ...],
    ) -> TargetLayout:
        render = self._renderer.of_first_messages(messages, tools, variables)
        # Work it out once for all conversations of this shape, or else for this conversation alone.
        layout = layouts.patterns.learn(messages, render, variables, options) if layouts.patterns else None
        if layout is None:
            # A text that is missing is rendered again, for the template's own words.
            full = render(len(messages), False) or self._renderer.render(messages, False, tools, variables)
            layout = layouts.finder.lay_out(messages, full, render, *options)
            layout = layout._replace(left_out=self._renderer.left_out(messages, tools, full))
        return layout

    def _looks_rendered(self, messages: list[Message]) -> bool:
        """Return whether a message holds a control token that this template, or the tokenizer, ends texts with."""
        texts = [message["content"] for message in messages if isinstance(message["content"], str)]
        return any(token in text for token in self._own_marked for text in texts)

    def split_markers(self, strict: bool) -> list[str]:
        """Return the template's control tokens that this tokenizer splits, as `frame.split_tokens` does."""
        tail = self._plain.finder.frame.tail
        split = split_tokens(self._renderer.frame_prompt + tail, tail, self._tokenizer.is_single, strict)
        of_tools = self._for_tools.split_markers(strict) if self._for_tools else []
        return list(dict.fromkeys([*split, *of_tools]))

    def _make_row(
        self, text: str, targets: list[Target], borders: list[Border], train_on_eos: TrainOnEos
    ) -> EncodedRow:
        if borders:
            text, targets = apply_segments(text, targets, borders)
        ids, token_spans = self._tokenizer.encode(text, [Span(target.start, target.end) for target in targets])
        labels = [IGNORED] * len(ids)
        weighted = any(target.weight != 1 for target in targets)
        row_weights = [1.0] * len(ids) if weighted else None
        for k, ((start, end), target) in enumerate(zip(token_spans, targets, strict=True)):
            # Shorten the span if its end-of-turn tokens are not to be trained.
            if train_on_eos == "none" or (train_on_eos == "last" and k < len(targets) - 1):
                end = self._without_closing(ids, start, end)
            # Labels go by position: a pad token that is also the end-of-turn token masks nothing.
            labels[start:end] = ids[start:end]
            if row_weights:
                row_weights[start:end] = [target.weight] * (end - start)
        return EncodedRow(ids, labels, row_weights)

    def _without_closing(self, ids: list[int], start: int, end: int) -> int:
        for token in reversed(self._closing_ids):
            if end > start and ids[end - 1] == token:
                end -= 1
        return end


def _with_segments(message: Message, borders: list[Border], marked: bool) -> Message:
    """Return the message without `segments`, with marks in its content if they are to count."""
    message = dict(message)
    segments = message.pop("segments", None)
    if segments and marked:
        has_reasoning = "reasoning_content" in message
        message["content"] = mark_segments(message["content"], segments, borders, has_reasoning)
    return message


def load_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    variables: dict[str, Any] | None = None,
    allow_special_in_text: bool = False,
    in_one_piece: bool = False,
) -> Template:
    """Load a chat template: the tokenizer's own (None), one of its own by name, `chatml`, or a Jinja file by its path.

    `variables` are set in every render. With `allow_special_in_text` control tokens in messages do not become text.
    With `in_one_piece` no token border is put between a prompt and its answer.

    Raises:
        ConfigError: the file does not exist, the tokenizer has no template, the template is not valid Jinja or cannot
            render one question and answer, or the tokenizer would split its control tokens into pieces.
    """
    template = _bind(tokenizer, chat_template, variables, allow_special_in_text, in_one_piece)
    split = template.split_markers(strict=chat_template is not None)
    if split:
        raise ConfigError(
            f"chat_template: {describe_template(chat_template)} writes {', '.join(split)}, which the tokenizer "
            f"{tokenizer.name_or_path!r} would split into pieces; add them with add_tokens: true, or use a tokenizer "
            "that has them or a template made for this one (chat_template: chatml | path/to/file.jinja)."
        )
    return template


def configured_template(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Template:
    """Load the template that `options` name, with its variables. Raises as `load_template` does."""
    special, one_piece = options.allow_special_in_text, options.gives_scores
    return load_template(tokenizer, options.chat_template, options.chat_template_kwargs, special, one_piece)


def missing_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str]:
    """Return the template's control tokens that the tokenizer would split. Raises as `load_template` does otherwise."""
    return _bind(tokenizer, chat_template).split_markers(strict=chat_template is not None)


def _bind(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    variables: dict[str, Any] | None = None,
    allow_special_in_text: bool = False,
    in_one_piece: bool = False,
) -> Template:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {tokenizer.name_or_path!r} is a slow tokenizer; use one that has a tokenizer.json."
        )
    source, name = read_template(tokenizer, chat_template), describe_template(chat_template)
    # Errors of the test renders in `Template` mean that no conversation could be rendered.
    try:
        return Template(tokenizer, source.text, variables, allow_special_in_text, source.for_tools, in_one_piece)
    except TemplateSyntaxError as error:
        line = source.text.splitlines()[error.lineno - 1 : error.lineno]
        raise ConfigError(
            f"chat_template: {name} is not valid Jinja, line {error.lineno}: {error.message} in "
            f"{''.join(line).strip()!r}."
        ) from None
    except DataError as error:
        words = str(error).rstrip(".")  # the template's own message may end with one
        raise ConfigError(f"chat_template: {name} cannot be used with this tokenizer: {words}.") from None
