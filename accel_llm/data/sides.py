"""Reads the sides of a row of preferences: each becomes a conversation, whose prompt is context."""

import re
from collections.abc import Mapping
from typing import Any

from accel_llm.chat.messages import Message, read_answer
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.values import (
    EMPTY_ANSWER,
    EQUAL_ANSWERS,
    NO_PREFERENCE,
    NO_SHARED_PROMPT,
    NOT_MESSAGES,
    Findings,
    is_nothing,
    parse_json,
    show_keys,
    show_value,
)
from accel_llm.config.fields import DataFormat
from accel_llm.data.columns import CONVERSATION_COLUMNS, PREFERENCE_FIELDS, Renames, rename_keys
from accel_llm.data.formats import NO_RENAMES, REASONING_COLUMNS, Conversation, as_context, parse_row
from accel_llm.data.scored import SCORED_COLUMNS
from accel_llm.data.shapes import SHAPE_COLUMNS
from accel_llm.errors import DataError

MESSAGE_LISTS = ("messages", "conversations", "conversation")
# The columns of a prompt in the order in which they count, and the column that fine-tuning reads its answer from.
_PROMPTS = {"prompt": "completion", **dict.fromkeys(MESSAGE_LISTS, ""), "question": "answer", "query": "response"}
_PROMPTS |= {"instruction": "output", "input": ""}
_SIDES = ("chosen", "rejected")
# What goes with both sides is none of these; reasoning would be that of both answers.
SIDE_COLUMNS = {*SHAPE_COLUMNS, *PREFERENCE_FIELDS, *SCORED_COLUMNS, *REASONING_COLUMNS}
TRANSCRIPT_REMARK = "texts of Human: and Assistant: were read as turns of a conversation."


class PreferenceReader:
    """Reads one row; `used` are the columns whose values arrive somewhere."""

    def __init__(self, row: Mapping[str, Any], renames: Renames, data_format: DataFormat | None, reads: TemplateReads):
        self.row, self.renames, self.reads = row, renames, reads
        self.data_format: DataFormat | None = data_format
        # The names of keys and roles; the columns have our names already.
        self.inner: dict[str, str] = {}
        if renames is not NO_RENAMES:
            self.inner = {**renames.keys, **{f"role:{name}": role for name, role in renames.roles.items()}}
        self.used: set[str] = set()
        self.findings = Findings()

    @property
    def beside(self) -> dict[str, Any]:
        """The columns that go with each side: system, tools, history, variables, and those that nothing reads."""
        return {name: value for name, value in self.row.items() if name not in SIDE_COLUMNS}

    def parse(
        self, fields: dict[str, Any], names: dict[str, str], data_format: DataFormat | None = None, keys: bool = True
    ) -> Conversation:
        """Parse a row of fine-tuning; `names` are the columns that its columns came from, for messages.

        Without `keys` the keys of messages have our names already.
        """
        inner = {name: value for name, value in self.inner.items() if keys or name.startswith("role:")}
        try:
            parsed = parse_row(fields, data_format, inner, self.reads)
        except DataError as error:
            text = str(error)
            for column, name in names.items():
                if re.match(rf"{column}\b", text):
                    raise DataError(name + text[len(column) :], error.reason) from None
            raise
        if not isinstance(parsed, Conversation):
            raise DataError(f"a row without a conversation ({show_keys(self.row)}); needs one", NO_PREFERENCE)
        return parsed


