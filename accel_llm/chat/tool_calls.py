"""Reads the tool calls of a message, in the spellings of data sets, into OpenAI's format."""

import json
import re
from decimal import Decimal
from typing import Any

from accel_llm.chat.values import BROKEN_TOOLS, Findings, decode_object, is_blank, read_json, show_name, show_value
from accel_llm.errors import DataError

# Where a call has its arguments: OpenAI, Llama 3 and ToolACE, Anthropic.
_ARGUMENT_KEYS = ("arguments", "parameters", "input")
_ABOUT_CALL = frozenset({"id", "type", "index"})
ROUNDED = "a number in tool arguments has more digits than a 64-bit float keeps: it is rounded."
_MANY_DIGITS = re.compile(r"\d[\d.]{15}|\d[eE]-\d{3}")


def read_tool_calls(calls: Any, where: str, findings: Findings) -> list[dict[str, Any]]:
    """Return the calls in a list of calls or in one call, either perhaps as JSON text. Calls of nulls are left out.

    Raises:
        DataError: a call is broken; `where` names the field.
    """
    earlier = len(findings.calls)
    values = read_json(calls, where)
    values = values if isinstance(values, list) else [values]
    result = [read_tool_call(value, where, findings) for value in values if not _says_nothing(value)]
    if isinstance(calls, str):
        _note_digits(calls, findings)
        del findings.calls[earlier:]  # Arrow adds nothing inside a text
    return result


def read_tool_call(call: Any, where: str, findings: Findings) -> dict[str, Any]:
    """Return a call in OpenAI's format, but with the arguments as an object: templates print it or loop over it.

    Arguments that are no JSON object stay text, and the template writes them as they are.

    Raises:
        DataError: the call is broken; `where` names the field.
    """
    original, call = call, read_json(call, where)
    function = decode_object(call.get("function"), where) or call if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    key = _find_arguments(function) if isinstance(function, dict) else ""
    arguments = function.get(key) if isinstance(function, dict) else None
    if is_blank(arguments) and not isinstance(arguments, dict):
        arguments = {}
    if not isinstance(function, dict) or not isinstance(name, str) or not isinstance(arguments, (dict, str)):
        raise DataError(
            f"{where}: found the tool call {show_value(call)}; needs an object with name and arguments (an object)",
            BROKEN_TOOLS,
        )
    result = {"name": name, "arguments": decode_object(arguments, f"{where}: {key} of {show_name(name)}")}
    if isinstance(result["arguments"], dict):
        _note_digits(arguments, findings)
        _note_digits(original, findings)
    if isinstance(arguments, dict) and not isinstance(original, str):
        findings.calls.append(result)
    if len(call) > 2 or len(function) > 2:
        _leave_keys(call, function, key, findings)
    wrapped: dict[str, Any] = {"type": "function", "function": result}
    return {"id": call["id"], **wrapped} if isinstance(call.get("id"), str) and call["id"] else wrapped


def _note_digits(text: Any, findings: Findings) -> None:
    """Note that a JSON text, encoded once or more, has a number that a float does not keep exactly."""
    numbers: list[str] = []
    while isinstance(text, str) and _MANY_DIGITS.search(text):
        try:
            text = json.loads(text, parse_float=numbers.append)
        except (ValueError, RecursionError):
            return
    if any(Decimal(number) != Decimal(repr(float(number))) for number in numbers):
        findings.remark(ROUNDED)


def _find_arguments(function: dict[str, Any]) -> str:
    """Return the key that holds the arguments: the first with a value, or else with an object."""
    if function.keys().isdisjoint(_ARGUMENT_KEYS[1:]):
        return _ARGUMENT_KEYS[0]
    filled = (key for key in _ARGUMENT_KEYS if not is_blank(function.get(key)))
    objects = (key for key in _ARGUMENT_KEYS if isinstance(function.get(key), dict))
    return next(filled, None) or next(objects, _ARGUMENT_KEYS[0])


def _says_nothing(call: Any) -> bool:
    """Tell whether a call has neither a name nor arguments: Arrow fills in calls that a message does not have."""
    if not isinstance(call, dict):
        return is_blank(call)
    if call.get("name"):
        return False
    fields = call.get("function") or {key: value for key, value in call.items() if key not in _ABOUT_CALL}
    return isinstance(fields, dict) and bool(fields) and is_blank(fields)


def _leave_keys(call: dict[str, Any], function: dict[str, Any], used: str, findings: Findings) -> None:
    """Note the keys of a call that nothing uses: unknown ones, a second name or arguments, an id that is no text."""
    taken = (function["name"], function.get(used))
    for fields in (call,) if function is call else (call, function):
        for key, value in fields.items():
            is_used = key in ("name", used) if fields is function else key == "function"
            is_known = key in ("type", "index") or (key == "id" and isinstance(value, str))
            if not (is_used or is_known or value in taken):
                findings.leave(key, "tool calls", value)
