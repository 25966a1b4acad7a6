"""Messages -> token ids and labels: what is trained in a turn is exactly what the model must generate at inference.

For every assistant turn `i` two texts define the truth: the prompt that inference feeds,
`render(messages[:i], add_generation_prompt=True)`, and the finished turn, `render(messages[: i + 1])`. The target is
what stands between the end of the first and the end-of-turn token of the second, that token included. Where the
conversation's own render contains both unchanged, the turn is trained inside it; where the template rewrites history
(Qwen3 drops earlier thinking) the turn gets a row of its own. One render gives all these texts where the template
provably never looks ahead (`marks`), else each turn is rendered for itself. No span is ever searched for in a text
that a person wrote, so an answer may contain the template's markers.

Token borders follow inference too (`tokens`): a prompt ends with the tokens that inference feeds, even where a
tokenizer would merge its last characters with the answer's first.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from accel_llm.errors import ConfigError, DataError
from accel_llm.marks import MARK, marked_template
from accel_llm.tokens import CLOSE, OPEN, Span, Tokens

Message = dict[str, Any]
Tools = list[Any] | None  # JSON schemas
TrainOn = Literal["assistant", "last_assistant", "all"]

IGNORED = -100  # the label of a token that is not trained

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

NO_PROMPT = "the template cannot render the prompt of this turn"
NOT_AFTER_PROMPT = "the template does not continue its own prompt with this turn"
NO_END = "the template closes this turn in an unknown way"
REWRITTEN = "the template rewrites this turn once another one follows"


@dataclass(frozen=True)
class Encoded:
    """One row: `labels[k]` is `input_ids[k]` where position k is trained, else -100 (unshifted)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoding:
    """A conversation's rows, for every reason how many of its assistant turns train nothing, and how many are trained
    without what the template writes before an answer only while it is the last."""

    rows: list[Encoded]
    lost: dict[str, int]
    shown_as_history: int = 0