def read_sides(reader: PreferenceReader) -> tuple[Conversation, Conversation]:
    """Read `chosen` and `rejected`, which are answers to a prompt, or whole conversations."""
    row = reader.row
    sides: dict[str, Any] = {side: _read_side(row, side) for side in _SIDES}
    reader.used |= {*_SIDES}
    column = next((name for name in _PROMPTS if not is_nothing(row.get(name))), None)
    if all(isinstance(side, str) for side in sides.values()) and column is None:
        sides = {side: _read_transcript(reader, text, side) for side, text in sides.items()}
    whole = {side: _is_whole(turns, reader.renames) for side, turns in sides.items()}
    if whole["chosen"] != whole["rejected"]:
        answer, conversation = _SIDES if whole["rejected"] else _SIDES[::-1]
        problem = f"{conversation} begins with a prompt, but {answer} with an answer; needs the same in both"
        raise DataError(f"{conversation}: {problem}", NO_SHARED_PROMPT)
    if whole["chosen"]:
        _check_prompt_column(reader, sides)
        return compare_conversations(reader, sides)
    if column is None:
        known = ", ".join(_PROMPTS)
        raise DataError(f"no prompt for chosen and rejected ({show_keys(row)}); needs one of {known}", NO_SHARED_PROMPT)
    return tuple(_answer(reader, column, sides[side], side) for side in _SIDES)  # type: ignore


def _read_side(row: Mapping[str, Any], side: str) -> str | list[Any]:
    """Return one side as text, or as a list of messages that are not read yet."""
    value = row.get(side)
    if isinstance(value, str):
        return _as_turns(value) or read_answer(row, side)["content"]
    if isinstance(value, dict):
        return [value]
    if is_nothing(value):
        raise DataError(f"{side}: found {show_value(value)}; needs an answer ({show_keys(row)})", EMPTY_ANSWER)
    if not isinstance(value, list):
        raise DataError(f"{side}: found {show_value(value)}; needs a text or a list of messages", NOT_MESSAGES)
    return value


