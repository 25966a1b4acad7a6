"""Parse a row of any known dataset shape into a conversation, a document of plain text, or token ids.

A bad row raises DataError: one sentence without file and row number, and a reason from `accel_llm.chat.messages`.
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
from accel_llm.chat.targets import IGNORED
from accel_llm.config.fields import DataFormat
from accel_llm.errors import ConfigError, DataError


class Conversation(NamedTuple):
    """A chat, with the tools and the template variables of its row."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None  # JSON schemas as OpenAI writes them
    variables: dict[str, Any]  # `chat_template_kwargs` of the row


class Document(NamedTuple):
    """Plain text; all of it is trained."""

    text: str


class TokenizedRow(NamedTuple):
    """Token ids; `labels[k]` belongs to `input_ids[k]` (unshifted) and is IGNORED where it is not trained."""

    input_ids: list[int]
    labels: list[int]


class Shape(NamedTuple):
    """A format and the two columns by which it is recognized; a format with one column names it twice."""

    data_format: DataFormat
    first: str
    second: str


# The first match counts, so finished forms come first: a row may still have the columns that it was made from.
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
_SHAPES_BY_FORMAT: dict[DataFormat | None, tuple[Shape, ...]] = {
    None: _SHAPES,
    **{shape.data_format: tuple(other for other in _SHAPES if other[0] == shape.data_format) for shape in _SHAPES},
}
_CONVERSATION_COLUMNS = ("system", "tools", "chat_template_kwargs")
# The fields that `columns` can rename.
_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", *_CONVERSATION_COLUMNS, *MESSAGE_FIELDS),
    "alpaca": ("instruction", "input", "output", "history", *_CONVERSATION_COLUMNS),
    "prompt_completion": ("prompt", "completion", "history", *_CONVERSATION_COLUMNS, *MESSAGE_FIELDS),
    "query_response": ("query", "response", "history", *_CONVERSATION_COLUMNS),
    "question_answer": ("question", "answer", "history", *_CONVERSATION_COLUMNS),
    "text": ("text",),
    "tokenized": ("input_ids", "labels", "attention_mask"),
}
_KNOWN_SHAPES = (
    "messages, conversations or conversation (a list of role/content, from/value or human/assistant), "
    "instruction/output (optional: input), prompt/completion, query/response, question/answer (optional for all: "
    "system, history), text, response alone, input_ids (optional: labels)"
)
_MEDIA_COLUMNS = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt")
_MAX_TOKEN_ID = 2**31 - 1  # ids are stored as int32


def column_problems(columns: Mapping[str, str], data_format: DataFormat | None = None) -> list[str]:
    """Return one sentence for each field that `columns` renames but `data_format` (None: any format) does not have."""
    formats: Iterable[DataFormat] = [data_format] if data_format else _COLUMNS
    fields = list(dict.fromkeys(column for name in formats for column in _COLUMNS[name]))
    format_text = f" of data_format {data_format}" if data_format else ""
    return [
        f"columns: {field}={column}, but {field!r} is not a field{format_text}; the fields are {', '.join(fields)}."
        for field, column in columns.items()
        if field not in fields
    ]


