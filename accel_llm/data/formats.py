"""Parse a row of any known dataset shape into a conversation, a document of plain text, or token ids.

A bad row raises DataError: one sentence without file and row number, and a reason from `accel_llm.chat.values`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from accel_llm.chat.messages import (
    READS_NOTHING,
    Message,
    check_order,
    question_and_answer,
    read_answer,
    read_messages,
)
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.roles import ROLES
from accel_llm.chat.tools import clear_calls, collect_tools
from accel_llm.chat.values import (
    BAD_WEIGHT,
    BROKEN_VARIABLES,
    EMPTY_TEXT,
    NO_ANSWER,
    NOT_MESSAGES,
    TOO_DEEP,
    Findings,
    read_json,
    read_text,
    show_keys,
    show_value,
)
from accel_llm.chat.weights import SWITCHES, WEIGHT_KEYS
from accel_llm.config.fields import DataFormat
from accel_llm.data.columns import (
    FIELDS,
    Renames,
    rename_columns,
    rename_keys,
)
from accel_llm.data.ledger import Unused
from accel_llm.data.shapes import Shape, find_shape
from accel_llm.data.tokenized import TokenizedRow, read_tokens
from accel_llm.data.unused import count_characters, list_unused
from accel_llm.errors import DataError


class Conversation(NamedTuple):
    """A chat, with the tools and the template variables of its row.

    `unused` counts by name (`column 'x'`, `'x' of messages`) what the row has and nothing uses; `characters` is the
    size of the whole row, to compare with; `remarks` are sentences for the ledger that are true of this row.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None  # JSON schemas as OpenAI writes them
    variables: dict[str, Any]  # `chat_template_kwargs` of the row, and columns that the template reads
    unused: tuple[tuple[str, Unused], ...] = ()
    characters: int = 0
    remarks: tuple[str, ...] = ()


class Document(NamedTuple):
    """Plain text; all of it is trained. For the other fields see `Conversation`."""

    text: str
    unused: tuple[tuple[str, Unused], ...] = ()
    characters: int = 0
    remarks: tuple[str, ...] = ()


NO_RENAMES = Renames({}, {}, ROLES)
# Columns that are used if they hold text and nothing else of the row has their place.
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
REASONING_COLUMNS = ("reasoning_content", "reasoning", "thinking")
JOINED_CONTEXT = "the column context was joined to the question, as alpaca's input is."
_RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt")


def parse_row(
    row: Mapping[str, Any],
    data_format: DataFormat | None = None,
    columns: Mapping[str, str] = {},
    reads: TemplateReads = READS_NOTHING,
) -> Conversation | Document | TokenizedRow:
    """Parse `row` as `data_format`, or as the format that its columns show. `row` is not changed.

    `columns` maps a field to the column of the row, or to the key of a message, that holds it: {"instruction":
    "question"}; {"role:agent": "assistant"} names a role. `reads` says what the chat template takes from a row beside
    what every template reads: those keys of messages are kept, and those columns become its variables.

    None counts as missing, because loaders fill missing columns with it. An empty system prompt, input or history
    counts as missing, too. If the prompt is a list of messages, its answers are context (`train` False).

    Raises:
        DataError: the row is bad; `reason` is one of those in `accel_llm.chat.values`.
        ConfigError: `columns` names an unknown field.
    """
    characters = count_characters(row)
    renames, overwritten = NO_RENAMES, []
    if columns:
        row, renames, overwritten = rename_columns(row, columns, data_format)
    shape, labels = find_shape(row, data_format)
    try:
        if shape.data_format == "text":
            unused = _list_columns(row, row.keys() - shape.used, overwritten, None) if len(row) > 1 else ()
            return Document(_read_document(row, shape.first), unused, characters)
        if shape.data_format == "tokenized":
            unused = _list_columns(row, row.keys() - shape.used, overwritten, None)
            return read_tokens(row)._replace(unused=unused, characters=characters)
        messages, tools, variables, left, findings = _read_conversation(row, shape, renames, reads)
        unused = (
            _list_columns(row, left - labels, overwritten, findings) if left or overwritten or findings.unused else ()
        )
        return Conversation(messages, tools, variables, unused, characters, tuple(findings.remarks))
    except RecursionError:
        raise DataError(f"values nested too deep ({show_keys(row)}); needs fewer levels", TOO_DEEP) from None