def _as_turns(text: str) -> list[Any] | None:
    """Return the messages of a JSON text; None if the text is something else, such as an answer in JSON."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        turns = parse_json(text)
    except (DataError, ValueError, RecursionError):
        return None
    is_chat = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
    )
    return turns if is_chat else None


def _read_transcript(reader: PreferenceReader, text: str, field: str) -> list[Message]:
    """Read a text of Human: and Assistant:, as Anthropic's hh-rlhf has them.

    Raises:
        DataError: the text is something else, so that nobody knows where its prompt ends.
    """
    start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if start.strip() or not parts:
        problem = "is a text without a prompt beside it; needs a column prompt, or messages"
        raise DataError(f"{field}: {show_value(text)} {problem}", NO_SHARED_PROMPT)
    reader.findings.remark(TRANSCRIPT_REMARK)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _is_whole(side: Any, renames: Renames) -> bool:
    """Tell whether a side begins with the prompt: with a system or user turn, or with a pair of question and answer."""
    first = side[0] if isinstance(side, list) else None
    if not isinstance(first, dict):
        return False
    name = first.get(renames.keys.get("role", "role")) or first.get("from")
    if name is None:
        return first.keys() >= {"human", "assistant"} or first.keys() >= {"input", "output"}
    return renames.roles.get(str(name), renames.roles.get(str(name).lower())) in ("user", "system")


def _check_prompt_column(reader: PreferenceReader, sides: dict[str, Any]) -> None:
    """Check that a prompt beside two whole conversations is the beginning of both, and note that it arrives."""
    for column in _PROMPTS:
        value = reader.row.get(column)
        if isinstance(value, str):
            value = _as_turns(value) or value
        if isinstance(value, str):
            texts = [turn.get("content", turn.get("value")) for turn in sides["chosen"] if isinstance(turn, dict)]
            if any(isinstance(text, str) and text.strip() == value.strip() for text in texts):
                reader.used.add(column)
        elif isinstance(value, list) and value:
            begins = all(side[: len(value)] == value for side in sides.values())
            if begins or value in sides.values():
                reader.used.add(column)
            elif column == "prompt":
                problem = "chosen and rejected are whole conversations that do not begin with it"
                raise DataError(f"prompt: {problem}; needs answers alone, or the prompt in both", NO_SHARED_PROMPT)


def compare_conversations(reader: PreferenceReader, sides: dict[str, Any]) -> tuple[Conversation, Conversation]:
    """Parse two whole conversations. Their prompt are the turns with which both begin."""
    names = list(sides)
    first, second = (
        reader.parse({**reader.beside, "messages": turns}, {"messages": name}) for name, turns in sides.items()
    )
    pairs = list(zip(first.messages, second.messages, strict=False))
    count = next((k for k, (one, other) in enumerate(pairs) if one != other), len(pairs))
    if first.messages == second.messages:
        raise DataError(f"{names[1]}: found the conversation of {names[0]}; needs another answer", EQUAL_ANSWERS)
    rest = [conversation.messages[count:] for conversation in (first, second)]
    for name, other, turns in zip(names, names[::-1], rest, strict=True):
        if not turns:
            raise DataError(f"{name}: found only the beginning of {other}; needs an answer of its own", EMPTY_ANSWER)
    others = [turns[0]["role"] for turns in rest if turns[0]["role"] != "assistant"]
    if others or first.tools != second.tools:
        where = f"a {others[0]} turn" if others else "tools"
        problem = f"they differ first in {where}, before any answer; needs answers to the same prompt"
        raise DataError(f"{names[0]} and {names[1]}: {problem}", NO_SHARED_PROMPT)
    return with_context(first, count), with_context(second, count)


def with_context(conversation: Conversation, count: int) -> Conversation:
    """Return the conversation with its first `count` turns as context."""
    messages = conversation.messages
    return conversation._replace(messages=[*map(as_context, messages[:count]), *messages[count:]])


def _answer(reader: PreferenceReader, column: str, answer: str | list[Any], side: str) -> Conversation:
    """Parse the prompt in `column` with one answer."""
    row, fields = reader.row, reader.beside
    reader.used.add(column)
    prompt: Any = row[column]
    names = {"completion": side, "prompt": column, **{name: side for name in _PROMPTS.values() if name}}
    if isinstance(prompt, str):
        prompt = _as_turns(prompt) or prompt
    if isinstance(prompt, str) and re.match(r"\s*Human:.*\n\nAssistant:\s*$", prompt, re.DOTALL):
        prompt = _read_transcript(reader, prompt, column)[:-1]  # the last turn is the answer's, and empty here
        answer = answer.strip() if isinstance(answer, str) else answer  # as a turn of the transcript
    if isinstance(prompt, str) and isinstance(answer, str) and _PROMPTS[column]:
        # A pair of texts is read as the row of fine-tuning that has these columns: with its history, input and context.
        if column == "instruction" and "input" in row:
            fields["input"] = row["input"]
            reader.used.add("input")
        parsed = reader.parse({**fields, column: prompt, _PROMPTS[column]: answer}, names)
        return with_context(parsed, len(parsed.messages) - 1)
    if column == "instruction" and isinstance(row.get("input"), str):
        reader.used.add("input")
        prompt = "\n".join(filter(None, (prompt, row["input"])))
    if isinstance(prompt, str) and isinstance(answer, str):
        prompt = [{"role": "user", "content": prompt}]
    return reader.parse({**fields, "prompt": prompt, "completion": answer}, names)


def replace_answer(reader: PreferenceReader) -> tuple[Conversation, Conversation]:
    """Read a row of fine-tuning, whose last turn is the chosen answer, and `rejected_response` in its place."""
    row, side = reader.row, "rejected_response"
    reader.used.add(side)
    chosen = read_tuning_row(reader, (*PREFERENCE_FIELDS, *REASONING_COLUMNS))
    prompt = with_context(chosen, len(chosen.messages) - 1)
    rejected: Any = _read_side(row, side)
    if isinstance(rejected, list):
        rejected = rename_keys(rejected, side, reader.renames.keys, Findings())
    # The prompt has our names already.
    fields = {name: value for name, value in row.items() if name in CONVERSATION_COLUMNS and name != "system"}
    fields |= {name: row[name] for name in reader.reads.variables if name in reader.beside}
    fields |= {"prompt": prompt.messages[:-1], "completion": rejected}
    return prompt, reader.parse(fields, {"completion": side}, keys=False)


def read_tuning_row(reader: PreferenceReader, own: tuple[str, ...]) -> Conversation:
    """Parse the columns of fine-tuning of a row: all but its `own` ones."""
    fields = {name: value for name, value in reader.row.items() if name not in own}
    reader.used |= fields.keys()  # parsing says itself which of them nothing uses
    return reader.parse(fields, {}, reader.data_format)
