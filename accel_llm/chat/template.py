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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from accel_llm.chat.messages import Message
from accel_llm.chat.patterns import PatternCache
from accel_llm.chat.sandbox import MAX_SOURCE, begin_render, check_output_size, check_template_size, run_bounded
from accel_llm.chat.span_tokenizer import GUARD_CLOSE, GUARD_OPEN, Span, SpanTokenizer
from accel_llm.chat.targets import IGNORED, AnswerFrame, Target, TargetFinder, TargetLayout, TrainOn
from accel_llm.config.options import DataOptions
from accel_llm.errors import ConfigError, DataError

Tools = list[Any] | None  # JSON schemas
TrainOnEos = Literal["turn", "last", "none"]


CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Control tokens as the known template families write them. Role names in brackets ([INST]) are plain text.
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?s>|<(?:start|end)_of_\w+>|<(?:bos|eos)>")
_ROLE_HEADER = re.compile(r"<\|(?:system|user|assistant|tool)\|>")
_INDENTED_OUTPUT = re.compile(r"^[ \t]+\{\{(?!-)", re.MULTILINE)

TEMPLATE_REFUSED = "refused by the chat template"  # reason to refuse a row, see `messages`
# Errors that a render can raise. Python raises SyntaxError for loops that are nested too deep.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
TEMPLATE_ERRORS += (RecursionError, SyntaxError)
MAX_REFUSAL_LENGTH = 500  # characters of a template's own error message


