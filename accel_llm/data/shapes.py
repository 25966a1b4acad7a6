"""Finds the format of a row by its columns, and refuses rows that are not for this kind of training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from accel_llm.chat.values import MISSING_VALUE, UNKNOWN_SHAPE, show_keys
from accel_llm.config.fields import DataFormat
from accel_llm.data.columns import (
    CONVERSATION_COLUMNS,
    SPECIAL_COLUMNS,
    read_label,
    refuse_media,
    refuse_preferences,
)
from accel_llm.data.tokenized import TOKEN_COLUMNS
from accel_llm.errors import DataError


class Shape(NamedTuple):
    """A format and the two columns by which it is recognized; a format with one column names it twice.

    `used` are the columns that rows of this shape are read from, those not counted that are read only if they hold text.
    """

    data_format: DataFormat
    first: str
    second: str
    used: frozenset[str] = frozenset()


# The first match counts, so finished forms come first: a row may still have the columns that it was made from.
_CHAT = frozenset(CONVERSATION_COLUMNS)
_PAIR = _CHAT | {"history"}
_SHAPES = (
    Shape("tokenized", "input_ids", "input_ids", frozenset(TOKEN_COLUMNS)),
    Shape("messages", "messages", "messages", _CHAT | {"messages"}),
    Shape("messages", "conversations", "conversations", _CHAT | {"conversations"}),
    Shape("messages", "conversation", "conversation", _CHAT | {"conversation"}),
    Shape("alpaca", "instruction", "output", _PAIR | {"instruction", "input", "output"}),
    Shape("prompt_completion", "prompt", "completion", _PAIR | {"prompt", "completion"}),
    Shape("query_response", "query", "response", _PAIR | {"query", "response"}),
    Shape("question_answer", "question", "answer", _PAIR | {"question", "answer"}),
    Shape("alpaca", "instruction", "response", _PAIR | {"instruction", "input", "response"}),
    Shape("text", "text", "text", frozenset({"text"})),
)
# All columns that decide which shape a row has.
SHAPE_COLUMNS = frozenset(column for shape in _SHAPES for column in shape.used) - _CHAT - {"history"}
_SHAPES_BY_FORMAT: dict[DataFormat | None, tuple[Shape, ...]] = {
    None: _SHAPES,
    **{shape.data_format: tuple(other for other in _SHAPES if other[0] == shape.data_format) for shape in _SHAPES},
}
_KNOWN_SHAPES = (
    "messages, conversations or conversation (a list of role/content, from/value or human/assistant), "
    "instruction/output (optional: input), instruction/response, prompt/completion, query/response, question/answer "
    "(optional for all: system, history, context, reasoning), text, response alone, input_ids (optional: labels)"
)
_RESPONSE_ALONE = Shape("text", "response", "response", frozenset({"response"}))
_NO_COLUMNS: frozenset[str] = frozenset()


def find_shape(row: Mapping[str, Any], data_format: DataFormat | None) -> tuple[Shape, frozenset[str]]:
    """Return the shape of a row, and the columns beside it that have said that its answer is to be trained.

    Raises:
        DataError: the row has an unknown shape, has images, or has an answer that is not to be learned.
    """
    if SPECIAL_COLUMNS.isdisjoint(row):
        return _find_shape(row, data_format), _NO_COLUMNS
    refuse_media(row)
    try:
        shape = _find_shape(row, data_format)
    except DataError:
        refuse_preferences(row)
        raise
    if shape.data_format in ("text", "tokenized"):
        return shape, _NO_COLUMNS
    refuse_preferences(row)
    return shape, read_label(row, shape.data_format)


def _find_shape(row: Mapping[str, Any], data_format: DataFormat | None) -> Shape:
    """Return the first shape that has both columns in the row, with a value in at least one of them.

    A row with a value in one column is taken as this shape, so that the error names the value that is missing.
    """
    shapes = _SHAPES_BY_FORMAT[data_format]
    for shape in shapes:
        first, second = shape.first, shape.second
        if first in row and second in row and (row[first] is not None or row[second] is not None):
            if row[second] is None:  # perhaps a loader filled the column, and the answer stands in another one
                others = [other for other in shapes if other.first == first and row.get(other.second) is not None]
                return others[0] if others else shape
            return shape

    # A row of one response is plain text. A shape without any value is the last choice.
    filled = [column for column, value in row.items() if value is not None]
    if filled == ["response"] and data_format in (None, "text"):
        return _RESPONSE_ALONE
    for shape in shapes:
        if shape.first in row and shape.second in row:
            return shape

    if data_format is None:
        raise DataError(f"unknown row shape: {show_keys(row)}, known shapes are {_KNOWN_SHAPES}", UNKNOWN_SHAPE)
    # Each shape of `data_format`, as the columns that it needs.
    needed = " or ".join(" and ".join(dict.fromkeys((shape.first, shape.second))) for shape in shapes)
    raise DataError(f"data_format {data_format}: the row has no {needed} ({show_keys(row)})", MISSING_VALUE)
