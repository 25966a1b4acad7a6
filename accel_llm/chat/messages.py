"""Messages as data sets write them -> as chat templates read them: role, text, reasoning, tool calls, weight.

What is wrong is told as DataError, in one sentence without file or row number, and with one of the reasons below.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from accel_llm.errors import DataError

Message = dict[str, Any]

# Why a row is refused, in words that the ledger counts by.
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
    "developer": "system",  # OpenAI's later word for it; most templates know the older one only
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
    "function": "tool",  # OpenAI's first word for a result
    "tool_response": "tool",
    "function_response": "tool",
}
# Roles whose text is a call, as JSON.
_CALLERS = frozenset({"function_call", "tool_call"})
# Qwen3 and most others read the first, gpt-oss the second; the third is what some servers answer with.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NONE = (None, "")  # how loaders fill what a message has not
_MEDIA_PARTS = frozenset(
    {"image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"}
)
# Fields of one message that `columns` can rename.
MESSAGE_FIELDS = (
    *("role", "content", "human", "assistant", "reasoning_content", "tool_calls", "tool_call_id", "name"),
    *("train", "weight"),
)


def read_messages(turns: Any, field: str) -> list[Message]:
    """The messages that `turns` (the value of column `field`: a list, or JSON text of one) says.

    Each has `role` (system, user, assistant, tool) and a text `content`, and where they are given `reasoning_content`
    (the same again as `thinking`: no template reads both), `tool_calls`, `tool_call_id`, `name`, `train` (False: a turn
    that is context only) and `weight` (of its loss, neither 0 nor 1). An empty system prompt is the same as none.

    Raises DataError: no list of messages, unknown role, a value that is missing or no text, an empty answer, a broken
    tool call or weight, images.
    """
    turns = read_json(turns, field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field}: found {show_value(turns)}, needs a list of messages that is not empty", NOT_MESSAGES)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(
                f"{field}[{index}]: found {show_value(turn)}, needs an object with role and content", NOT_MESSAGES
            )
        try:
            if "human" in turn and "assistant" in turn and not (turn.get("role") or turn.get("from")):
                messages += question_and_answer(turn, "human", "assistant")
                continue
            message = _message(turn)
        except DataError as error:
            raise DataError(f"{field}[{index}].{error}", error.reason) from None
        if not _joins_calls(messages, message, turn) and (message["role"] != "system" or message["content"]):
            messages.append(message)
    return messages


def check_order(messages: list[Message]) -> None:
    """Raises DataError unless a user opens the conversation, turns alternate and an assistant speaks at all."""
    before = ""
    for message in messages:
        role = message["role"]
        if role == "system":
            continue
        if role == "tool":
            if before not in ("assistant", "tool"):
                place = f"after a {before} turn" if before else "opens the conversation"
                raise DataError(f"order: a tool turn {place}, it must follow an assistant turn", TOOL_OUT_OF_PLACE)
        elif role == before:
            reason = TWO_USER_TURNS if role == "user" else TWO_ASSISTANT_TURNS
            raise DataError(f"order: {reason}, turns must alternate", reason)
        elif not before and role == "assistant":
            raise DataError(
                "order: an assistant turn opens the conversation, a user turn must be first", ASSISTANT_FIRST
            )
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("order: no assistant turn to train on", NO_ANSWER)


def question_and_answer(fields: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    """Two messages from two fields; DataError if one is missing or no text, or the answer is empty."""
    return [{"role": "user", "content": read_text(fields, question)}, read_answer(fields, answer)]


def read_answer(fields: Mapping[str, Any], field: str) -> Message:
    """An assistant's message from one field; DataError if it is missing, empty or no text."""
    answer = read_text(fields, field)
    if not answer or answer.isspace():
        raise DataError(f"{field}: the answer is empty, needs text ({show_keys(fields)})", EMPTY_ANSWER)
    return {"role": "assistant", "content": answer}


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The `tools` column (a list of schemas, or JSON text of one) in the shape of OpenAI; None if it holds none.

    Raises DataError: anything else.
    """
    tools = read_json(tools, "tools") or []
    if not isinstance(tools, list):
        raise DataError(f"tools: found {show_value(tools)}, needs a list of JSON schemas", BROKEN_TOOLS)
    schemas = [read_json(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    for index, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise DataError(f"tools[{index}]: found {show_value(schema)}, needs a JSON schema", BROKEN_TOOLS)
    return [schema if "function" in schema else {"type": "function", "function": schema} for schema in schemas] or None


def _message(turn: dict[str, Any]) -> Message:
    spoken, role_field = turn.get("role"), "role"
    if spoken is None and turn.get("from") is not None:
        spoken, role_field = turn["from"], "from"
    role = ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        found = f"unknown role {show_value(spoken)}" if role_field in turn else f"missing ({show_keys(turn)})"
        raise DataError(f"{role_field}: {found}, known are {', '.join(ROLES)}", UNKNOWN_ROLE)
    content, content_field = turn.get("content"), "content"
    if content is None and "value" in turn:
        content, content_field = turn["value"], "value"
    message: Message = {"role": role, "content": content}
    if spoken in _CALLERS and content is not None:
        message = {
            "role": role,
            "content": "",
            "tool_calls": _tool_calls(read_json(content, content_field), content_field),
        }
    elif isinstance(content, list):
        message.update(_joined_parts(content, content_field))
    if len(turn) > 2 or content is None:
        _add_fields(message, turn)
    if not isinstance(message["content"], str):
        # Nothing beside calls is the one case in which a message may lack its text.
        message["content"] = "" if content is None and "tool_calls" in message else read_text(turn, content_field)
    if role == "assistant":
        text = message["content"]
        if (not text or text.isspace()) and not message.get("tool_calls"):
            raise DataError(f"{content_field}: the assistant's answer is empty, needs text to train on", EMPTY_ANSWER)
    elif "tool_calls" in message:
        raise DataError(f"tool_calls: found in a {role} turn, only an assistant turn can call tools", BROKEN_TOOLS)
    return message


def _joined_parts(parts: list[Any], where: str) -> Message:
    """Typed content parts as one message: texts joined, reasoning and tool calls in the fields templates read."""
    texts, thoughts, calls = [], [], []
    for index, part in enumerate(parts):
        if not isinstance(part, dict):
            raise DataError(f"{where}[{index}]: found {show_value(part)}, needs an object with type and text", NOT_TEXT)
        kind = part.get("type")
        try:
            if kind == "text":
                texts.append(_text_of_part(part, "text"))
            elif kind in ("reasoning", "thinking"):
                thoughts.append(_text_of_part(part, kind))
            elif kind == "tool_call":
                calls.append(_tool_call(part.get("value"), "value"))
            elif isinstance(kind, str) and kind in _MEDIA_PARTS:
                raise DataError(f"type: found {show_value(kind)}, but {TEXT_ONLY}", IMAGES)
            else:
                raise DataError(f"type: found {show_value(kind)}, allowed: text, reasoning, tool_call", NOT_TEXT)
        except DataError as error:
            raise DataError(f"{where}[{index}].{error}", error.reason) from None
    message: Message = {"content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = message["thinking"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text_of_part(part: dict[str, Any], kind: str) -> str:
    """OpenAI names the field by the part's type, others `text` or `value`."""
    return read_text(part, next((field for field in (kind, "text", "value") if part.get(field) is not None), kind))


