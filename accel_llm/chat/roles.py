"""The roles of messages: ours, and the names that data sets have for them."""

from collections.abc import Mapping
from typing import Any

from accel_llm.chat.values import UNKNOWN_ROLE, is_nothing, show_keys, show_value
from accel_llm.errors import DataError

OUR_ROLES = ("system", "user", "assistant", "tool")
# Other names of our roles, with files or trainers that use them. Capitals do not matter.
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name; most templates know only the older one
    "user": "user",
    "human": "user",  # ShareGPT
    "prompter": "user",  # Open Assistant
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT
    "chatgpt": "assistant",  # ShareGPT's first files, as FastChat reads them; with them bing and bard
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",  # ms-swift
    "chatbot": "assistant",  # Cohere
    "ai": "assistant",  # LangChain
    "model": "assistant",  # Gemini
    "function_call": "assistant",  # LLaMA-Factory
    "tool_call": "assistant",  # ms-swift
    "tool": "tool",
    "observation": "tool",  # LLaMA-Factory
    "function": "tool",  # OpenAI's older name for a result
    "ipython": "tool",  # Llama 3 and torchtune
    "environment": "tool",  # OLMo 3's Dolci
    "tool_response": "tool",  # ms-swift
    "tool_result": "tool",  # Anthropic; the others are variants
    "tool_results": "tool",
    "tool_output": "tool",
    "function_response": "tool",
    "function_result": "tool",
}
# Roles whose content is a tool call in JSON.
CALL_ROLES = frozenset({"function_call", "tool_call"})


def read_role(turn: dict[str, Any], roles: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the name of a turn's role, the field that has it (`role` or `from`) and our role.

    Raises:
        DataError: the role is missing or unknown.
    """
    field = "from" if is_nothing(turn.get("role")) and not is_nothing(turn.get("from")) else "role"
    name = turn.get(field)
    role = roles.get(name) or roles.get(name.lower()) if isinstance(name, str) else None
    if isinstance(name, str) and role:
        return name, field, role
    problem = f"unknown role {show_value(name)}" if field in turn else f"missing ({show_keys(turn)})"
    remedy = f"columns: role:NAME={OUR_ROLES[1]} (or {', '.join(OUR_ROLES[::2])}, tool) adds one"
    raise DataError(f"{field}: {problem}; known are {', '.join(roles)}; {remedy}", UNKNOWN_ROLE)
