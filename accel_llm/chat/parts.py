"""Reads a content that is a list of typed parts: texts, reasoning and tool calls, each perhaps with a weight."""

from typing import Any

from accel_llm.chat.tool_calls import read_tool_call
from accel_llm.chat.values import (
    BAD_WEIGHT,
    IMAGES,
    NOT_TEXT,
    TEXT_ONLY,
    Findings,
    is_nothing,
    read_text,
    show_value,
)
from accel_llm.chat.weights import WEIGHT_KEYS, Segments, read_weight
from accel_llm.errors import DataError

_MEDIA_PARTS = frozenset(
    {"image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"}
)
_TEXT_KEYS = ("text", "value", "content")  # where a part may have its text; OpenAI's key has the name of its type
_REASONING = ("reasoning", "thinking")


def join_parts(parts: list[Any], where: str, role: str, findings: Findings) -> tuple[dict[str, Any], Segments | None]:
    """Return the texts, reasoning and tool calls of a content's parts in the fields that templates read.

    The segments are the lengths and weights of the texts, None if all weights are 1. Keys of a part that nothing uses go to `findings`.

    Raises:
        DataError: an unknown kind of part, a value that is missing or not text, an image, a broken tool call or
            weight, or a weight of reasoning or of a call.
    """
    message: dict[str, Any] = {"content": ""}
    segments: Segments = []
    others: list[tuple[int, float]] = []  # (index, weight) of each part that is no text
    for index, part in enumerate(parts):
        # Most parts are a text and nothing else.
        if type(part) is dict and len(part) == 2 and part.get("type") == "text":
            text = part.get("text", part.get("value"))
            if type(text) is str:
                message["content"] += text
                segments.append((len(text), 1.0))
                continue
        if not isinstance(part, dict):
            raise DataError(f"{where}[{index}]: found {show_value(part)}; needs an object with type and text", NOT_TEXT)
        try:
            weight = read_weight(part, role)
            kind, value = _read_part(part, findings)
        except DataError as error:
            raise DataError(f"{where}[{index}].{error}", error.reason) from None
        if kind == "text":
            segments.append((len(value), weight))
            message["content"] += value
            continue
        if kind in _REASONING and role != "assistant":
            findings.leave(kind, "content parts", value)
            continue
        others.append((index, weight))
        if kind == "tool_call":
            message["tool_calls"] = [*message.get("tool_calls", ()), value]
        else:
            message["reasoning_content"] = message["thinking"] = message.get("thinking", "") + value
    if all(weight == 1 for _, weight in (*segments, *others)):
        return message, None
    _check_other_weights(parts, where, segments, others)
    return message, [segment for segment in segments if segment[0]]


def _read_part(part: dict[str, Any], findings: Findings) -> tuple[str, Any]:
    """Return the kind of a part and its text, or its tool call; note the keys that nothing uses."""
    kind = part.get("type")
    if kind == "text" or kind in _REASONING:
        key = next((key for key in (kind, *_TEXT_KEYS) if not is_nothing(part.get(key))), None)
        if key is None:  # all empty; null is no text
            key = next((key for key in (kind, *_TEXT_KEYS) if part.get(key) is not None), kind)
        value = read_text(part, key)
    elif kind == "tool_call":
        key, value = "value", read_tool_call(part.get("value"), "value", findings)
    elif isinstance(kind, str) and kind in _MEDIA_PARTS:
        raise DataError(f"type: found {show_value(kind)}, but {TEXT_ONLY}", IMAGES)
    else:
        raise DataError(f"type: found {show_value(kind)}; allowed: text, reasoning, tool_call", NOT_TEXT)
    if len(part) > 2:
        for name, other in part.items():
            if name != key and name != "type" and name not in WEIGHT_KEYS and other != value:
                findings.leave(name, "content parts", other)
    return kind, value


def _check_other_weights(parts: list[Any], where: str, segments: Segments, others: list[tuple[int, float]]) -> None:
    """Refuse a weight of reasoning or of a call: only texts have segments. One weight of 0 for all parts is fine."""
    if not any(weight for _, weight in (*segments, *others)):
        return
    for index, weight in others:
        if weight != 1:
            kind = parts[index]["type"]
            problem = f"has the weight {weight:g}; a part of an answer that is no text needs 1, or all parts need 0"
            raise DataError(f"{where}[{index}]: the part of type {show_value(kind)} {problem}", BAD_WEIGHT)


def join_texts(parts: list[Any], where: str, findings: Findings) -> str:
    """Return the text of a reasoning that is a list of parts. Raises as `join_parts` does, and for each weight."""
    message, segments = join_parts(parts, where, "assistant", findings)
    if len(message) > 1 or segments:
        raise DataError(f"{where}: found {show_value(parts)}; needs text, or parts of text without weights", BAD_WEIGHT)
    return message["content"]
