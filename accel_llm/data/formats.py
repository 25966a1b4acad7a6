"""A row of any known dataset shape -> a conversation, a document of plain text, or token ids.

What is wrong with a row is told as DataError, in one sentence without file or row number; see `messages` for reasons.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from accel_llm.chat.messages import (
    BAD_TOKENS,
    BROKEN_VARIABLES,
    EMPTY_TEXT,
    IMAGES,
    MESSAGE_FIELDS,
    MISSING_VALUE,
    NO_ANSWER,
    NOT_MESSAGES,
    TEXT_ONLY,
    UNKNOWN_SHAPE,
    Message,
    check_order,
    question_and_answer,
    read_answer,
    read_json,
    read_messages,
    read_text,
    read_tools,
    show_keys,
    show_value,
)
from accel_llm.config.fields import DataFormat
from accel_llm.errors import ConfigError, DataError


class Conversation(NamedTuple):
    """`tools`: JSON schemas in the shape of OpenAI; `variables`: the row's own for the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


class Document(NamedTuple):
    """Plain text, trained whole."""

    text: str


class Tokenized(NamedTuple):
    """`labels[k]` belongs to `input_ids[k]` (unshifted), -100 where it is not trained."""

    input_ids: list[int]
    labels: list[int]


class Shape(NamedTuple):
    """A format, and the columns that tell it on sight (a format of one column: the same twice)."""

    data_format: DataFormat
    first: str
    second: str


# In the order in which they are looked for: a row may keep what it was made from.
_SHAPES = (
    Shape("tokenized", "input_ids", "input_ids"),
    Shape("messages", "messages", "messages"),
    Shape("messages", "conversations", "conversations"),
    Shape("messages", "conversation", "conversation"),
    Shape("alpaca", "instruction", "output"),
    Shape("prompt_completion", "prompt", "completion"),
    Shape("query_response", "query", "response"),
    Shape("question_answer", "question", "answer"),
    Shape("text", "text", "text"),
)
_SHAPES_OF: dict[DataFormat | None, tuple[Shape, ...]] = {
    None: _SHAPES,
    **{shape.data_format: tuple(other for other in _SHAPES if other[0] == shape.data_format) for shape in _SHAPES},
}
_OF_CONVERSATIONS = ("system", "tools", "chat_template_kwargs")
# What `columns` can name.
_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", *_OF_CONVERSATIONS, *MESSAGE_FIELDS),
    "alpaca": ("instruction", "input", "output", "history", *_OF_CONVERSATIONS),
    "prompt_completion": ("prompt", "completion", "history", *_OF_CONVERSATIONS, *MESSAGE_FIELDS),
    "query_response": ("query", "response", "history", *_OF_CONVERSATIONS),
    "question_answer": ("question", "answer", "history", *_OF_CONVERSATIONS),
    "text": ("text",),
    "tokenized": ("input_ids", "labels", "attention_mask"),
}
_KNOWN_SHAPES = (
    "messages, conversations or conversation (a list of role/content, from/value or human/assistant), "
    "instruction/output (optional: input), prompt/completion, query/response, question/answer (optional for all: "
    "system, history), text, response alone, input_ids (optional: labels)"
)
_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_RESERVED = ("messages", "tools", "add_generation_prompt")
_TOO_LARGE = 2**31


def column_problems(columns: Mapping[str, str], data_format: DataFormat | None = None) -> list[str]:
    """One sentence for each field that `columns` renames and no shape has (with `data_format`: that shape has not)."""
    formats: Iterable[DataFormat] = [data_format] if data_format else _COLUMNS
    known = list(dict.fromkeys(column for name in formats for column in _COLUMNS[name]))
    of_format = f" of data_format {data_format}" if data_format else ""
    return [
        f"columns: {field}={column}, but {field!r} is no field{of_format}, known are {', '.join(known)}"
        for field, column in columns.items()
        if field not in known
    ]


