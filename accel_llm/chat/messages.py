"""Converts messages from the spellings of data sets to the one that chat templates read.

A bad message raises DataError: one sentence without file and row number, and a reason from `accel_llm.chat.values`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from accel_llm.chat.parts import join_parts, join_texts
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.roles import CALL_ROLES, ROLES, read_role
from accel_llm.chat.tool_calls import read_tool_calls
from accel_llm.chat.values import (
    ASSISTANT_FIRST,
    BAD_WEIGHT,
    BROKEN_TOOLS,
    EMPTY_ANSWER,
    NO_ANSWER,
    NOT_MESSAGES,
    TOOL_OUT_OF_PLACE,
    TWO_ASSISTANT_TURNS,
    TWO_REASONINGS,
    TWO_USER_TURNS,
    Findings,
    is_blank,
    is_nothing,
    read_json,
    read_text,
    show_keys,
    show_value,
)
from accel_llm.chat.weights import WEIGHT_KEYS, Segments, read_train_detail, read_weight, set_weight
from accel_llm.errors import DataError

Message = dict[str, Any]

READS_NOTHING = TemplateReads()

# Templates of Qwen3 and most others read the first, gpt-oss the second; some servers return the third.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_XTUNER = ("input", "output")
_PAIRS = (("human", "assistant"), _XTUNER)  # keys of a message that is a question with its answer
_EMPTY = (None, "")  # data loaders fill absent fields with these
# Keys of messages that this module reads, or that are another spelling of one; templates get the result.
_READ_KEYS = WEIGHT_KEYS | {"role", "from", "content", "value", "human", "assistant", *REASONING_FIELDS}
_READ_KEYS |= {"tool_calls", "function_call", "tool_call_id", "name"}
# A system message of no text is left out, unless the template reads other keys of it.
_SYSTEM_KEYS = {"role", "content", "name", "tool_call_id", "train", "weight"}
# Fields of a message that the option `columns` can rename.
MESSAGE_FIELDS = (
    *("role", "content", "human", "assistant", "reasoning_content", "tool_calls", "tool_call_id", "name"),
    *("train", "weight"),
)


def read_messages(
    turns: Any,
    field: str,
    reads: TemplateReads = READS_NOTHING,
    roles: Mapping[str, str] = ROLES,
    findings: Findings | None = None,
) -> list[Message]:
    """Read the messages in `turns`, the value of column `field`: a list, or a list as JSON text.

    Each message has `role` (system, user, assistant, tool) and `content` (text). If the row has them, it also has
    `reasoning_content` (copied to `thinking`: no template reads both), `tool_calls`, `tool_call_id` and `name`, and
    the further keys that `reads` names. It has `train` only if it is False (the turn is context); `weight`, a factor
    of the loss, only if it is not 0 or 1; `segments`, pairs (characters, weight) that cover its content, only if their
    weights differ. Empty system prompts are dropped. `roles` maps names of roles to ours; `findings` receives what is
    no message: tools of system messages, and keys that nothing uses.

    Raises:
        DataError: not a list of messages, an unknown role, a value that is missing or not text, an empty answer, a
            broken tool call or weight, or an image.
    """
    findings = findings or Findings()
    as_text, earlier_calls = isinstance(turns, str), len(findings.calls)
    turns = read_json(turns, field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field}: found {show_value(turns)}; needs a list of messages that is not empty", NOT_MESSAGES)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        # Most messages are a role and a text and nothing else. The meaning of an empty text depends on the role.
        if type(turn) is dict and len(turn) == 2:
            name, content = turn.get("role"), turn.get("content")
            if name is None:
                name, content = turn.get("from"), turn.get("value")
            role = roles.get(name) if type(name) is str and type(content) is str else None
            if role and content and not content.isspace() and name not in CALL_ROLES:
                messages.append({"role": role, "content": content})
                continue
        if not isinstance(turn, dict):
            raise DataError(
                f"{field}[{index}]: found {show_value(turn)}; needs an object with role and content", NOT_MESSAGES
            )
        try:
            _add_message(messages, turn, _Reading(reads, roles, findings, f"{field}[{index}]"))
        except DataError as error:
            raise DataError(f"{field}[{index}].{error}", error.reason) from None
    if as_text:
        del findings.calls[earlier_calls:]  # Arrow adds nothing inside a text
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


class _Reading(NamedTuple):
    """What is the same for all steps of reading one message; `place` names the message."""

    reads: TemplateReads
    roles: Mapping[str, str]
    findings: Findings
    place: str


def _add_message(messages: list[Message], turn: dict[str, Any], reading: _Reading) -> None:
    """Read a turn and add its messages to `messages`: one, or two if the turn is a pair of question and answer."""
    if not (turn.get("role") or turn.get("from")):
        for pair in _PAIRS:
            if pair[0] in turn and pair[1] in turn:
                _add_pair(messages, turn, pair, reading)
                return
    message = _read_message(turn, reading)
    is_empty = message["role"] == "system" and not message["content"] and message.keys() <= _SYSTEM_KEYS
    if not is_empty and not _append_calls(messages, message, turn):
        messages.append(message)


def _add_pair(messages: list[Message], turn: dict[str, Any], pair: tuple[str, str], reading: _Reading) -> None:
    """Add a question and its answer. Beside xtuner's `input` and `output` there may be a system prompt."""
    if "system" in turn and pair == _XTUNER:
        turn = dict(turn)
        if (system := turn.pop("system")) not in _EMPTY:
            messages.append({"role": "system", "content": read_text({"system": system}, "system")})
    messages += question_and_answer(turn, *pair)
    if len(turn) > 2:
        _add_fields(messages[-1], turn, pair, None, reading)