@dataclass(frozen=True)
class EncodedRow:
    """One row of token ids with labels and weights, all of the same length.

    `labels[k]` is `input_ids[k]` if position k is trained, else -100 (not shifted). `weights[k]` is the weight of that
    label in the loss; None if all are 1.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """The rows of a conversation, and what happened to its assistant turns.

    `lost` counts the turns that are not trained, by reason. `shown_as_history` counts the turns that are trained
    without the words that the template puts before a last answer (Qwen3's empty think block). `without_reasoning`
    counts the turns that are trained without their reasoning, because the template does not write it.
    """

    rows: list[EncodedRow]
    lost: dict[str, int]
    shown_as_history: int = 0
    without_reasoning: int = 0


class Template:
    """A chat template bound to a tokenizer; `load_template` builds it. It can be pickled.

    `turn_end` is the token that closes an assistant turn, `turn_end_id` its id. Both are None if the template closes no
    turn; a model trained with such a template never learns to stop.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        variables: dict[str, Any] | None = None,
        allow_special_in_text: bool = False,
    ):
        check_template_size(source)
        self.source = source
        self._variables: dict[str, Any] = {**tokenizer.special_tokens_map, **(variables or {})}
        self._tokenizer = SpanTokenizer(tokenizer, allow_special_in_text)
        self.tokenizer_digest = self._tokenizer.digest

        # The end-of-turn token is an added token at the beginning of what follows an answer.
        frame = self._find_frame()
        self._tail, added_pattern = frame.tail, self._tokenizer.added_pattern
        closing = re.match(rf"\s*({added_pattern})", frame.tail)
        self.turn_end: str | None = closing[1] if closing else None
        self.turn_end_id: int | None = self._tokenizer.token_id(closing[1]) if closing else None
        self._targets = TargetFinder(frame, closing.end() if closing else 0, added_pattern)
        self._patterns = PatternCache(source, self._variables, self._targets.lay_out)

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
        text = run_bounded(self._render, messages, add_generation_prompt, tools, variables)
        check_output_size(text, (messages, tools))
        return text

    def _render(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: Tools,
        variables: dict[str, Any] | None,
    ) -> str:
        begin_render()
        # `apply_chat_template` leaves out fields that are None, too.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        options = {
            **self._variables,
            **(variables or {}),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        # A template is a program: it may fail in any of Python's ways, depending on the conversation.
        try:
            return render_jinja_template([chat], chat_template=self.source, **options)[0][0]
        except TemplateSyntaxError:  # an error of the template, not of this conversation
            raise
        except TEMPLATE_ERRORS as error:
            words = str(error)[:MAX_REFUSAL_LENGTH]
            raise DataError(f"the chat template refuses this conversation: {words}", TEMPLATE_REFUSED) from error

    def prompt_ids(
        self, messages: list[Message], tools: Tools = None, variables: dict[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids that inference feeds. Control tokens in messages stay text. Raises as `render` does."""
        text = self.render(self._tokenizer.guard(messages), True, self._tokenizer.guard(tools), variables)
        return self._tokenizer.encode(text, [])[0]

    def encode(
        self,
        messages: list[Message],
        train_on: TrainOn = "assistant",
        tools: Tools = None,
        split_turns: bool = False,
        train_on_eos: TrainOnEos = "turn",
        variables: dict[str, Any] | None = None,
    ) -> EncodedConversation:
        """Return a conversation's rows of token ids and labels: one, or more with `split_turns`.

        `train_on`: train every assistant turn, only the last one, or every token of the conversation (`all`). A message
        with `train` False is context; `weight` of a message is the weight of its labels.
        `train_on_eos`: train the end-of-turn tokens of all trained turns, of the last one, or none.
        `split_turns`: a turn that the conversation's text shows in another way than it was generated gets a row of its
        own. Without it such a turn is trained as the text shows it, if only the template's words are missing (Qwen3's
        empty think block); if some of the turn's own text is missing, the turn is counted as lost.
        `tools` are JSON schemas, `variables` are set for the template. Raises as `render` does.
        """
        messages, tools = self._tokenizer.guard(messages), self._tokenizer.guard(tools)

        # The texts of the rows and their trained characters; the cache knows conversations without tools only.
        layout = None if tools else self._patterns.recall(messages, variables, train_on, split_turns)
        if layout is None:
            layout = run_bounded(self._lay_out, messages, train_on, tools, split_turns, variables)
        for text, _ in layout.rows:
            check_output_size(text, (messages, tools))

        rows = [self._make_row(text, targets, train_on_eos) for text, targets in layout.rows]
        return EncodedConversation(rows, *layout[1:])

    def _lay_out(
        self,
        messages: list[Message],
        train_on: TrainOn,
        tools: Tools,
        split_turns: bool,
        variables: dict[str, Any] | None,
    ) -> TargetLayout:
        def render(some: list[Message], add_generation_prompt: bool) -> str:
            return self._try_render(some, add_generation_prompt, tools, variables)

        # Work it out once for all conversations of this shape, or else for this conversation alone.
        layout = None if tools else self._patterns.learn(messages, render, variables, train_on, split_turns)
        if layout is not None:
            return layout
        full = self._render(messages, False, tools, variables)
        return self._targets.lay_out(messages, full, render, train_on, split_turns)

    def split_markers(self, strict: bool) -> list[str]:
        """Return the template's control tokens that this tokenizer splits; none if every needed one is a single token.

        Needed is the token that closes a turn. With `strict` all are needed, except role headers: some models learned
        those in pieces (Zephyr's `<|user|>`).
        """
        text = self.render([{"role": "user", "content": "a"}], add_generation_prompt=True) + self._tail
        split = [marker for marker in dict.fromkeys(_MARKER.findall(text)) if not self._tokenizer.is_single(marker)]
        closing = _MARKER.match(self._tail.lstrip())
        needed = {closing[0]} if closing else set()
        if strict:
            needed |= {marker for marker in split if not _ROLE_HEADER.fullmatch(marker)}
        return split if needed & set(split) else []

    def _make_row(self, text: str, targets: list[Target], train_on_eos: TrainOnEos) -> EncodedRow:
        ids, token_spans = self._tokenizer.encode(text, [Span(target.start, target.end) for target in targets])
        labels = [IGNORED] * len(ids)
        weights = [1.0] * len(ids) if any(target.weight != 1 for target in targets) else None
        for k, ((start, end), target) in enumerate(zip(token_spans, targets, strict=True)):
            # Shorten the span if its end-of-turn token is not to be trained.
            untrained_end = train_on_eos == "none" or (train_on_eos == "last" and k < len(targets) - 1)
            if untrained_end and end > start and ids[end - 1] == self.turn_end_id:
                end -= 1
            # Labels go by position: a pad token that is also the end-of-turn token masks nothing.
            labels[start:end] = ids[start:end]
            if weights:
                weights[start:end] = [target.weight] * (end - start)
        return EncodedRow(ids, labels, weights)

    def _try_render(
        self, messages: list[Message], add_generation_prompt: bool, tools: Tools, variables: dict[str, Any] | None
    ) -> str:
        """Render a part of a conversation; "" if the template refuses it. It may refuse a part and accept the whole."""
        try:
            return self._render(messages, add_generation_prompt, tools, variables) if messages else ""
        except DataError:
            return ""

    def _find_frame(self) -> AnswerFrame:
        """Render a question and an answer between two marks, and take what stands around the answer."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": f"{GUARD_OPEN}b{GUARD_CLOSE}"}
        text, prompt = self.render([question, answer]), self.render([question], add_generation_prompt=True)
        before, mark, _ = text.partition(GUARD_OPEN)
        if not mark:
            raise DataError("the chat template leaves out the assistant's answer")
        # A noncharacter as reasoning shows whether the template writes it.
        reasoning = answer | {"reasoning_content": "\ufdd5"}
        with_reasoning = run_bounded(self._try_render, [question, reasoning], False, None, None)
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return AnswerFrame(opening, text.rpartition(GUARD_CLOSE)[2], "\ufdd5" in with_reasoning)


def load_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    variables: dict[str, Any] | None = None,
    allow_special_in_text: bool = False,
) -> Template:
    """Load a chat template: the tokenizer's own (None), `chatml`, or a Jinja file by its path.

    `variables` are set in every render. With `allow_special_in_text` control tokens in messages do not become text.

    Raises:
        ConfigError: the file does not exist, the tokenizer has no template, the template is not valid Jinja or cannot
            render one question and answer, or the tokenizer would split its control tokens into pieces.
    """
    template = _bind(tokenizer, chat_template, variables, allow_special_in_text)
    split = template.split_markers(strict=chat_template is not None)
    if split:
        raise ConfigError(
            f"chat_template: {_describe(chat_template)} writes {', '.join(split)}, which the tokenizer "
            f"{tokenizer.name_or_path!r} would split into pieces; add them with add_tokens: true, or use a tokenizer "
            "that has them or a template made for this one (chat_template: chatml | path/to/file.jinja)."
        )
    return template


