"""Messages -> token ids and labels: what is trained in a turn is exactly what the model must generate at inference.

For every assistant turn `i` two texts define the truth: the prompt that inference feeds,
`render(messages[:i], add_generation_prompt=True)`, and the finished turn, `render(messages[: i + 1])`. The target is
what stands between the end of the first and the end-of-turn token of the second, that token included. Where the
conversation's own render contains both unchanged, the turn is trained inside it; where the template rewrites history
(Qwen3 drops earlier thinking) the turn gets a row of its own. No span is ever searched for in a text that a person
wrote, so an answer may contain the template's markers. For conversations of the same shape all this comes out alike, so
it is worked out once a shape (`turns`) where the template can be followed.

Token borders follow inference too (`tokens`): a prompt ends with the tokens that inference feeds, even where a
tokenizer would merge its last characters with the answer's first.
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
from accel_llm.chat.targets import IGNORED, Frame, Target, TargetFinder, TargetLayout, TrainOn
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

# What chat templates of the known families write as control tokens; role names in brackets ([INST]) are plain text.
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?s>|<(?:start|end)_of_\w+>|<(?:bos|eos)>")
_ROLE_HEADER = re.compile(r"<\|(?:system|user|assistant|tool)\|>")
_INDENTED_OUTPUT = re.compile(r"^[ \t]+\{\{(?!-)", re.MULTILINE)

TEMPLATE_REFUSED = "refused by the chat template"  # why a row is not right
# What a template can end in, being a program; a syntax error is Python's, where loops are nested too deep for it.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
TEMPLATE_ERRORS += (RecursionError, SyntaxError)
MAX_CACHED_WORDS = 500  # of what it says when it refuses


@dataclass(frozen=True)
class EncodedRow:
    """One row: `labels[k]` is `input_ids[k]` where position k is trained, else -100 (unshifted); `weights[k]` is how much
    that label counts, None where each counts 1."""

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's rows, and for every reason how many of its assistant turns train nothing; how many are trained
    without what the template writes before an answer only while it is the last, and how many without their reasoning,
    which the template does not write."""

    rows: list[EncodedRow]
    lost: dict[str, int]
    shown_as_history: int = 0
    without_reasoning: int = 0


class Template:
    """A chat template bound to a tokenizer; build it with `load_template`. It can be pickled.

    `turn_end` is the token that closes an assistant turn (None: the template closes no turn, so a model trained with
    it never learns to stop).
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
        self._tokens = SpanTokenizer(tokenizer, allow_special_in_text)
        self.tokenizer_digest = self._tokens.digest
        frame = self._learn_frame()
        self._tail, control = frame.tail, self._tokens.added_pattern
        closing = re.match(rf"\s*({control})", frame.tail)
        self.turn_end: str | None = closing[1] if closing else None
        self.turn_end_id: int | None = self._tokens.id_of(closing[1]) if closing else None
        self._targets = TargetFinder(frame, closing.end() if closing else 0, control)
        self._patterns = PatternCache(source, self._variables, self._targets.lay_out)

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: Tools = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The text of `tokenizer.apply_chat_template(tokenize=False)`.

        Raises DataError with the template's words if it refuses, ConfigError if it takes more than `limits` allow.
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
        try:
            return render_jinja_template([chat], chat_template=self.source, **options)[0][0]
        except TemplateSyntaxError:  # of the template itself, whatever the conversation
            raise
        except TEMPLATE_ERRORS as error:
            words = str(error)[:MAX_CACHED_WORDS]
            raise DataError(f"the chat template refuses this conversation: {words}", TEMPLATE_REFUSED) from error

    def prompt_ids(
        self, messages: list[Message], tools: Tools = None, variables: dict[str, Any] | None = None
    ) -> list[int]:
        """The token ids that inference feeds. Special tokens that stand in a message's text stay text."""
        text = self.render(self._tokens.guard(messages), True, self._tokens.guard(tools), variables)
        return self._tokens.encode(text, [])[0]

    def encode(
        self,
        messages: list[Message],
        train_on: TrainOn = "assistant",
        tools: Tools = None,
        split_turns: bool = False,
        train_on_eos: TrainOnEos = "turn",
        variables: dict[str, Any] | None = None,
    ) -> EncodedConversation:
        """One row for the conversation; with `split_turns` one more for each turn that the row does not show as written.

        `train_on`: every assistant turn, the last one only, or every token of the conversation (`all`). A message with
        `train` False is context; its `weight` is what each of its labels counts. `train_on_eos`: which end-of-turn
        tokens are labels. `variables` are set for the template. A template may show an answer differently once others
        follow it (Qwen3 leaves out the thinking). Without `split_turns` such a turn is trained as it is shown where all
        of its own text is there and only the template's is missing (Qwen3's empty think block), and is counted as lost
        where it is not. Raises as `render` does.
        """
        messages, tools = self._tokens.guard(messages), self._tokens.guard(tools)

        layout = None if tools else self._patterns.recall(messages, variables, train_on, split_turns)
        if layout is None:
            layout = run_bounded(self._lay_out, messages, train_on, tools, split_turns, variables)
        for text, _ in layout.rows:
            check_output_size(text, (messages, tools))
        rows = [self._row(text, targets, train_on_eos) for text, targets in layout.rows]
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
            return self._attempt(some, add_generation_prompt, tools, variables)

        layout = None if tools else self._patterns.learn(messages, render, variables, train_on, split_turns)
        if layout is not None:
            return layout
        full = self._render(messages, False, tools, variables)
        return self._targets.lay_out(messages, full, render, train_on, split_turns)

    def split_markers(self, strict: bool) -> list[str]:
        """The template's control tokens if this tokenizer would split one that has to be a single token.

        That is the one that closes a turn; with `strict` every one but role headers, which some models learnt in
        pieces (Zephyr's `<|user|>`).
        """
        written = self.render([{"role": "user", "content": "a"}], add_generation_prompt=True) + self._tail
        split = [marker for marker in dict.fromkeys(_MARKER.findall(written)) if not self._tokens.is_single(marker)]
        closing = _MARKER.match(self._tail.lstrip())
        needed = {closing[0]} if closing else set()
        if strict:
            needed |= {marker for marker in split if not _ROLE_HEADER.fullmatch(marker)}
        return split if needed & set(split) else []

    def _row(self, text: str, targets: list[Target], train_on_eos: TrainOnEos) -> EncodedRow:
        ids, trained = self._tokens.encode(text, [Span(target.start, target.end) for target in targets])
        labels = [IGNORED] * len(ids)
        weights = [1.0] * len(ids) if any(target.weight != 1 for target in targets) else None
        for k, ((start, end), target) in enumerate(zip(trained, targets, strict=True)):
            untrained_end = train_on_eos == "none" or (train_on_eos == "last" and k < len(targets) - 1)
            if untrained_end and end > start and ids[end - 1] == self.turn_end_id:
                end -= 1
            labels[start:end] = ids[start:end]
            if weights:
                weights[start:end] = [target.weight] * (end - start)
        return EncodedRow(ids, labels, weights)

    def _attempt(
        self, messages: list[Message], add_generation_prompt: bool, tools: Tools, variables: dict[str, Any] | None
    ) -> str:
        """`render` of a part that the template may refuse though it took the whole: "" then."""
        try:
            return self._render(messages, add_generation_prompt, tools, variables) if messages else ""
        except DataError:
            return ""

    def _learn_frame(self) -> Frame:
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": f"{GUARD_OPEN}b{GUARD_CLOSE}"}
        text, prompt = self.render([question, answer]), self.render([question], add_generation_prompt=True)
        before, mark, _ = text.partition(GUARD_OPEN)
        if not mark:
            raise DataError("the chat template leaves out the assistant's answer")
        thoughtful = run_bounded(self._attempt, [question, answer | {"reasoning_content": "\ufdd5"}], False, None, None)
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return Frame(opening, text.rpartition(GUARD_CLOSE)[2], "\ufdd5" in thoughtful)


