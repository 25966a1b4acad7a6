"""Converts messages from the spellings of data sets to the one that chat templates read.

Errors about a row are `DataError`s with one of the reasons below. Their text has no file, row number or full stop: the
caller knows file and row and completes the sentence.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from accel_llm.errors import DataError

Message = dict[str, Any]

# Reasons to refuse a row; the ledger counts refused rows by them.
UNKNOWN_SHAPE = "unknown shape"
MISSING_VALUE = "missing value"
NOT_TEXT = "not text"
NOT_JSON = "not JSON"
NOT_MESSAGES = "not a list of messages"
UNKNOWN_ROLE = "unknown role"
EMPTY_ANSWER = "empty answer"
EMPTY_TEXT = "empty text"
NO_ANSWER = "no answer"
ASSISTANT_FIRST = "assistant first"
TWO_USER_TURNS = "two user turns in a row"
TWO_ASSISTANT_TURNS = "two assistant turns in a row"
TOOL_OUT_OF_PLACE = "tool turn out of place"
BROKEN_TOOLS = "broken tools"
BROKEN_VARIABLES = "broken chat_template_kwargs"
TWO_REASONINGS = "two reasonings"
BAD_WEIGHT = "bad weight"
BAD_TOKENS = "bad tokens"
IMAGES = "images"

TEXT_ONLY = "this program trains on text alone"

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name; most templates know only the older one
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",  # OpenAI's older name for a result
    "tool_response": "tool",
    "function_response": "tool",
}
# Roles whose content is a tool call in JSON.
_CALL_ROLES = frozenset({"function_call", "tool_call"})
# Templates of Qwen3 and most others read the first, gpt-oss the second; some servers return the third.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_EMPTY = (None, "")  # data loaders fill absent fields with these
_MEDIA_PARTS = frozenset(
    {"image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"}
)
# Fields of a message that the option `columns` can rename.
MESSAGE_FIELDS = (
    *("role", "content", "human", "assistant", "reasoning_content", "tool_calls", "tool_call_id", "name"),
    *("train", "weight"),
)


def read_messages(turns: Any, field: str) -> list[Message]:
    """Read the messages in `turns`, the value of column `field`: a list, or a list as JSON text.

    Each message has `role` (system, user, assistant, tool) and `content` (text). If the row has them, it also has
    `reasoning_content` (copied to `thinking`: no template reads both), `tool_calls`, `tool_call_id` and `name`. It has
    `train` only if it is False (the turn is context); `weight`, a factor of the loss, only if it is not 0 or 1. Empty
    system prompts are dropped.

    Raises:
        DataError: not a list of messages, an unknown role, a value that is missing or not text, an empty answer, a
            broken tool call or weight, or an image.
    """
    turns = read_json(turns, field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field}: found {show_value(turns)}; needs a list of messages that is not empty", NOT_MESSAGES)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(
                f"{field}[{index}]: found {show_value(turn)}; needs an object with role and content", NOT_MESSAGES
            )
        try:
            if "human" in turn and "assistant" in turn and not (turn.get("role") or turn.get("from")):
                messages += question_and_answer(turn, "human", "assistant")
                continue
            message = _read_message(turn)
        except DataError as error:
            raise DataError(f"{field}[{index}].{error}", error.reason) from None
        if not _append_calls(messages, message, turn) and (message["role"] != "system" or message["content"]):
            messages.append(message)
    return messages


def check_order(messages: list[Message]) -> None:
    """Check that a user opens the conversation, that turns alternate and that there is an assistant turn.

    System messages may stand anywhere; tool turns must follow an assistant or tool turn.

    Raises:
        DataError: the order is wrong.
    """
    previous = ""  # role of the last turn that is not a system message
    for message in messages:
        role = message["role"]
        if role == "system":
            continue
        if role == "tool":
            if previous not in ("assistant", "tool"):
                place = f"after a {previous} turn" if previous else "opens the conversation"
                raise DataError(f"order: a tool turn {place}; it must follow an assistant turn", TOOL_OUT_OF_PLACE)
        elif role == previous:
            reason = TWO_USER_TURNS if role == "user" else TWO_ASSISTANT_TURNS
            raise DataError(f"order: {reason}; turns must alternate", reason)
        elif not previous and role == "assistant":
            problem = "an assistant turn opens the conversation; a user turn must be first"
            raise DataError(f"order: {problem}", ASSISTANT_FIRST)
        previous = role
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("order: no assistant turn to train on", NO_ANSWER)


def question_and_answer(fields: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    """Return a user message and an assistant message from two fields; raises as `read_text` and `read_answer` do."""
    return [{"role": "user", "content": read_text(fields, question)}, read_answer(fields, answer)]


def read_answer(fields: Mapping[str, Any], field: str) -> Message:
    """Return an assistant message from one field.

    Raises:
        DataError: the field is missing, empty or not text.
    """
    answer = read_text(fields, field)
    if not answer or answer.isspace():
        raise DataError(f"{field}: the answer is empty; needs text ({show_keys(fields)})", EMPTY_ANSWER)
    return {"role": "assistant", "content": answer}


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the column `tools` as a list of JSON schemas in OpenAI's format, or None if it is empty.

    The column holds a list of schemas, or such a list as JSON text.

    Raises:
        DataError: the column holds something else.
    """
    tools = read_json(tools, "tools") or []
    if not isinstance(tools, list):
        raise DataError(f"tools: found {show_value(tools)}; needs a list of JSON schemas", BROKEN_TOOLS)
    schemas = [read_json(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    for index, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise DataError(f"tools[{index}]: found {show_value(schema)}; needs a JSON schema", BROKEN_TOOLS)
    return [schema if "function" in schema else {"type": "function", "function": schema} for schema in schemas] or None


def _read_message(turn: dict[str, Any]) -> Message:
    # The role, under either of its two field names.
    role_name, role_field = turn.get("role"), "role"
    if role_name is None and turn.get("from") is not None:
        role_name, role_field = turn["from"], "from"
    role = ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        problem = f"unknown role {show_value(role_name)}" if role_field in turn else f"missing ({show_keys(turn)})"
        raise DataError(f"{role_field}: {problem}; known are {', '.join(ROLES)}", UNKNOWN_ROLE)
    # The content: text, a tool call in JSON, or a list of typed parts.
    content, content_field = turn.get("content"), "content"
    if content is None and "value" in turn:
        content, content_field = turn["value"], "value"
    message: Message = {"role": role, "content": content}
    if role_name in _CALL_ROLES and content is not None:
        message = {
            "role": role,
            "content": "",
            "tool_calls": _read_tool_calls(read_json(content, content_field), content_field),
        }
    elif isinstance(content, list):
        message.update(_join_parts(content, content_field))
    if len(turn) > 2 or content is None:
        _add_fields(message, turn)
    if not isinstance(message["content"], str):
        # A message may lack its text only if it calls tools.
        message["content"] = "" if content is None and "tool_calls" in message else read_text(turn, content_field)
    # Only assistants may call tools, and they must write something.
    if role == "assistant":
        text = message["content"]
        if (not text or text.isspace()) and not message.get("tool_calls"):
            raise DataError(f"{content_field}: the assistant's answer is empty; needs text to train on", EMPTY_ANSWER)
    elif "tool_calls" in message:
        raise DataError(f"tool_calls: found in a {role} turn; only an assistant turn can call tools", BROKEN_TOOLS)
    return message


def _join_parts(parts: list[Any], where: str) -> Message:
    """Return the texts, reasoning and tool calls of a list of typed parts, in the fields that templates read."""
    texts, thoughts, calls = [], [], []
    for index, part in enumerate(parts):
        if not isinstance(part, dict):
            raise DataError(f"{where}[{index}]: found {show_value(part)}; needs an object with type and text", NOT_TEXT)
        kind = part.get("type")
        try:
            if kind == "text":
                texts.append(_part_text(part, "text"))
            elif kind in ("reasoning", "thinking"):
                thoughts.append(_part_text(part, kind))
            elif kind == "tool_call":
                calls.append(_read_tool_call(part.get("value"), "value"))
            elif isinstance(kind, str) and kind in _MEDIA_PARTS:
                raise DataError(f"type: found {show_value(kind)}, but {TEXT_ONLY}", IMAGES)
            else:
                raise DataError(f"type: found {show_value(kind)}; allowed: text, reasoning, tool_call", NOT_TEXT)
        except DataError as error:
            raise DataError(f"{where}[{index}].{error}", error.reason) from None
    message: Message = {"content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = message["thinking"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _part_text(part: dict[str, Any], kind: str) -> str:
    """Return the text of a part. OpenAI's field has the name of the part's type, others use `text` or `value`."""
    return read_text(part, next((field for field in (kind, "text", "value") if part.get(field) is not None), kind))


def _add_fields(message: Message, turn: dict[str, Any]) -> None:
    """Add the optional fields that `turn` has: tool calls, reasoning, ids, names, weight."""
    calls = read_json(turn.get("tool_calls"), "tool_calls") or turn.get("function_call")
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", ()), *_read_tool_calls(calls, "tool_calls")]
    # The reasoning may stand under several names, but must be the same text under each.
    thoughts = {read_text(turn, field) for field in _REASONING_FIELDS if turn.get(field) not in _EMPTY}
    if "thinking" in message:
        thoughts.add(message["thinking"])
    if len(thoughts) > 1:
        problem = "has several different reasoning texts; only one is allowed"
        raise DataError(f"reasoning_content: {problem} ({show_keys(turn)})", TWO_REASONINGS)
    if thoughts:
        message["reasoning_content"] = message["thinking"] = thoughts.pop()
    for field in ("tool_call_id", "name"):
        if turn.get(field) not in _EMPTY:
            message[field] = read_text(turn, field)
    weight = _read_weight(turn)
    if weight == 0:
        message["train"] = False
    elif weight != 1:
        message["weight"] = weight


def _read_weight(turn: dict[str, Any]) -> float:
    """Return the weight of a message's loss, from `train`, `weight` or `loss_weight`; the default is 1."""
    train = turn.get("train")
    if train not in (None, False, True):
        raise DataError(f"train: found {show_value(train)}; allowed: true and false (context only)", BAD_WEIGHT)
    field = "weight" if turn.get("weight") is not None else "loss_weight"
    weight = turn.get(field)
    if weight is None:
        return 1.0 if train in (None, True) else 0.0
    # The last comparison refuses NaN, infinity and whole numbers too large for a float.
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
        raise DataError(
            f"{field}: found {show_value(weight)}; needs a number from 0 (context only) upwards", BAD_WEIGHT
        )
    return float(weight) if train in (None, True) else 0.0


def _append_calls(messages: list[Message], message: Message, turn: dict[str, Any]) -> bool:
    """If `turn` is a tool call right after an assistant turn, add its calls to that turn; return whether it was.

    Some data sets write each call as a turn of its own; templates want one message.
    """
    role_name = turn.get("role") or turn.get("from")
    if role_name not in _CALL_ROLES or not messages or messages[-1]["role"] != "assistant":
        return False
    # Turns with a weight or other fields of their own stay apart.
    if len(message) > 3 or not messages[-1].keys().isdisjoint(("train", "weight")):
        return False
    messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
    return True


def _read_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    return [_read_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _read_tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call in OpenAI's format, but with the arguments as an object: templates print it or loop over it."""
    call = read_json(call, where)
    function = call.get("function") or call if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if arguments in (None, "", []):
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
        raise DataError(
            f"{where}: found the tool call {show_value(call)}; needs an object with name and arguments (an object)",
            BROKEN_TOOLS,
        )
    # Arguments that are not a JSON object stay text, and the template writes them as they are.
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **result} if isinstance(call.get("id"), str) and call["id"] else result


def read_text(fields: Mapping[str, Any], field: str) -> str:
    """Return the text of a field.

    Raises:
        DataError: the field is missing or not text.
    """
    value = fields.get(field)
    if isinstance(value, str):
        return value
    problem = f"found {show_value(value)}" if field in fields else "missing"
    raise DataError(
        f"{field}: {problem}; needs text ({show_keys(fields)})", MISSING_VALUE if value is None else NOT_TEXT
    )


def read_json(value: Any, where: str) -> Any:
    """Parse `value` if it is text ("" gives None); return anything else unchanged.

    Raises:
        DataError: the text is not JSON; `where` names the field.
    """
    if not isinstance(value, str):
        return value
    if not value:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found {show_value(value)}, which is not JSON ({error})", NOT_JSON) from None


def show_value(value: Any) -> str:
    """Format `value` for an error message: JSON in one line of at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    except (TypeError, ValueError, RecursionError):  # a key, number or nesting that JSON cannot write
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def show_keys(fields: Mapping[str, Any]) -> str:
    """Format the keys of a row or message for an error message: one line of at most 200 characters of names."""
    names = " ".join(", ".join(map(str, fields)).split())
    return "its keys: " + (names if len(names) <= 200 else names[:197] + "...")