def _read_conversation(
    row: Mapping[str, Any], shape: Shape, renames: Renames, reads: TemplateReads
) -> tuple[list[Message], list[dict[str, Any]] | None, dict[str, Any], set[str], Findings]:
    """Return messages, tools and variables of a row, the columns that are left, and what else was found."""
    findings, is_pair = Findings(), False
    if shape.data_format == "messages":
        turns = rename_keys(row[shape.first], shape.first, renames.keys, findings)
        messages = read_messages(turns, shape.first, reads, renames.roles, findings)
    elif shape.first == "prompt" and (isinstance(row["prompt"], list) or isinstance(row["completion"], list)):
        messages = _read_prompt_and_completion(row, renames, reads, findings)
    else:
        messages, is_pair = _read_pair(row, shape), True

    # What the other columns say.
    left = row.keys() - shape.used
    if not is_pair and row.get("history"):
        left.add("history")
    if left or "system" in row:
        _add_columns(messages, row, left, is_pair, findings)
    check_order(messages)
    tools = None
    if "tools" in row or "functions" in row or findings.tools:
        places = [("tools", row.get("tools")), ("functions", row.get("functions")), *findings.tools]
        tools = collect_tools(places, findings)
    if findings.calls:
        clear_calls(findings, tools)
    given = row.get("chat_template_kwargs")
    variables = _read_variables(given, reads, findings) if given else {}
    for name in left & reads.variables - FIELDS if left and reads.variables else ():
        _add_variable(variables, name, row[name], left)
    return messages, tools, variables, left, findings


def _list_columns(
    row: Mapping[str, Any], left: set[str], overwritten: list[tuple[str, Any]], findings: Findings | None
) -> tuple[tuple[str, Unused], ...]:
    """Return what nothing uses: the columns of `left` in the order of the row, then the rest."""
    return list_unused([*((name, row[name]) for name in row if name in left), *overwritten], findings)


def _read_pair(row: Mapping[str, Any], shape: Shape) -> list[Message]:
    """Read a question and its answer, with the turns of `history` before them."""
    history = row.get("history")
    messages = _read_history(history) if history else []
    messages += question_and_answer(row, shape.first, shape.second)
    # The input of alpaca follows its instruction, in the same user turn.
    if shape.data_format == "alpaca" and (extra := _optional_text(row, "input")):
        _join_to_question(messages, extra)
    return messages


def _join_to_question(messages: list[Message], extra: str) -> None:
    question = messages[-2]
    question["content"] = "\n".join(filter(None, (question["content"], extra)))


def _optional_text(row: Mapping[str, Any], field: str) -> str:
    return "" if row.get(field) is None else read_text(row, field)


def _add_columns(
    messages: list[Message], row: Mapping[str, Any], left: set[str], is_pair: bool, findings: Findings
) -> None:
    """Add the columns for a system message and, beside question and answer, for context and reasoning.

    What is used is taken out of `left`. A second text for the same place is put there.
    """
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    _optional_text(row, "system")  # anything but text is an error in this column
    if (text := _first_text(row, _SYSTEM_COLUMNS, system, left)) and system is None:
        messages.insert(0, {"role": "system", "content": text})
    if not (is_pair and left):
        return
    context = row.get("context")
    if isinstance(context, str) and context.strip():
        _join_to_question(messages, context)
        findings.remark(JOINED_CONTEXT)
        left.discard("context")
    if reasoning := _first_text(row, REASONING_COLUMNS, None, left):
        messages[-1]["reasoning_content"] = messages[-1]["thinking"] = reasoning


