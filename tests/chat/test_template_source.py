"""Which template a tokenizer gives: its own, one of several, the built-in one, or a file."""

from pathlib import Path
from typing import Any

import pytest
from support import CONTROL_TOKENS, byte_level
from transformers import AutoTokenizer

from accel_llm.chat.template import Template, load_template
from accel_llm.chat.template_source import CHATML, read_template
from accel_llm.errors import ConfigError

TOKENS = CONTROL_TOKENS["qwen2.5"]
QWEN = (Path(__file__).parents[1] / "templates" / "qwen2.5.jinja").read_text(encoding="utf-8")
RAG = "{{ documents[0] }}" + CHATML  # needs documents, so it cannot render a plain chat
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}


def tokenizer(**templates: str) -> Any:
    made = byte_level(TOKENS)
    made.chat_template = templates
    return made


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_rows_with_tools_have_a_template_of_their_own(tools: list | None, tmp_path) -> None:
    made = tokenizer(default=CHATML, tool_use=QWEN, rag=RAG)
    # Saved and loaded again, as a model on the hub has it.
    made.save_pretrained(tmp_path)
    for one in (made, AutoTokenizer.from_pretrained(tmp_path)):
        template = load_template(one)
        (row,) = template.encode(CHAT, tools=tools).rows
        expected = one.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert one.decode(row.input_ids) == template.render(CHAT, tools=tools) == expected
        assert ("Looks." in expected) == bool(tools)
        prompt = one.apply_chat_template(CHAT[:1], tools=tools, tokenize=False, add_generation_prompt=True)
        assert one.decode(template.prompt_ids(CHAT[:1], tools)) == prompt
    # Without a template for tools, the one for all others is taken, as in transformers.
    assert not load_template(tokenizer(default=CHATML, rag=RAG)).encode(CHAT, tools=[TOOL]).rows[0].weights


def test_what_a_row_may_give_is_what_either_of_the_two_reads() -> None:
    reads = load_template(tokenizer(default="{{ mood }}" + CHATML, tool_use=QWEN)).reads
    assert "mood" in reads.variables and {"content", "tool_calls"} <= reads.message_keys


def test_a_name_picks_one() -> None:
    made = tokenizer(default=CHATML, tool_use=QWEN)
    assert load_template(made, "tool_use").source == QWEN
    assert load_template(made, "tool_use").source_for_tools is None
    assert load_template(made, "default").encode(CHAT, tools=[TOOL]).left_out
    assert read_template(made, "chatml").text == CHATML


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (None, r"has several templates, but none is named default; name one of tool_use, rag\."),
        (
            "other",
            r"'other' is neither a file nor chatml, .*, nor one of the tokenizer's templates \(tool_use, rag\)\.",
        ),
    ],
)
def test_names_are_listed(name: str | None, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_template(tokenizer(tool_use=QWEN, rag=RAG), name)


def test_a_template_for_tools_alone_can_be_loaded() -> None:
    """Hermes' template for tools cannot render a chat without them."""
    source = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + CHATML
    template = Template(byte_level(TOKENS), source)
    assert template.turn_end == "<|im_end|>"
    assert not template.encode(CHAT, tools=[TOOL]).lost


def test_a_template_that_wants_content_in_parts_gets_parts() -> None:
    source = CHATML.replace("message['content']", "message['content'][0]['text']")
    (row,) = Template(byte_level(TOKENS), source).encode(CHAT).rows
    plain = load_template(byte_level(TOKENS), "chatml").encode(CHAT).rows[0]
    assert row == plain