def parse_row(
    row: Mapping[str, Any], data_format: DataFormat | None = None, columns: Mapping[str, str] = {}
) -> Conversation | Document | Tokenized:
    """What `row` says, in the shape `data_format`, or in the one recognised on sight. `row` itself is left alone.

    `columns` says from which column of the row, or key of a message, a field is read: {"instruction": "question"}. A
    value of None is none, as loaders fill missing columns with it; an empty system prompt, input or history is none,
    too. Of a prompt that is a list of messages the answers are context (`train` False).

    Raises:
        DataError: the row is not right, with one of the reasons in `messages`.
        ConfigError: `columns` names a field that no shape has.
    """
    inner: dict[str, str] = {}
    if columns:
        row, inner = _renamed_columns(row, columns, data_format)
    if not _MEDIA.isdisjoint(row):
        _refuse_media(row)
    shape = _shape_of(row, data_format)
    if shape.data_format == "text":
        return Document(_document(row, shape.first))
    if shape.data_format == "tokenized":
        return _tokenized(row)
    if shape.data_format == "messages":
        messages = read_messages(_turns(row[shape.first], shape.first, inner), shape.first)
    elif shape.first == "prompt" and (isinstance(row["prompt"], list) or isinstance(row["completion"], list)):
        messages = _prompted(row, shape, inner)
    else:
        messages = _paired(row, shape)
    system = _optional_text(row, "system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    check_order(messages)
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    return Conversation(messages, read_tools(tools) if tools else None, _variables(variables) if variables else {})


def _shape_of(row: Mapping[str, Any], data_format: DataFormat | None) -> Shape:
    """The first shape whose columns are all there and not all None, so that a row with half of one is seen as such."""
    shapes = _SHAPES_OF[data_format]
    for shape in shapes:
        first, second = shape.first, shape.second
        if first in row and second in row and (row[first] is not None or row[second] is not None):
            return shape
    filled = [column for column, value in row.items() if value is not None]
    if filled == ["response"] and data_format in (None, "text"):
        return Shape("text", "response", "response")
    for shape in shapes:
        if shape.first in row and shape.second in row:
            return shape
    if data_format is None:
        raise DataError(f"unknown row shape: {show_keys(row)}, known shapes are {_KNOWN_SHAPES}", UNKNOWN_SHAPE)
    needed = " or ".join(" and ".join(dict.fromkeys((shape.first, shape.second))) for shape in shapes)
    raise DataError(f"data_format {data_format}: the row has no {needed} ({show_keys(row)})", MISSING_VALUE)


def _paired(row: Mapping[str, Any], shape: Shape) -> list[Message]:
    history = row.get("history")
    messages = _history(history) if history else []
    messages += question_and_answer(row, shape.first, shape.second)
    if shape.data_format == "alpaca" and (extra := _optional_text(row, "input")):
        question = messages[-2]
        question["content"] = "\n".join(filter(None, (question["content"], extra)))
    return messages


def _optional_text(row: Mapping[str, Any], field: str) -> str:
    return "" if row.get(field) is None else read_text(row, field)


def _history(history: Any) -> list[Message]:
    history = read_json(history, "history")
    if not isinstance(history, list | tuple):
        raise DataError(f"history: found {show_value(history)}, needs a list of pairs [question, answer]", NOT_MESSAGES)
    messages: list[Message] = []
    for index, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(
                f"history[{index}]: found {show_value(turn)}, needs a pair [question, answer]", NOT_MESSAGES
            )
        try:
            messages += question_and_answer({"question": turn[0], "answer": turn[1]}, "question", "answer")
        except DataError as error:
            raise DataError(f"history[{index}].{error}", error.reason) from None
    return messages


def _prompted(row: Mapping[str, Any], shape: Shape, inner: Mapping[str, str]) -> list[Message]:
    """Lists of messages, or one list and one text, whose completion is trained and whose prompt is context."""
    prompt, completion = row[shape.first], row[shape.second]
    if isinstance(prompt, list):
        messages = [_context(message) for message in read_messages(_turns(prompt, "prompt", inner), "prompt")]
    else:
        messages: list[Message] = [{"role": "user", "content": read_text(row, "prompt")}]
    if not isinstance(completion, list):
        return [*messages, read_answer(row, "completion")]
    answers = read_messages(_turns(completion, "completion", inner), "completion")
    if all(message["role"] != "assistant" for message in answers):
        raise DataError("completion: no assistant turn to train on", NO_ANSWER)
    return messages + answers


def _context(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {**{field: value for field, value in message.items() if field != "weight"}, "train": False}


def _document(row: Mapping[str, Any], field: str) -> str:
    text = read_text(row, field)
    if not text or text.isspace():
        raise DataError(f"{field}: the text is empty ({show_keys(row)})", EMPTY_TEXT)
    return text


def _tokenized(row: Mapping[str, Any]) -> Tokenized:
    ids = _numbers(row, "input_ids")
    if min(ids) < 0:
        raise DataError(f"input_ids: found {min(ids)}, needs token ids from 0 upwards", BAD_TOKENS)
    mask = row.get("attention_mask")
    if mask is not None and 0 in _numbers(row, "attention_mask"):
        raise DataError("attention_mask: found padding, needs rows as they are before they are padded", BAD_TOKENS)
    if row.get("labels") is None:
        return Tokenized(ids, list(ids))
    labels = _numbers(row, "labels")
    if len(labels) != len(ids):
        raise DataError(f"labels: found {len(labels)} for {len(ids)} input_ids, needs one for each", BAD_TOKENS)
    if min(labels) < 0:
        wrong = next((label for label in labels if label < 0 and label != -100), None)
        if wrong is not None:
            raise DataError(f"labels: found {wrong}, needs token ids, or -100 where nothing is trained", BAD_TOKENS)
    return Tokenized(ids, labels)


def _numbers(row: Mapping[str, Any], field: str) -> list[int]:
    """A column of token ids or of what belongs to them, not empty; a list of its own."""
    numbers = row[field]
    if numbers is None:
        raise DataError(f"{field}: found null, needs a list of integers ({show_keys(row)})", MISSING_VALUE)
    # set(map(type)) is the quickest look at each of some thousand numbers; true and false are no numbers.
    if not isinstance(numbers, list | tuple) or set(map(type, numbers)) != {int} or max(numbers) >= _TOO_LARGE:
        raise DataError(f"{field}: found {show_value(numbers)}, needs a list of integers that is not empty", BAD_TOKENS)
    return list(numbers)


def _variables(variables: Any) -> dict[str, Any]:
    variables = read_json(variables, "chat_template_kwargs")
    if not isinstance(variables, dict):
        found = show_value(variables)
        raise DataError(f"chat_template_kwargs: found {found}, needs an object of template variables", BROKEN_VARIABLES)
    reserved = [name for name in _RESERVED if name in variables]
    if reserved:
        raise DataError(f"chat_template_kwargs: {reserved[0]} is set by this program, not by a row", BROKEN_VARIABLES)
    return {name: value for name, value in variables.items() if value is not None}


def _refuse_media(row: Mapping[str, Any]) -> None:
    for column in row:
        if column in _MEDIA and row[column]:
            raise DataError(f"{column}: found {show_value(row[column])}, but {TEXT_ONLY}", IMAGES)


def _renamed_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], data_format: DataFormat | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The row under our names, and those of `columns` that are about the keys of its messages."""
    problems = column_problems(columns, data_format)
    if problems:
        raise ConfigError(*problems)
    inner = {field: column for field, column in columns.items() if field in MESSAGE_FIELDS}
    outer = {field: column for field, column in columns.items() if field not in inner}
    for field, column in outer.items():
        if column not in row:
            raise DataError(
                f"columns: {field} is read from {column!r}, which is missing ({show_keys(row)})", MISSING_VALUE
            )
    return _renamed(row, outer), inner


def _renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    taken = set(names.values())
    kept = {name: value for name, value in fields.items() if name not in taken}
    return {**kept, **{name: fields[theirs] for name, theirs in names.items() if theirs in fields}}


def _turns(turns: Any, field: str, inner: Mapping[str, str]) -> Any:
    """`turns` with the keys of its messages under our names."""
    turns = read_json(turns, field)
    if not inner or not isinstance(turns, list):
        return turns
    for name in ("role", "content", "human", "assistant"):
        if name in inner and not any(isinstance(turn, dict) and inner[name] in turn for turn in turns):
            raise DataError(
                f"columns: {name} is read from {inner[name]!r}, which no message of {field} has", MISSING_VALUE
            )
    return [_renamed(turn, inner) if isinstance(turn, dict) else turn for turn in turns]
