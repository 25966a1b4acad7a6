"""A row of any known dataset shape -> one conversation: messages with the roles system, user, assistant and tool."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from accel_llm.errors import DataError

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Columns that hold one question and its answer, in the order in which they are looked for.
_PAIRS = (("instruction", "output"), ("query", "response"), ("question", "answer"))
_KNOWN_SHAPES = (
    "messages (a list of role/content), conversations (a list of from/value or role/content), "
    "conversation (a list of human/assistant), instruction/output (optional: input, system, history), "
    "query/response and question/answer (optional: system, history)"
)
# What chat templates and the mask read from a message beside its role and content.
_CARRIED = ("reasoning_content", "thinking", "tool_calls", "tool_call_id", "name", "train")


class Conversation(NamedTuple):
    """`skipped_turns`: leading assistant turns that were left out because no one had spoken before them (0 or 1)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    skipped_turns: int


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of `conversation_of`, for callers that need neither tools nor the count of skipped turns."""
    return conversation_of(row).messages


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """Recognises the shape of `row` on sight and returns its conversation.

    Every message has `role` (system, user, assistant, tool) and a text `content`; `reasoning_content`, `tool_calls`
    and `train` (False: a turn that is context only) are there where the row has them. An empty system prompt, input or
    history is the same as none. An assistant turn that opens the conversation is skipped and counted.

    Raises DataError, in one sentence without file or row number: unknown shape or role, a value that is not text, an
    empty answer, no answer at all, two user or two assistant turns in a row, a tool turn that answers no one.
    """
    listed = [field for field in ("messages", "conversations", "conversation") if field in row]
    # Loaders that give all rows the same columns fill those of other shapes with None.
    filled = [field for field in listed if row[field] is not None]
    if filled or (listed and not any(set(pair) <= set(row) for pair in _PAIRS)):
        messages = _listed_messages(row, (filled or listed)[0])
    else:
        messages = _paired_messages(row)
    system = _optional_text(row, "system")
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    skipped_turns = _skip_opening_answer(messages)
    _check_order(messages, row)
    return Conversation(messages, _tools(row), skipped_turns)


def _listed_messages(row: Mapping[str, Any], field: str) -> list[Message]:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field}: found {_shown(turns)}, needs a list of messages that is not empty ({_keys(row)})")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: found {_shown(turn)}, needs an object with role and content ({_keys(row)})")
        if "human" in turn and "assistant" in turn:
            messages.append({"role": "user", "content": _text(turn, "human", where)})
            messages.append({"role": "assistant", "content": _answer(turn, "assistant", where)})
            continue
        message = _message(turn, where)
        if message["role"] != "system" or message["content"]:
            messages.append(message)
    return messages


def _message(turn: Mapping[str, Any], where: str) -> Message:
    role_field = "role" if "role" in turn else "from"
    content_field = "content" if "content" in turn else "value"
    spoken = turn.get(role_field)
    role = _ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise DataError(f"{where}.{role_field}: unknown role {_shown(spoken)}, known are {', '.join(_ROLES)}")
    message: Message = {"role": role, **{key: turn[key] for key in _CARRIED if turn.get(key) is not None}}
    if spoken == "function_call":
        calls = _json(turn.get(content_field), f"{where}.{content_field}")
        message["tool_calls"] = [_tool_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
        message["content"] = ""
    elif isinstance(turn.get(content_field), list):
        message.update(_joined_parts(turn[content_field], f"{where}.{content_field}"))
    elif turn.get(content_field) is None and message.get("tool_calls"):
        message["content"] = ""
    else:
        message["content"] = _text(turn, content_field, where)
    if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise DataError(f"{where}.{content_field}: the assistant's answer is empty, needs text to train on")
    if "loss_weight" in turn:
        message["train"] = _is_trained(turn["loss_weight"], where)
    return message


def _joined_parts(parts: list[Any], where: str) -> Message:
    """Typed content parts as one message: texts joined, reasoning and tool calls in the fields templates read."""
    texts, thoughts, calls = [], [], []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else part
        field = "text" if isinstance(part, Mapping) and "text" in part else "value"
        if kind == "text":
            texts.append(_text(part, field, f"{where}[{index}]"))
        elif kind == "reasoning":
            thoughts.append(_text(part, field, f"{where}[{index}]"))
        elif kind == "tool_call":
            calls.append(_tool_call(_json(part.get("value"), f"{where}[{index}].value"), where))
        else:
            raise DataError(
                f"{where}[{index}]: found a part of type {_shown(kind)}, allowed: text, reasoning, tool_call"
            )
    message: Message = {"content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _paired_messages(row: Mapping[str, Any]) -> list[Message]:
    pair = next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)
    if pair is None:
        raise DataError(f"unknown row shape: {_keys(row)}, known shapes are {_KNOWN_SHAPES}")
    question_field, answer_field = pair
    question = _text(row, question_field)
    extra = _optional_text(row, "input") if question_field == "instruction" else ""
    messages: list[Message] = []
    for index, turn in enumerate(row.get("history") or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(f"history[{index}]: found {_shown(turn)}, needs a pair [question, answer] ({_keys(row)})")
        spoken = {"question": turn[0], "answer": turn[1]}
        messages.append({"role": "user", "content": _text(spoken, "question", f"history[{index}]")})
        messages.append({"role": "assistant", "content": _answer(spoken, "answer", f"history[{index}]")})
    messages.append({"role": "user", "content": "\n".join(filter(None, (question, extra)))})
    messages.append({"role": "assistant", "content": _answer(row, answer_field)})
    return messages


def _skip_opening_answer(messages: list[Message]) -> int:
    """ShareGPT dumps cut long talks into parts, so a part may open with an answer whose question is elsewhere."""
    opening = next((index for index, message in enumerate(messages) if message["role"] != "system"), None)
    if opening is None or messages[opening]["role"] != "assistant":
        return 0
    del messages[opening]
    return 1


def _check_order(messages: list[Message], row: Mapping[str, Any]) -> None:
    before = "system"
    for message in messages:
        role = message["role"]
        if role in ("user", "assistant") and role == before:
            raise DataError(f"order: two {role} turns in a row, turns must alternate ({_keys(row)})")
        if role == "tool" and before not in ("assistant", "tool"):
            raise DataError(
                f"order: a tool turn after a {before} turn, it must follow an assistant turn ({_keys(row)})"
            )
        if role != "system":
            before = role
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"order: no assistant turn to train on after a user turn ({_keys(row)})")


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools: found {_shown(tools)}, needs a list of JSON schemas ({_keys(row)})")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or "name" not in call:
        raise DataError(f"{where}: found the tool call {_shown(call)}, needs an object with name and arguments")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _is_trained(weight: Any, where: str) -> bool:
    if weight not in (0, 1):
        raise DataError(f"{where}.loss_weight: found {_shown(weight)}, allowed: 0 (context only) and 1 (trained)")
    return bool(weight)


def _text(fields: Mapping[str, Any], field: str, where: str = "") -> str:
    value = fields.get(field)
    if not isinstance(value, str):
        found = f"found {_shown(value)}" if field in fields else "missing"
        raise DataError(f"{where + '.' if where else ''}{field}: {found}, needs text ({_keys(fields)})")
    return value


def _optional_text(row: Mapping[str, Any], field: str) -> str:
    return "" if row.get(field) is None else _text(row, field)


def _answer(fields: Mapping[str, Any], field: str, where: str = "") -> str:
    answer = _text(fields, field, where)
    if not answer.strip():
        raise DataError(f"{where + '.' if where else ''}{field}: the answer is empty, needs text ({_keys(fields)})")
    return answer


def _json(text: Any, where: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: found {_shown(text)}, which is not JSON ({error})") from None


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _keys(fields: Mapping[str, Any]) -> str:
    return f"its keys: {', '.join(map(str, fields))}"
