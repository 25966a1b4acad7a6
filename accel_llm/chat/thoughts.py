"""Thoughts: those that an answer's own text begins with, and those that templates put around a row's reasoning."""

import re
from typing import Any

from accel_llm.chat.messages import Message
from accel_llm.errors import DataError

_TAG = r"<(?P<tag>(?:\w+:)?think(?:ing)?)>"
_BEGINS_WITH_THOUGHT = re.compile(rf"\s*{_TAG}(?P<thought>.*?)</(?P=tag)>\s*", re.DOTALL)
_CONTINUES_THOUGHT = re.compile(r"(?P<thought>.*?)</(?:\w+:)?think(?:ing)?>\s*", re.DOTALL)
_OPENS = re.compile(_TAG)


def split_thought(content: Any, opened: bool = False) -> tuple[str, str]:
    """Return (thought, answer) of a text that begins with a thought in tags; ("", content) of any other.

    With `opened` the text may leave out the opening tag, as an answer does whose prompt has opened the thought.
    """
    text = str(content)  # a stand-in would ask the real text
    if (match := _BEGINS_WITH_THOUGHT.match(text)) or (
        opened and (match := _CONTINUES_THOUGHT.match(text)) and not _OPENS.search(match["thought"])
    ):
        return match["thought"].strip(), text[match.end() :]
    return "", text


def split_tagged(text: str, tags: tuple[str, str], opened: bool) -> tuple[str, str]:
    """Return (thought, answer) of a text that begins with a thought in `tags`; ("", text) of any other.

    With `opened` the prompt has written the first tag. A thought that was not closed is a thought without an answer.
    """
    begun = text.lstrip()
    if not (opened or begun.startswith(tags[0])):
        return "", text
    thought, _, answer = begun.removeprefix(tags[0]).partition(tags[1])
    return thought.strip(), answer.lstrip()


def reasoning_of(message: Message) -> str:
    """Return the reasoning of a message, also that with which its content begins; "" if it has none."""
    return str(message.get("reasoning_content") or message.get("thinking") or split_thought(message["content"])[0])


def with_own_reasoning(messages: list[Message], opened: bool) -> list[Message]:
    """Return the messages with the thoughts of their contents as `reasoning_content`; see `split_thought`.

    Raises:
        DataError: the parts of such a content have weights of their own.
    """
    changed = []
    for message in messages:
        if message["role"] == "assistant" and "</" in message["content"] and "reasoning_content" not in message:
            thought, answer = split_thought(message["content"], opened)
            if thought and answer and "segments" in message:
                raise DataError(
                    "weight: parts of an answer that begins with a thought have different weights", "bad weight"
                )
            if thought and answer:
                message = {**message, "content": answer, "reasoning_content": thought, "thinking": thought}
        changed.append(message)
    return changed


def after_thought(shown: str, tags: tuple[str, str], empty: str) -> str:
    """Return what follows the thought at the start of `shown`: `empty`, or a text between `tags`."""
    if empty and shown.startswith(empty):
        return shown[len(empty) :]
    opened = shown.lstrip()
    if opened.startswith(tags[0]) and tags[1] in opened:
        return opened.partition(tags[1])[2].lstrip()
    return shown