class Template:
    """A chat template bound to a tokenizer; build it with `load_template`. It can be pickled.

    `turn_end` is the token that closes an assistant turn (None: the template closes no turn, so a model trained with
    it never learns to stop).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str):
        self.source = source
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._tokens = Tokens(tokenizer)
        self._tail = self._learn_tail()
        closing = re.match(rf"\s*({self._tokens.added_pattern})", self._tail)
        self.turn_end: str | None = closing[1] if closing else None
        self.turn_end_id: int | None = self._tokens.id_of(closing[1]) if closing else None
        self._closing_length = closing.end() if closing else 0
        self._endings = self._learn_endings()

    def render(self, messages: list[Message], add_generation_prompt: bool = False, tools: Tools = None) -> str:
        """The text of `tokenizer.apply_chat_template(tokenize=False)`; DataError with the template's words if it refuses."""
        # `apply_chat_template` leaves out fields that are None, too.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        options = {**self._variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return render_jinja_template([chat], chat_template=self.source, **options)[0][0]
        except TemplateSyntaxError:  # of the template itself, whatever the conversation
            raise
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error

    def prompt_ids(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """The token ids that inference feeds. Special tokens that stand in a message's text stay text."""
        messages, tools = self._tokens.guard(messages), self._tokens.guard(tools)
        return self._tokens.encode(self.render(messages, add_generation_prompt=True, tools=tools), [])[0]

    def encode(
        self,
        messages: list[Message],
        train_on: TrainOn = "assistant",
        tools: Tools = None,
        split_turns: bool = False,
    ) -> Encoding:
        """One row for the conversation; with `split_turns` one more for each turn that the row does not show as written.

        `train_on`: every assistant turn, the last one only, or every token of the conversation (`all`). A message with
        `train` False is context. A template may show an answer differently once others follow it (Qwen3 leaves out
        the thinking). Without `split_turns` such a turn is trained as it is shown where all of its own text is there
        and only the template's is missing (Qwen3's empty think block), and is counted as lost where it is not.
        Raises DataError if the template refuses the conversation.
        """
        messages, tools = self._tokens.guard(messages), self._tokens.guard(tools)
        if train_on == "all":
            ids, _ = self._tokens.encode(self.render(messages, tools=tools), [])
            return Encoding([Encoded(ids, list(ids))], {})
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last_assistant":
            turns = turns[-1:]
        inside: list[Span] = []
        alone: list[tuple[str, Span]] = []
        lost: Counter[str] = Counter()
        trained = [turn for turn in turns if messages[turn].get("train", True)]
        full, texts = self._texts(messages, trained, tools)
        shown_as_history = 0
        for turn, (prompt, finished) in zip(trained, texts, strict=True):
            span = self._target(prompt, finished)
            if isinstance(span, str):
                lost[span] += 1
            elif full.startswith(finished[: span.end]):
                inside.append(span)
            elif split_turns:
                alone.append((finished, span))
            elif shown := _shown_as_history(messages[turn], full, finished, span):
                inside.append(shown)
                shown_as_history += 1
            else:
                lost[REWRITTEN] += 1
        known = {} if alone else None
        rows = [self._row(full, inside, known)] if inside else []
        rows += [self._row(text, [span], known) for text, span in alone]
        return Encoding(rows, dict(lost), shown_as_history)

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

    def _target(self, prompt: str, finished: str) -> Span | str:
        """The characters of `finished` that the model must generate after `prompt`, or why there are none."""
        if not prompt or not finished:
            return NO_PROMPT
        if not finished.startswith(prompt):
            return NOT_AFTER_PROMPT
        if not finished.endswith(self._tail):
            return NO_END
        end = len(finished) - len(self._tail) + self._closing_length
        return Span(len(prompt), end) if end > len(prompt) else NOT_AFTER_PROMPT

    def _row(self, text: str, spans: list[Span], known: dict[str, list[int]] | None) -> Encoded:
        ids, trained = self._tokens.encode(text, spans, known)
        labels = [IGNORED] * len(ids)
        for start, end in trained:
            labels[start:end] = ids[start:end]
        return Encoded(ids, labels)

    def _texts(self, messages: list[Message], turns: list[int], tools: Tools) -> tuple[str, list[tuple[str, str]]]:
        """The conversation's text; for each turn the prompt before it and the text that ends with it ("" if refused)."""
        marked = None if tools or self._endings is None else self._render_marked(messages)
        if marked and self._endings and all(turn > 0 and marked[1][turn - 1] for turn in turns):
            full, ends = marked
            before_answer, after_answer = self._endings
            return full, [(full[: ends[turn - 1]] + before_answer, full[: ends[turn]] + after_answer) for turn in turns]
        full = self.render(messages, tools=tools)
        return full, [
            (
                self._attempt(messages[:turn], True, tools),
                full if turn == len(messages) - 1 else self._attempt(messages[: turn + 1], False, tools),
            )
            for turn in turns
        ]

    def _render_marked(
        self, messages: list[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[int]] | None:
        """The text and where each message ends in it (0: it has no text of its own), from one render; None where only
        a render for each turn can tell."""
        template = marked_template(self.source)
        if template is None or not all(map(_is_plain, messages)):
            return None
        try:
            marked = template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError):
            return None
        parts = marked.split(MARK)
        ends = list(accumulate(map(len, parts[:-1])))
        return "".join(parts), [0] * (len(messages) - len(ends)) + ends

    def _attempt(self, messages: list[Message], add_generation_prompt: bool, tools: Tools) -> str:
        """`render` of a part that the template may refuse though it took the whole: "" then."""
        try:
            return self.render(messages, add_generation_prompt, tools) if messages else ""
        except DataError:
            return ""

    def _learn_endings(self) -> tuple[str, str] | None:
        """What a template that never looks ahead writes after the last message, with and without generation prompt."""
        probe = [{"role": "user", "content": "a"}]
        prompt, text = self._render_marked(probe, add_generation_prompt=True), self._render_marked(probe)
        return (prompt[0][prompt[1][-1] :], text[0][text[1][-1] :]) if prompt and text else None

    def _learn_tail(self) -> str:
        """What the template writes after the content of a last assistant turn: its end token and what follows it."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"{OPEN}b{CLOSE}"}]
        _, mark, tail = self.render(probe).rpartition(CLOSE)
        if not mark:
            raise DataError("the chat template leaves out the assistant's answer")
        return tail


def _shown_as_history(message: Message, full: str, finished: str, span: Span) -> Span | None:
    """Where `full` shows the turn after the same prompt with all of its own text, less what the template put before it."""
    if message.get("reasoning_content") or message.get("thinking"):
        return None
    target = finished[span.start : span.end]
    at = target.rfind(message["content"].strip())
    if at < 0 or not full.startswith(finished[: span.start] + target[at:]):
        return None
    return Span(span.start, span.start + len(target) - at)


def load_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> Template:
    """The template named by `chat_template`: None (the tokenizer's own), `chatml`, or the path of a Jinja file.

    Raises ConfigError: no such file, no template in the tokenizer, not valid Jinja, a template that cannot render one
    question and answer with this tokenizer, control tokens that the tokenizer would split into pieces.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {tokenizer.name_or_path!r} is a slow tokenizer, needs one with a tokenizer.json"
        )
    source = _read_source(tokenizer, chat_template)
    name = "the tokenizer's own template" if chat_template is None else repr(chat_template)
    try:
        template = Template(tokenizer, source)
    except TemplateSyntaxError as error:
        line = source.splitlines()[error.lineno - 1 : error.lineno]
        raise ConfigError(
            f"chat_template: {name} is not valid Jinja, line {error.lineno}: {error.message} in {''.join(line).strip()!r}"
        ) from None
    except DataError as error:
        raise ConfigError(f"chat_template: {name} cannot be used with this tokenizer: {error}") from None
    split = template.split_markers(strict=chat_template is not None)
    if split:
        raise ConfigError(
            f"chat_template: {name} writes {', '.join(split)}, which the tokenizer {tokenizer.name_or_path!r} would split "
            "into pieces, needs a tokenizer that has them as tokens or a template made for this one "
            "(chat_template: chatml | path/to/file.jinja)"
        )
    return template


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
    return _without_layout(path.read_text(encoding="utf-8"))


def _without_layout(source: str) -> str:
    """Template collections lay their files out over indented lines and say to join them before use: the indentation
    before an output would be written into every prompt. Only files that consist of whole tags line by line are joined."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    if _INDENTED_OUTPUT.search(source) and all(line[0] == "{" and line[-1] == "}" for line in lines):
        return "".join(lines)
    return source


def _is_plain(message: Message) -> bool:
    """Nothing but a text of one of the three roles: what `marked_template` vouches for."""
    return (
        message.keys() <= {"role", "content", "train"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
        and MARK not in message["content"]
    )