def parse_row(
    row: Mapping[str, Any], data_format: DataFormat | None = None, columns: Mapping[str, str] = {}
) -> Conversation | Document | TokenizedRow:
    """Parse `row` as `data_format`, or as the format that its columns show. `row` is not changed.

    `columns` maps a field to the column of the row, or to the key of a message, that holds it: {"instruction":
    "question"}. None counts as missing, because loaders fill missing columns with it. An empty system prompt, input or
    history counts as missing, too. If the prompt is a list of messages, its answers are context (`train` False).

    Raises:
        DataError: the row is bad; `reason` is one of those in `accel_llm.chat.messages`.
        ConfigError: `columns` names an unknown field.
    """
    # Rename the columns, and find the format.
    message_keys: dict[str, str] = {}
    if columns:
        row, message_keys = _rename_columns(row, columns, data_format)
    if not _MEDIA_COLUMNS.isdisjoint(row):
        _refuse_media(row)
    shape = _find_shape(row, data_format)

    if shape.data_format == "text":
        return Document(_read_document(row, shape.first))
    if shape.data_format == "tokenized":
        return _read_tokens(row)

    # All other formats are conversations.
    if shape.data_format == "messages":
        messages = read_messages(_rename_keys(row[shape.first], shape.first, message_keys), shape.first)
    elif shape.first == "prompt" and (isinstance(row["prompt"], list) or isinstance(row["completion"], list)):
        messages = _read_prompt_and_completion(row, shape, message_keys)
    else:
        messages = _read_pair(row, shape)
    system = _optional_text(row, "system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    check_order(messages)
    tools, variables = row.get("tools"), row.get("chat_template_kwargs")
    return Conversation(messages, read_tools(tools) if tools else None, _read_variables(variables) if variables else {})


def _find_shape(row: Mapping[str, Any], data_format: DataFormat | None) -> Shape:
    """Return the first shape that has both columns in the row, with a value in at least one of them.

    A row with a value in one column is taken as this shape, so that the error names the value that is missing.
    """
    shapes = _SHAPES_BY_FORMAT[data_format]
    for shape in shapes:
        first, second = shape.first, shape.second
        if first in row and second in row and (row[first] is not None or row[second] is not None):
            return shape

    # A row of one response is plain text. A shape without any value is the last choice.
    filled = [column for column, value in row.items() if value is not None]
    if filled == ["response"] and data_format in (None, "text"):
        return Shape("text", "response", "response")
    for shape in shapes:
        if shape.first in row and shape.second in row:
            return shape

    if data_format is None:
        raise DataError(f"unknown row shape: {show_keys(row)}, known shapes are {_KNOWN_SHAPES}", UNKNOWN_SHAPE)
    # Each shape of `data_format`, as the columns that it needs.
    needed = " or ".join(" and ".join(dict.fromkeys((shape.first, shape.second))) for shape in shapes)
    raise DataError(f"data_format {data_format}: the row has no {needed} ({show_keys(row)})", MISSING_VALUE)


def _read_pair(row: Mapping[str, Any], shape: Shape) -> list[Message]:
    """Read a question and its answer, with the turns of `history` before them."""
    history = row.get("history")
    messages = _read_history(history) if history else []
    messages += question_and_answer(row, shape.first, shape.second)
    # The input of alpaca follows its instruction, in the same user turn.
    if shape.data_format == "alpaca" and (extra := _optional_text(row, "input")):
        question = messages[-2]
        question["content"] = "\n".join(filter(None, (question["content"], extra)))
    return messages


def _optional_text(row: Mapping[str, Any], field: str) -> str:
    return "" if row.get(field) is None else read_text(row, field)


def _read_history(history: Any) -> list[Message]:
    history = read_json(history, "history")
    if not isinstance(history, list | tuple):
        raise DataError(f"history: found {show_value(history)}; needs a list of pairs [question, answer]", NOT_MESSAGES)
    messages: list[Message] = []
    for index, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(
                f"history[{index}]: found {show_value(turn)}; needs a pair [question, answer]", NOT_MESSAGES
            )
        try:
            messages += question_and_answer({"question": turn[0], "answer": turn[1]}, "question", "answer")
        except DataError as error:
            # Name the pair as well as the field in it.
            raise DataError(f"history[{index}].{error}", error.reason) from None
    return messages


def _read_prompt_and_completion(row: Mapping[str, Any], shape: Shape, message_keys: Mapping[str, str]) -> list[Message]:
    """Read two lists of messages, or one list and one text. The completion is trained, the prompt is context."""
    prompt, completion = row[shape.first], row[shape.second]
    if isinstance(prompt, list):
        prompt = read_messages(_rename_keys(prompt, "prompt", message_keys), "prompt")
        messages = [_as_context(message) for message in prompt]
    else:
        messages: list[Message] = [{"role": "user", "content": read_text(row, "prompt")}]
    if not isinstance(completion, list):
        return [*messages, read_answer(row, "completion")]
    answers = read_messages(_rename_keys(completion, "completion", message_keys), "completion")
    if all(message["role"] != "assistant" for message in answers):
        raise DataError("completion: no assistant turn to train on", NO_ANSWER)
    return messages + answers


def _as_context(message: Message) -> Message:
    """Return the message so that it is not trained."""
    if message["role"] != "assistant":
        return message
    return {**{field: value for field, value in message.items() if field != "weight"}, "train": False}


def _read_document(row: Mapping[str, Any], field: str) -> str:
    text = read_text(row, field)
    if not text or text.isspace():
        raise DataError(f"{field}: the text is empty ({show_keys(row)})", EMPTY_TEXT)
    return text


def _read_tokens(row: Mapping[str, Any]) -> TokenizedRow:
    """Read token ids; without `labels` all of them are trained."""
    ids = _read_integers(row, "input_ids")
    if min(ids) < 0:
        raise DataError(f"input_ids: found {min(ids)}; needs token ids from 0 upwards", BAD_TOKENS)
    mask = row.get("attention_mask")
    if mask is not None and 0 in _read_integers(row, "attention_mask"):
        raise DataError("attention_mask: found padding; needs rows without padding", BAD_TOKENS)
    if row.get("labels") is None:
        return TokenizedRow(ids, list(ids))

    labels = _read_integers(row, "labels")
    if len(labels) != len(ids):
        raise DataError(f"labels: found {len(labels)} for {len(ids)} input_ids; needs one for each", BAD_TOKENS)
    if min(labels) < 0:
        bad_label = next((label for label in labels if label < 0 and label != IGNORED), None)
        if bad_label is not None:
            raise DataError(
                f"labels: found {bad_label}; needs token ids, or {IGNORED} where nothing is trained", BAD_TOKENS
            )
    return TokenizedRow(ids, labels)


def _read_integers(row: Mapping[str, Any], field: str) -> list[int]:
    """Return a copy of the integers in a column: token ids, labels or a mask."""
    numbers = row[field]
    if numbers is None:
        raise DataError(f"{field}: found null; needs a list of integers ({show_keys(row)})", MISSING_VALUE)
    # set(map(type)) is the fastest way to check thousands of numbers; unlike isinstance it tells bool from int.
    if not isinstance(numbers, list | tuple) or set(map(type, numbers)) != {int} or max(numbers) > _MAX_TOKEN_ID:
        raise DataError(f"{field}: found {show_value(numbers)}; needs a list of one or more integers", BAD_TOKENS)
    return list(numbers)


def _read_variables(variables: Any) -> dict[str, Any]:
    """Read the variables that a row sets for the chat template."""
    variables = read_json(variables, "chat_template_kwargs")
    if not isinstance(variables, dict):
        value = show_value(variables)
        raise DataError(f"chat_template_kwargs: found {value}; needs an object of template variables", BROKEN_VARIABLES)
    reserved = [name for name in _RESERVED_VARIABLES if name in variables]
    if reserved:
        raise DataError(f"chat_template_kwargs: {reserved[0]} is set by this program, not by a row", BROKEN_VARIABLES)
    # Loaders fill keys that a row does not have with None.
    return {name: value for name, value in variables.items() if value is not None}


def _refuse_media(row: Mapping[str, Any]) -> None:
    for column in row:
        if column in _MEDIA_COLUMNS and row[column]:
            raise DataError(f"{column}: found {show_value(row[column])}, but {TEXT_ONLY}", IMAGES)


def _rename_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], data_format: DataFormat | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the row with columns under our names, and the entries of `columns` that rename keys of its messages."""
    problems = column_problems(columns, data_format)
    if problems:
        raise ConfigError(*problems)

    # Fields of messages are keys inside the row; all other fields are columns of it.
    message_keys = {field: column for field, column in columns.items() if field in MESSAGE_FIELDS}
    row_columns = {field: column for field, column in columns.items() if field not in message_keys}
    for field, column in row_columns.items():
        if column not in row:
            raise DataError(
                f"columns: {field} is read from {column!r}, which is missing ({show_keys(row)})", MISSING_VALUE
            )
    return _rename(row, row_columns), message_keys


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return `values` with each name of `names` in place of the name that it maps to."""
    old_names = set(names.values())
    others = {name: value for name, value in values.items() if name not in old_names}
    return {**others, **{name: values[old_name] for name, old_name in names.items() if old_name in values}}


def _rename_keys(turns: Any, field: str, message_keys: Mapping[str, str]) -> Any:
    """Return `turns` with the keys of its messages under our names."""
    turns = read_json(turns, field)
    if not message_keys or not isinstance(turns, list):
        return turns
    # A message may lack an optional key, but these keys must be in some message.
    for name in ("role", "content", "human", "assistant"):
        key = message_keys.get(name)
        if key is not None and not any(isinstance(turn, dict) and key in turn for turn in turns):
            raise DataError(f"columns: {name} is read from {key!r}, which no message of {field} has", MISSING_VALUE)
    return [_rename(turn, message_keys) if isinstance(turn, dict) else turn for turn in turns]