def _first_text(row: Mapping[str, Any], columns: tuple[str, ...], text: str | None, left: set[str]) -> str | None:
    """Return `text`, or the first text of the columns; those that have another one are left."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and value and text in (None, value):
            text = value
            left.discard(column)
        elif value:
            left.add(column)
    return text


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


def _read_prompt_and_completion(
    row: Mapping[str, Any], renames: Renames, reads: TemplateReads, findings: Findings
) -> list[Message]:
    """Read two lists of messages, or one list and one text. The completion is trained, the prompt is context."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        turns = rename_keys(prompt, "prompt", renames.keys, findings)
        messages = [as_context(m) for m in read_messages(turns, "prompt", reads, renames.roles, findings)]
        _check_context(turns, renames.roles, findings)
    else:
        messages: list[Message] = [{"role": "user", "content": read_text(row, "prompt")}]
    if not isinstance(completion, list):
        return [*messages, read_answer(row, "completion")]
    turns = rename_keys(completion, "completion", renames.keys, findings)
    answers = read_messages(turns, "completion", reads, renames.roles, findings)
    if all(message["role"] != "assistant" for message in answers):
        raise DataError("completion: no assistant turn to train on", NO_ANSWER)
    return messages + answers


def as_context(message: Message) -> Message:
    """Return the message so that it is not trained."""
    if message["role"] != "assistant":
        return message
    return {**{field: value for field, value in message.items() if field not in ("weight", "segments")}, "train": False}


def _check_context(turns: Any, roles: Mapping[str, str], findings: Findings) -> None:
    """Refuse answers of a prompt that say that they are trained, and note weights of them that have no effect.

    Raises:
        DataError: such an answer has `train` true, or another switch of this meaning.
    """
    for index, turn in enumerate(turns):
        role = str(turn.get("role") or turn.get("from")).lower()
        if roles.get(role) != "assistant" and turn.keys().isdisjoint(("assistant", "output")):
            continue
        parts = turn.get("content") if isinstance(turn.get("content"), list) else ()
        for fields in (turn, *parts):
            for key in WEIGHT_KEYS.intersection(fields):
                value = fields[key]
                if key in SWITCHES and value in (True, 1):
                    problem = "but the answers of a prompt are context; move the answer to the completion"
                    raise DataError(f"prompt[{index}].{key}: found {show_value(value)}, {problem}", BAD_WEIGHT)
                if value and key != "masked":
                    findings.leave(key, "messages of the prompt", value)


def _read_document(row: Mapping[str, Any], field: str) -> str:
    text = read_text(row, field)
    if not text or text.isspace():
        raise DataError(f"{field}: the text is empty ({show_keys(row)})", EMPTY_TEXT)
    return text


def _read_variables(variables: Any, reads: TemplateReads, findings: Findings) -> dict[str, Any]:
    """Read the variables that a row sets for the chat template, and note those that it does not read."""
    variables = read_json(variables, "chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        value = show_value(variables)
        raise DataError(f"chat_template_kwargs: found {value}; needs an object of template variables", BROKEN_VARIABLES)
    reserved = [name for name in _RESERVED_VARIABLES if name in variables]
    if reserved:
        raise DataError(f"chat_template_kwargs: {reserved[0]} is set by this program, not by a row", BROKEN_VARIABLES)
    for name, value in variables.items():
        if name not in reads.variables:
            findings.leave(name, "chat_template_kwargs", value)
    # Loaders fill keys that a row does not have with None.
    return {name: _as_truth(value) for name, value in variables.items() if value is not None}


def _add_variable(variables: dict[str, Any], name: str, value: Any, left: set[str]) -> None:
    """Make a column a variable of the chat template, unless the row sets the variable itself or the tokenizer does."""
    if value is None or name.endswith("_token") or name in _RESERVED_VARIABLES:
        return
    value = _as_truth(value)
    if variables.setdefault(name, value) == value:
        left.discard(name)


def _as_truth(value: Any) -> Any:
    """Return the boolean that a text such as "false" means: each text, this one too, is true for a template."""
    word = value.strip().lower() if isinstance(value, str) else ""
    return word == "true" if word in ("true", "false") else value
