"""What a conversation says arrives in its render, or is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import byte_level

from accel_llm.chat.arrival import left_out, probe_conversations
from accel_llm.chat.template import Template

TEMPLATES = Path(__file__).parents[1] / "templates"
CALLS, RESULT, ANSWER = "the calls", "the result", "the answer"
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks at it.", "parameters": {}}}


def talk(arguments: Any = None, result: str = "blue sky", answer: str = "It is blue.") -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments or {"place": "up"}}}
    return [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "What do you see?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


EVERYTHING = 'Be brief.|look|Looks at it.|What do you see?|look{"place": "up"}|blue sky|It is blue.'


@pytest.mark.parametrize(
    ("removed", "kind"),
    [
        ("Be brief.", "text of system messages"),
        ("What do you see?", "text of user messages"),
        ("It is blue.", "text of assistant messages"),
        ("blue sky", "tool results"),
        ("Looks at it.", "descriptions of tools"),
        ("place", "arguments of tool calls"),
        ('"up"', "arguments of tool calls"),
    ],
)
def test_what_is_missing_is_named(removed: str, kind: str) -> None:
    assert left_out(talk(), [TOOL], EVERYTHING) == set()
    assert left_out(talk(), [TOOL], EVERYTHING.replace(removed, "")) == {kind}


def test_names_of_tools_and_calls() -> None:
    text = EVERYTHING.replace("look", "")
    assert left_out(talk(), [TOOL], text) == {"names of tools", "names of tool calls"}


@pytest.mark.parametrize(
    "value", ["a \"b\" 'c'\n\\d", "é\u2028", 5, -2.5, True, False, None, ["x", {"y": "z"}], "", {}]
)
def test_values_in_every_spelling(value: Any) -> None:
    messages = talk({"place": value})
    for written in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)):
        text = EVERYTHING.replace('"up"', written)
        assert left_out(messages, [TOOL], text) == set(), written


def test_short_values_are_words_of_their_own() -> None:
    text = EVERYTHING.replace('"up"', "15")
    assert left_out(talk({"place": 15}), None, text) == set()
    assert (
        left_out(talk({"place": 1}), None, text)
        == left_out(talk({"place": 5}), None, text)
        == {"arguments of tool calls"}
    )


def test_reasoning_inside_an_answer_is_not_looked_for() -> None:
    messages = talk(answer="<think>\nHm.\n</think>\n\nIt is blue.")
    assert left_out(messages, None, EVERYTHING) == set()
    assert left_out(messages, None, EVERYTHING.replace("It is blue.", "")) == {"text of assistant messages"}


def load(source: str) -> Template:
    tokenizer = byte_level(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return Template(tokenizer, source)


NO_TOOLS = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
QWEN = (TEMPLATES / "qwen2.5.jinja").read_text(encoding="utf-8")
LATER_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for m in messages %}"
    "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_drops_tools_is_named_even_if_the_words_stand_elsewhere() -> None:
    messages = talk(answer="look: Looks at it. up place")
    assert load(NO_TOOLS).encode(messages, tools=[TOOL]).left_out == (
        "arguments of tool calls",
        "descriptions of tools",
        "names of tool calls",
        "names of tools",
    )
    assert load(QWEN).encode(messages, tools=[TOOL]).left_out == ()


def test_a_later_system_message_is_missed_for_every_row_of_its_shape() -> None:
    plain = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Bye."},
    ]
    template = load(LATER_SYSTEM)
    for text in ("Be rude.", "Be kind."):
        later = [*plain[:2], {"role": "system", "content": text}, *plain[2:]]
        assert template.encode(later).left_out == ("text of system messages",)
        assert template.encode([later[2], *plain]).left_out == template.encode(plain).left_out == ()


def test_spaces_and_line_ends_may_be_fewer() -> None:
    messages = talk(answer="One.\n\nTwo.  Three.")
    assert left_out(messages, None, EVERYTHING.replace("It is blue.", "One.\nTwo. Three.")) == set()
    assert left_out(messages, None, EVERYTHING.replace("It is blue.", "One.Two. Three.")) == {
        "text of assistant messages"
    }


def test_the_probes_have_each_kind() -> None:
    plain, calls = probe_conversations()
    kinds = {"names of tools", "descriptions of tools", "text of user messages", "text of assistant messages"}
    assert left_out(*plain, "") == kinds
    assert left_out(*calls, "") == kinds | {"names of tool calls", "arguments of tool calls", "tool results"}


def test_a_template_that_refuses_calls_is_known_to_drop_tools() -> None:
    refusing = NO_TOOLS.replace(
        "{%- for",
        "{%- for m in messages %}{%- if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}{%- for",
        1,
    )
    messages = [{"role": "user", "content": "look: Looks at it."}, {"role": "assistant", "content": "No."}]
    assert load(refusing).encode(messages, tools=[TOOL]).left_out == ("descriptions of tools", "names of tools")