def _read_message(turn: dict[str, Any], reading: _Reading) -> Message:
    role_name, role_field, role = read_role(turn, reading.roles)
    # The content: text, a tool call in JSON, or a list of typed parts.
    content_field = "content"
    if turn.get("content") is None or (turn["content"] == "" and turn.get("value") not in _EMPTY):
        content_field = "value" if "value" in turn else "content"
    content = turn.get(content_field)
    message: Message = {"role": role, "content": content}
    segments: Segments | None = None
    if role_name.lower() in CALL_ROLES and content is not None:
        calls = read_tool_calls(content, content_field, reading.findings)
        message = {"role": role, "content": "", "tool_calls": calls}
    elif isinstance(content, list):
        parts, segments = join_parts(content, content_field, role, reading.findings)
        message.update(parts)
    if len(turn) > 2 or content is None or segments:
        _add_fields(message, turn, (role_field, content_field), segments, reading)
    if not isinstance(message["content"], str):
        # A message may lack its text only if it calls tools, or if it is there for its tools.
        may_lack = content is None and ("tool_calls" in message or (role == "system" and _has_tools(turn)))
        message["content"] = "" if may_lack else read_text(turn, content_field)
    _check_role(message, content_field)
    return message


def _check_role(message: Message, content_field: str) -> None:
    """Check that only assistants call tools, and that they write something."""
    if message["role"] == "assistant":
        text = message["content"]
        if (not text or text.isspace()) and not message.get("tool_calls"):
            raise DataError(f"{content_field}: the assistant's answer is empty; needs text to train on", EMPTY_ANSWER)
    elif "tool_calls" in message:
        problem = f"found in a {message['role']} turn; only an assistant turn can call tools"
        raise DataError(f"tool_calls: {problem}", BROKEN_TOOLS)


def _add_fields(
    message: Message, turn: dict[str, Any], used: tuple[str, str], segments: Segments | None, reading: _Reading
) -> None:
    """Add the optional fields that `turn` has: tool calls, reasoning, ids, names, weights, and what templates read.

    `used` are the keys that the role and the content, or question and answer, came from.
    """
    findings = reading.findings
    calls = _read_calls(turn, findings)
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", ()), *calls]
    if message["role"] == "assistant":
        _add_reasoning(message, turn, findings)
    for field in ("tool_call_id", "name"):
        if turn.get(field) not in _EMPTY:
            message[field] = read_text(turn, field)
    # Weights: of the whole message, and of its segments.
    role = message["role"]
    if not WEIGHT_KEYS.isdisjoint(turn) and not is_nothing(turn.get("train_detail")):
        if isinstance(turn.get(used[1]), list):
            raise DataError("train_detail: found beside a list of parts; needs a content of one text", BAD_WEIGHT)
        content = message["content"] if isinstance(message["content"], str) else ""
        segments = read_train_detail(turn["train_detail"], content, role, findings)
    set_weight(message, read_weight(turn, role), segments)
    _add_other_keys(message, turn, used, reading)