def _add_fields(message: Message, turn: dict[str, Any]) -> None:
    """What a message may have beside role and content, where it is given."""
    calls = read_json(turn.get("tool_calls"), "tool_calls") or turn.get("function_call")
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", ()), *_tool_calls(calls, "tool_calls")]
    thoughts = {read_text(turn, field) for field in _REASONING if turn.get(field) not in _NONE}
    if "thinking" in message:
        thoughts.add(message["thinking"])
    if len(thoughts) > 1:
        raise DataError(
            f"reasoning_content: found several reasonings ({show_keys(turn)}), allowed: one", TWO_REASONINGS
        )
    if thoughts:
        message["reasoning_content"] = message["thinking"] = thoughts.pop()
    for field in ("tool_call_id", "name"):
        if turn.get(field) not in _NONE:
            message[field] = read_text(turn, field)
    weight = _weight(turn)
    if weight == 0:
        message["train"] = False
    elif weight != 1:
        message["weight"] = weight


def _weight(turn: dict[str, Any]) -> float:
    """How much the loss of a message counts: 1 unless `train`, `weight` or `loss_weight` say otherwise."""
    train = turn.get("train")
    if train not in (None, False, True):
        raise DataError(f"train: found {show_value(train)}, allowed: true and false (context only)", BAD_WEIGHT)
    field = "weight" if turn.get("weight") is not None else "loss_weight"
    weight = turn.get(field)
    if weight is None:
        return 1.0 if train in (None, True) else 0.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
        raise DataError(
            f"{field}: found {show_value(weight)}, needs a number from 0 (context only) upwards", BAD_WEIGHT
        )
    return float(weight) if train in (None, True) else 0.0


def _joins_calls(messages: list[Message], message: Message, turn: dict[str, Any]) -> bool:
    """Where calls are turns of their own, those that follow an assistant turn belong to it: it becomes one message."""
    spoken = turn.get("role") or turn.get("from")
    if spoken not in _CALLERS or not messages or messages[-1]["role"] != "assistant":
        return False
    if len(message) > 3 or not messages[-1].keys().isdisjoint(("train", "weight")):
        return False
    messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
    return True


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    return [_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """In the shape of OpenAI, but with the arguments as an object: that is what templates print or iterate."""
    call = read_json(call, where)
    function = call.get("function") or call if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if arguments in (None, "", []):
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
        raise DataError(
            f"{where}: found the tool call {show_value(call)}, needs an object with name and arguments (an object)",
            BROKEN_TOOLS,
        )
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) and call["id"] else made


def read_text(fields: Mapping[str, Any], field: str) -> str:
    """The text of a field; DataError if it is missing or anything but text."""
    value = fields.get(field)
    if isinstance(value, str):
        return value
    found = f"found {show_value(value)}" if field in fields else "missing"
    raise DataError(f"{field}: {found}, needs text ({show_keys(fields)})", MISSING_VALUE if value is None else NOT_TEXT)


def read_json(value: Any, where: str) -> Any:
    """What `value` says, if it is JSON text (the empty text says nothing), else itself; DataError if it is no JSON."""
    if not isinstance(value, str):
        return value
    if not value:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found {show_value(value)}, which is not JSON ({error})", NOT_JSON) from None


def show_value(value: Any) -> str:
    """`value` in an error: as JSON, in one line of at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not, numbers or nesting beyond all bounds
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def show_keys(fields: Mapping[str, Any]) -> str:
    """What a row or message has, for an error about what it has not: in one line of a bounded length."""
    names = " ".join(", ".join(map(str, fields)).split())
    return "its keys: " + (names if len(names) <= 200 else names[:197] + "...")
