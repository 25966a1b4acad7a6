"""Reads a row of any known shape as a prompt: the answer at its end, if there is one, is left out.

Each row is completed to a row of fine-tuning, with a stand-in as its answer, and parsed as that. A bad row raises
DataError, see data/formats.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from accel_llm.chat.messages import READS_NOTHING
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.targets import IGNORED
from accel_llm.chat.values import (
    BAD_TOKENS,
    EMPTY_TEXT,
    MISSING_VALUE,
    UNKNOWN_SHAPE,
    Findings,
    is_blank,
    is_nothing,
    read_json,
    read_text,
    show_keys,
)
from accel_llm.config.fields import DataFormat
from accel_llm.data.columns import SPECIAL_COLUMNS, Renames, refuse_media, rename_columns, rename_keys
from accel_llm.data.formats import NO_RENAMES, Conversation, parse_row
from accel_llm.data.shapes import SHAPE_COLUMNS
from accel_llm.data.tokenized import TokenizedRow
from accel_llm.errors import DataError


class _PromptShape(NamedTuple):
    """A format, the column of its prompt, and that of its answer; empty if the answer stands in the same column."""

    data_format: DataFormat
    prompt: str
    answer: str = ""


# The first match counts. In the order in which fine-tuning reads them, but text last: beside it is a question.
_SHAPES = (
    _PromptShape("tokenized", "input_ids"),
    _PromptShape("messages", "messages"),
    _PromptShape("messages", "conversations"),
    _PromptShape("messages", "conversation"),
    _PromptShape("alpaca", "instruction", "output"),
    _PromptShape("prompt_completion", "prompt", "completion"),
    _PromptShape("query_response", "query", "response"),
    _PromptShape("question_answer", "question", "answer"),
    _PromptShape("text", "text"),
)
_KNOWN = (
    "messages, conversations or conversation (a list of role/content, from/value or human/assistant), instruction "
    "(optional: input), prompt, query, question or text (optional for all: system, history, context), input_ids"
)
_ANSWERS = {"output", "completion", "response", "answer"}
_STAND_IN = "-"  # for the answer, which the prompt does not show
_TURN_PAIRS = (("human", "assistant"), ("input", "output"))  # keys of a message that is a question with its answer


def parse_prompt(
    row: Mapping[str, Any],
    data_format: DataFormat | None = None,
    columns: Mapping[str, str] = {},
    reads: TemplateReads = READS_NOTHING,
) -> Conversation | TokenizedRow:
    """Parse `row` without the answer at its end; for the arguments see `parse_row`. `row` is not changed.

    A chat whose last turns are the assistant's is the prompt of these; any other chat is a prompt as it is. A text is
    a question. Columns of preferences, labels and weights are not read. Of token ids with labels the prompt are those
    before the last trained tokens.

    Raises:
        DataError: the row is bad, or its prompt is empty.
        ConfigError: `columns` names an unknown field.
    """
    refuse_media(row)
    renames = NO_RENAMES
    if columns:
        # A row need not have the column of an answer.
        names = {field: column for field, column in columns.items() if field not in _ANSWERS or column in row}
        row, renames, _ = rename_columns(row, names, data_format)
    shape = _find_shape(row, data_format)
    if shape.data_format == "tokenized":
        return _cut_tokens(
            parse_row({name: row[name] for name in row if name not in SPECIAL_COLUMNS}, "tokenized"), row
        )

    # What goes with the prompt: system, tools, history, variables of the template.
    fields = {name: value for name, value in row.items() if name not in SHAPE_COLUMNS | SPECIAL_COLUMNS}
    keys = renames.keys
    if shape.data_format == "messages":
        turns = read_json(rename_keys(row[shape.prompt], shape.prompt, keys, Findings()), shape.prompt)
        fields[shape.prompt] = _with_stand_in(turns, renames) if isinstance(turns, list) and turns else turns
        keys = {}
    elif shape.data_format == "text":
        fields |= {"prompt": read_text(row, "text"), "completion": _STAND_IN}
    else:
        fields |= {shape.prompt: row[shape.prompt], shape.answer: _STAND_IN}
        if shape.data_format == "alpaca" and "input" in row:
            fields["input"] = row["input"]
    names = {**keys, **{f"role:{name}": role for name, role in renames.roles.items()}} if columns else {}
    parsed = parse_row(fields, None, names, reads)
    assert isinstance(parsed, Conversation)
    messages = parsed.messages[:-1]
    if is_blank(messages[-1]["content"]) and not messages[-1].get("tool_calls"):
        raise DataError(f"{shape.prompt}: the prompt is empty; needs a question ({show_keys(row)})", EMPTY_TEXT)
    return parsed._replace(messages=messages)


def _find_shape(row: Mapping[str, Any], data_format: DataFormat | None) -> _PromptShape:
    """Return the first shape that has a prompt in the row, of those with their answer beside it if there is one.

    Raises:
        DataError: there is none.
    """
    shapes = [shape for shape in _SHAPES if data_format in (None, shape.data_format)]
    there = [shape for shape in shapes if shape.prompt in row]
    filled = [shape for shape in there if not is_nothing(row[shape.prompt])]
    if not filled and not is_nothing(row.get("input")):  # alpaca with all of its question in the input
        filled = [shape for shape in there if shape.data_format == "alpaca"]
    if filled:
        whole = [shape for shape in filled if shape.answer in row or shape.data_format in ("messages", "tokenized")]
        return (whole or filled)[0]
    if there:
        raise DataError(f"{there[0].prompt}: the prompt is empty; needs a question ({show_keys(row)})", EMPTY_TEXT)
    if data_format is None:
        raise DataError(f"no prompt in this row: {show_keys(row)}, known are {_KNOWN}", UNKNOWN_SHAPE)
    needed = " or ".join(shape.prompt for shape in shapes)
    raise DataError(f"data_format {data_format}: the row has no {needed} ({show_keys(row)})", MISSING_VALUE)


def _with_stand_in(turns: list[Any], renames: Renames) -> list[Any]:
    """Return the turns with a stand-in as the only answer at their end."""
    count = len(turns)
    while count and _is_answer(turns[count - 1], renames):
        count -= 1
    kept, last = turns[:count], turns[count - 1] if count else None
    if count == len(turns) and isinstance(last, dict) and not (last.get("role") or last.get("from")):
        for question, answer in _TURN_PAIRS:
            if question in last and answer in last:
                return [*kept[:-1], {**last, answer: _STAND_IN}]
    return [*kept, {"role": "assistant", "content": _STAND_IN}]


def _is_answer(turn: Any, renames: Renames) -> bool:
    name = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(name, str) and renames.roles.get(name, renames.roles.get(name.lower())) == "assistant"


def _cut_tokens(parsed: Any, row: Mapping[str, Any]) -> TokenizedRow:
    """Leave out the last trained tokens, and all after them, if the row says which are trained."""
    if parsed.labels == parsed.input_ids and row.get("labels") is None:  # it does not say
        return parsed
    end = max((k for k, label in enumerate(parsed.labels) if label != IGNORED), default=None)
    if end is None:
        return parsed
    while end >= 0 and parsed.labels[end] != IGNORED:
        end -= 1
    if end < 0:
        raise DataError("input_ids: no token before the answer; needs a prompt", BAD_TOKENS)
    return parsed._replace(input_ids=parsed.input_ids[: end + 1], labels=parsed.labels[: end + 1])