def load_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    variables: dict[str, Any] | None = None,
    allow_special_in_text: bool = False,
) -> Template:
    """The template named by `chat_template`: None (the tokenizer's own), `chatml`, or the path of a Jinja file.

    `variables` are set in every render. With `allow_special_in_text` control tokens in people's text are control tokens.
    Raises ConfigError: no such file, no template in the tokenizer, not valid Jinja, a template that cannot render one
    question and answer with this tokenizer, control tokens that the tokenizer would split into pieces.
    """
    template = _bound(tokenizer, chat_template, variables, allow_special_in_text)
    split = template.split_markers(strict=chat_template is not None)
    if split:
        raise ConfigError(
            f"chat_template: {_name(chat_template)} writes {', '.join(split)}, which the tokenizer "
            f"{tokenizer.name_or_path!r} would split into pieces; add them with add_tokens: true, or use a tokenizer that "
            "has them or a template made for this one (chat_template: chatml | path/to/file.jinja)"
        )
    return template


def configured_template(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Template:
    """The template that a run names, with its variables; see `load_template`."""
    return load_template(tokenizer, options.chat_template, options.chat_template_kwargs, options.allow_special_in_text)


def missing_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str]:
    """Control tokens that the template writes and the tokenizer would split; raises as `load_template` does."""
    return _bound(tokenizer, chat_template).split_markers(strict=chat_template is not None)


def _bound(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    variables: dict[str, Any] | None = None,
    allow_special_in_text: bool = False,
) -> Template:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {tokenizer.name_or_path!r} is a slow tokenizer, needs one with a tokenizer.json"
        )
    source, name = _read_source(tokenizer, chat_template), _name(chat_template)
    try:
        return Template(tokenizer, source, variables, allow_special_in_text)
    except TemplateSyntaxError as error:
        line = source.splitlines()[error.lineno - 1 : error.lineno]
        raise ConfigError(
            f"chat_template: {name} is not valid Jinja, line {error.lineno}: {error.message} in {''.join(line).strip()!r}"
        ) from None
    except DataError as error:
        raise ConfigError(f"chat_template: {name} cannot be used with this tokenizer: {error}") from None


def _name(chat_template: str | None) -> str:
    return "the tokenizer's own template" if chat_template is None else repr(chat_template)


def _read_source(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    if chat_template is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError:
            raise ConfigError(
                f"chat_template: the tokenizer {tokenizer.name_or_path!r} has none of its own, set one: "
                "chat_template: chatml | path/to/file.jinja"
            ) from None
    if chat_template == "chatml":
        return CHATML
    path = Path(chat_template)
    if not path.is_file():
        raise ConfigError(
            f"chat_template: {chat_template!r} is neither a file nor chatml, the template this program has"
        )
    with path.open(encoding="utf-8") as file:
        source = file.read(MAX_SOURCE + 1)
    check_template_size(source)
    return _without_layout(source)


def _without_layout(source: str) -> str:
    """Template collections lay their files out over indented lines and say to join them before use: the indentation
    before an output would be written into every prompt. Only files that consist of whole tags line by line are joined."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    if _INDENTED_OUTPUT.search(source) and all(line[0] == "{" and line[-1] == "}" for line in lines):
        return "".join(lines)
    return source
