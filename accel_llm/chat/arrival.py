"""Checks that what a conversation says arrives in the text that the template makes of it."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from accel_llm.chat.guard import unescape_marks
from accel_llm.chat.messages import Message
from accel_llm.chat.thoughts import split_thought

# What a template may leave out; the ledger counts rows by these.
TOOL_NAMES = "names of tools"
TOOL_DESCRIPTIONS = "descriptions of tools"
TOOL_RESULTS = "tool results"
CALL_NAMES = "names of tool calls"
CALL_ARGUMENTS = "arguments of tool calls"
SHORT = 8  # a name or argument of at most so many characters must stand as a word of its own
_PROBE = "qx{}z"  # words that no template writes


def left_out(messages: list[Message], tools: list[Any] | None, text: str) -> set[str]:
    """Return what of a conversation is not in `text`, its render: names as above, or `text of user messages`.

    Reasoning is not looked for: templates drop it from history on purpose. A text may stand as it is, or as JSON or
    Python's repr write it; how many spaces or line ends stand together does not count.
    """
    missing: set[str] = set()
    collapsed = ""
    systems = Counter(message["content"].strip() for message in messages if message["role"] == "system")
    for content, times in systems.items():
        if content and times > 1 and text.count(content) < times:
            missing.add("text of system messages")
    for kind, value in _said(messages, tools):
        as_word = kind in (CALL_NAMES, CALL_ARGUMENTS, TOOL_NAMES)
        if kind in missing or _arrives(value, text, as_word):
            continue
        # Falcon's template makes one line end of two.
        collapsed = collapsed or " ".join(text.split())
        if not isinstance(value, str) or not _arrives(" ".join(value.split()), collapsed, as_word):
            missing.add(kind)
    return missing


def said_kinds(messages: list[Message], tools: list[Any] | None) -> set[str]:
    """Return the kinds of things that a conversation says, of which `left_out` returns the missing ones."""
    return {kind for kind, value in _said(messages, tools) if value}


def has_tools(messages: list[Message], tools: list[Any] | None) -> bool:
    """Return whether a conversation has tools, calls or results."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def probe_conversations() -> list[tuple[list[Message], list[Any]]]:
    """Return conversations with tools whose every text is a word that occurs nowhere else: without calls, and with.

    Their renders show which things a template never writes, even if a row's own words happen to stand elsewhere.
    """
    words = iter(_PROBE.format(number) for number in range(10, 30))
    properties = {(argument := next(words)): {"type": "string", "description": next(words)}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    function = {"name": next(words), "description": next(words), "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    call = {"name": function["name"], "arguments": {argument: next(words)}}
    identity = "call12345"  # Mistral's templates want nine letters and digits
    question, answer = {"role": "user", "content": next(words)}, {"role": "assistant", "content": next(words)}
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": identity, "type": "function", "function": call}]},
        {"role": "tool", "content": next(words), "name": function["name"], "tool_call_id": identity},
    ]
    return [([question, answer], tools), ([question, *calls, answer], tools)]


def _said(messages: list[Message], tools: list[Any] | None) -> Iterator[tuple[str, Any]]:
    """Yield everything that a conversation says, as (kind, value)."""
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        yield TOOL_NAMES, function.get("name") or ""
        yield TOOL_DESCRIPTIONS, function.get("description") or ""
    for message in messages:
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            # Templates drop the thought that an answer's own text begins with from history.
            shown = split_thought(content, opened=True)[1] if role == "assistant" and "</" in content else content
            yield TOOL_RESULTS if role == "tool" else f"text of {role} messages", shown
        for call in message.get("tool_calls") or ():
            function = call["function"]
            yield CALL_NAMES, function["name"]
            for value in _leaves(function.get("arguments") or {}):
                yield CALL_ARGUMENTS, value


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and values in nested objects and lists; text that is no object counts as one value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _arrives(value: Any, text: str, as_word: bool) -> bool:
    forms = _forms(value)
    if not forms[0]:
        return True
    if not as_word or len(forms[0]) > SHORT:
        return any(form in text for form in forms)
    return any(_has_word(form, text) for form in forms)


def _has_word(word: str, text: str) -> bool:
    """Return whether `word` stands in `text` with no letter or digit beside it. Much faster than a regular expression."""
    place = text.find(word)
    while place >= 0:
        end = place + len(word)
        if not (_is_word(text[place - 1 : place]) or _is_word(text[end : end + 1])):
            return True
        place = text.find(word, place + 1)
    return False


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _forms(value: Any) -> list[str]:
    """Return the texts as which a template may write a value; the first is the plain one."""
    if not isinstance(value, str):
        return [json.dumps(value), str(value)]
    plain = value.strip()
    if plain.isascii() and plain.isprintable() and not set("\"'\\").intersection(plain):
        return [plain]  # all forms are the same
    escaped = [json.dumps(plain, ensure_ascii=False), json.dumps(plain), repr(plain)]
    return list(dict.fromkeys([plain, *(unescape_marks(form[1:-1]) for form in escaped)]))