def configured_template(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Template:
    """Load the template that `options` name, with its variables. Raises as `load_template` does."""
    return load_template(tokenizer, options.chat_template, options.chat_template_kwargs, options.allow_special_in_text)


def missing_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str]:
    """Return the template's control tokens that the tokenizer would split. Raises as `load_template` does otherwise."""
    return _bind(tokenizer, chat_template).split_markers(strict=chat_template is not None)


def _bind(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    variables: dict[str, Any] | None = None,
    allow_special_in_text: bool = False,
) -> Template:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {tokenizer.name_or_path!r} is a slow tokenizer; use one that has a tokenizer.json."
        )
    source, name = _read_source(tokenizer, chat_template), _describe(chat_template)
    # Errors of the test renders in `Template` mean that no conversation could be rendered.
    try:
        return Template(tokenizer, source, variables, allow_special_in_text)
    except TemplateSyntaxError as error:
        line = source.splitlines()[error.lineno - 1 : error.lineno]
        raise ConfigError(
            f"chat_template: {name} is not valid Jinja, line {error.lineno}: {error.message} in "
            f"{''.join(line).strip()!r}."
        ) from None
    except DataError as error:
        words = str(error).rstrip(".")  # the template's own message may end with one
        raise ConfigError(f"chat_template: {name} cannot be used with this tokenizer: {words}.") from None


def _describe(chat_template: str | None) -> str:
    return "the tokenizer's own template" if chat_template is None else repr(chat_template)


def _read_source(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    if chat_template is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError:
            raise ConfigError(
                f"chat_template: the tokenizer {tokenizer.name_or_path!r} has none of its own; set one "
                "(chat_template: chatml | path/to/file.jinja)."
            ) from None
    if chat_template == "chatml":
        return CHATML

    # A file; no more of it is read than a template may have.
    path = Path(chat_template)
    if not path.is_file():
        raise ConfigError(f"chat_template: {chat_template!r} is neither a file nor chatml, the built-in template.")
    with path.open(encoding="utf-8") as file:
        source = file.read(MAX_SOURCE + 1)
    check_template_size(source)
    return _remove_indentation(source)


def _remove_indentation(source: str) -> str:
    """Join the lines of a file that is written as indented lines of whole tags; return any other file unchanged.

    Some template collections publish such files and say to join the lines before use: otherwise the indentation before
    an output would be in every prompt.
    """
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    if _INDENTED_OUTPUT.search(source) and all(line[0] == "{" and line[-1] == "}" for line in lines):
        return "".join(lines)
    return source
