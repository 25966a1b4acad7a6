"""The fast ways to a row (patterns, prefixes) and the plain one, a render for each turn, never differ.

Every template that the tests hold encodes made-up conversations both ways: with tools and odd values, later system
messages, thoughts and the template's own words in people's texts, and again in another order.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, TEMPLATES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from specification import byte_level
from support import CONTROL_TOKENS
from support import byte_level as tiny_tokenizer

from accel_llm.chat import renderer
from accel_llm.chat.stand_ins import compile_traceable
from accel_llm.chat.template import Template
from accel_llm.chat.template_source import read_template
from accel_llm.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = [*sorted(SHARED.glob("chat_templates/*/*.jinja")), *sorted(SHARED.glob("tokenizers/*/chat_template.jinja"))]
NAMES = [*FAMILIES, *(str(path.relative_to(SHARED)) for path in PUBLISHED)]
CLOSED = "{%- macro unused() %}{%- endmacro %}"  # writes nothing, but a template with a macro is never traced

WORDS = st.sampled_from(
    [
        "Hi",
        "no",
        "",
        " ",
        "\n\n",
        "It is 4.",
        "é中😀",
        "100 %s {x}",
        "<think>",
        "</think>",
        "\n</think>\n\n",
        "<|im_end|>",
        "</s>",
    ]
)
TEXTS = st.lists(WORDS, max_size=5).map("".join)
ANSWERS = TEXTS.map(lambda text: text if text.strip() else text + "yes")
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10**20), st.sampled_from([1.5, 1e30]), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)
CALLS = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["add", "look_up"]),
    st.dictionaries(st.sampled_from(["a", "b c", "é"]), VALUES, max_size=2),
)
TOOLS = st.lists(
    st.builds(
        lambda name, text: {
            "type": "function",
            "function": {"name": name, "description": text, "parameters": {"type": "object", "properties": {}}},
        },
        st.sampled_from(["add", "look_up"]),
        TEXTS,
    ),
    max_size=2,
)


@st.composite
def chats(draw: Any) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """A conversation with one to four questions, some with calls and results before the answer."""
    has_tools = draw(st.booleans())
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if has_tools and draw(st.booleans()):
            identity = {"id": "call00001"}
            call = {**identity, **draw(CALLS)}
            messages.append(
                {"role": "assistant", "content": draw(st.sampled_from(["", "Well."])), "tool_calls": [call]}
            )
            messages.append({"role": "tool", "name": "add", "tool_call_id": "call00001", "content": draw(TEXTS)})
        answer: dict[str, Any] = {"role": "assistant", "content": draw(ANSWERS)}
        if thought := draw(st.one_of(st.just(""), TEXTS)):
            answer |= {"reasoning_content": thought, "thinking": thought}
        if draw(st.integers(0, 5)) == 0:
            answer["train"] = False
        messages.append(answer)
    if len(messages) > 4 and draw(st.integers(0, 4)) == 0:
        messages.insert(-2, {"role": "system", "content": draw(TEXTS)})
    return messages, (draw(TOOLS) or None) if has_tools else None


@lru_cache
def load(name: str) -> tuple[Template, Template]:
    """The template as it is used, and one that is rendered for each turn."""
    if name in FAMILIES:
        tokenizer, path = byte_level(FAMILIES[name]), TEMPLATES / f"{name}.jinja"
    else:
        path = SHARED / name
        source = path.read_text(encoding="utf-8")
        tokens = re.findall(r"<\|\w+\|>|</?s>|<\w+_of_turn>|\[/?INST\]", source)
        tokenizer = tiny_tokenizer(list(dict.fromkeys([*CONTROL_TOKENS["qwen2.5"], "<s>", "</s>", *tokens])))
    source = read_template(tokenizer, str(path)).text
    assert compile_traceable(source + CLOSED) is None
    return Template(tokenizer, source), Template(tokenizer, source + CLOSED)


def encode(template: Template, chat: Any, options: dict[str, Any]) -> Any:
    messages, tools = chat
    try:
        return template.encode(messages, tools=tools, **options)
    except DataError as error:
        return str(error)


OPTIONS = st.fixed_dictionaries(
    {
        "split_turns": st.sampled_from([False, True, "auto"]),
        "open_thought": st.sampled_from(["refuse", "close", "history"]),
        "train_on": st.sampled_from(["assistant", "assistant", "last_assistant", "all"]),
    }
)


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_ways_give_what_a_render_for_each_turn_gives(name: str) -> None:
    fast, plain = load(name)

    @settings(
        max_examples=12,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(chats(), chats(), OPTIONS)
    def holds(first: Any, second: Any, options: dict[str, Any]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(renderer, "LONG_CHAT", 10**9)
            expected = [encode(plain, chat, options) for chat in (first, second)]
        for _ in range(2):  # the second time from what was kept
            assert [encode(fast, chat, options) for chat in (first, second)] == expected

    holds()


def test_a_difference_would_be_noticed() -> None:
    fast, plain = load("qwen3")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], None
    assert encode(fast, chat, {}) == encode(plain, chat, {})
    other = [chat[0][0], {"role": "assistant", "content": "Hello"}], None
    assert encode(fast, chat, {}) != encode(plain, other, {})
