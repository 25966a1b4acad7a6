"""Gives a conversation to a template under the keys that it reads: reasoning, and tools inside a system message."""

import json
from typing import Any

from accel_llm.chat.messages import Message
from accel_llm.chat.reads import TemplateReads

# Every template gets the reasoning as `reasoning_content` and `thinking`, as in transformers. These are further names:
# Solar Open and Gemma 4 read the first, MiniCPM3 and Apriel the second.
_MORE_NAMES = ("reasoning", "thought")
_PLAN = "tool_plan"  # Command R7B and Command A: the reasoning of a turn that calls tools


class Spelling:
    """The keys under which one template reads reasoning and tools."""

    def __init__(self, reads: TemplateReads):
        keys = reads.message_keys
        common = {"reasoning_content", "thinking"} & keys
        self._names = [name for name in _MORE_NAMES if name in keys]
        self._plans = _PLAN in keys and not common
        # Magistral reads reasoning from the parts of a content list alone.
        self._as_parts = not common and not self._names and "thinking" in reads.part_keys
        # Phi-4-mini reads tools from the system message, as JSON text.
        self._tools_in_system = "tools" in keys and not reads.tools
        self.empty_content: str | None = ""  # of a message that only calls tools
        self.in_parts = False  # contents are lists of parts, as templates of models that see images want them
        self._changes_reasoning = bool(self._names or self._plans or self._as_parts)

    def spell(self, messages: list[Message]) -> list[Message]:
        """Return the messages with their reasoning, and with empty contents beside calls, as the template reads them."""
        if not self._changes_reasoning and self.empty_content == "" and not self.in_parts:
            return messages
        return [self._spell(message) for message in messages]

    def _spell(self, message: Message) -> Message:
        if self.empty_content is None and message.get("tool_calls") and not message["content"]:
            message = message | {"content": None}
        if self.in_parts and isinstance(message["content"], str):
            message = message | {"content": [{"type": "text", "text": message["content"]}]}
        reasoning = message.get("reasoning_content")
        if reasoning is None or not self._changes_reasoning:
            return message
        if self._as_parts:
            thought = {"type": "thinking", "thinking": reasoning}
            return message | {"content": [thought, {"type": "text", "text": message["content"]}]}
        names = [*self._names, *([_PLAN] if self._plans and message.get("tool_calls") else [])]
        return {**dict.fromkeys(names, reasoning), **message}

    def place_tools(self, messages: list[Message], tools: list[Any] | None) -> list[Message]:
        """Return the messages with the tools in the system message, if the template reads them there."""
        if not tools or not self._tools_in_system:
            return messages
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        return [messages[0] | {"tools": json.dumps(tools, ensure_ascii=False)}, *messages[1:]]