def _read_calls(turn: dict[str, Any], findings: Findings) -> list[dict[str, Any]]:
    """Return the calls in `tool_calls`, or else in the older `function_call`."""
    calls, older = turn.get("tool_calls"), turn.get("function_call")
    result = [] if is_blank(calls) else read_tool_calls(calls, "tool_calls", findings)
    if is_blank(older):
        return result
    if not result:
        return read_tool_calls(older, "function_call", findings)
    functions = [call["function"] for call in read_tool_calls(older, "function_call", Findings())]
    if any(function not in [call["function"] for call in result] for function in functions):
        findings.leave("function_call", "messages", older)
    return result


def _add_reasoning(message: Message, turn: dict[str, Any], findings: Findings) -> None:
    """Add the reasoning, which may stand under several names, but must be the same text under each."""
    thoughts = {message["thinking"]} if "thinking" in message else set()
    for field in REASONING_FIELDS:
        value = turn.get(field)
        if isinstance(value, list):
            value = join_texts(value, field, findings)
        if value not in _EMPTY:
            thoughts.add(value if isinstance(value, str) else read_text(turn, field))
    if len(thoughts) > 1:
        problem = "has several different reasoning texts; only one is allowed"
        raise DataError(f"reasoning_content: {problem} ({show_keys(turn)})", TWO_REASONINGS)
    if thoughts:
        message["reasoning_content"] = message["thinking"] = thoughts.pop()


def _add_other_keys(message: Message, turn: dict[str, Any], used: tuple[str, str], reading: _Reading) -> None:
    """Add the keys that the template reads beside those above, and note the keys that nothing uses."""
    reads, findings = reading.reads, reading.findings
    for key, value in turn.items():
        if key in used or value is None:
            continue
        if key not in _READ_KEYS or (key in REASONING_FIELDS and message["role"] != "assistant"):
            if key in reads.message_keys and key not in REASONING_FIELDS:
                message[key] = value
            elif key in ("tools", "functions") and message["role"] == "system":
                findings.tools.append((f"{reading.place}.{key}", value))
            elif reads.whole_messages:
                message[key] = value
            else:
                findings.leave(key, "messages", value)
        elif key in ("name", "tool_call_id"):
            if key not in reads.message_keys and not reads.whole_messages:
                findings.leave(key, "messages", value)
        elif key in ("role", "from", "content", "value", "human", "assistant"):
            _leave_second_spelling(message, key, value, reading)


def _leave_second_spelling(message: Message, key: str, value: Any, reading: _Reading) -> None:
    """Note a second role or content that differs from the one that is used."""
    if key in ("role", "from"):
        same = isinstance(value, str) and reading.roles.get(value) == message["role"]
    else:
        same = value == message["content"]
    if not same:
        reading.findings.leave(key, "messages", value)


def _has_tools(turn: dict[str, Any]) -> bool:
    return not (is_blank(turn.get("tools")) and is_blank(turn.get("functions")))


def _append_calls(messages: list[Message], message: Message, turn: dict[str, Any]) -> bool:
    """If `turn` is a tool call right after an assistant turn, add its calls to that turn; return whether it was.

    Some data sets write each call as a turn of its own; templates want one message.
    """
    role_name = turn.get("role") or turn.get("from")
    if str(role_name).lower() not in CALL_ROLES or not messages or messages[-1]["role"] != "assistant":
        return False
    # Turns with another weight or other fields of their own stay apart.
    previous = messages[-1]
    if "segments" in previous or not message.keys() <= {"role", "content", "tool_calls", "train", "weight"}:
        return False
    if any(message.get(field) != previous.get(field) for field in ("train", "weight")):
        return False
    previous["tool_calls"] = [*previous.get("tool_calls", ()), *message["tool_calls"]]
    return True
