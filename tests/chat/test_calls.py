"""Turns with calls: where they end, what stands between an answer and its calls, and people's tokens in them."""

from itertools import groupby

import pytest
from families import load
from support import CONTROL_TOKENS, byte_level

from accel_llm.chat.template import Template
from accel_llm.chat.template_source import CHATML
from accel_llm.errors import DataError

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "Up?"}


def call(place: object = "sky", content: str = "") -> dict:
    function = {"name": "look", "arguments": {"place": place}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


def trained(name: str, messages: list[dict], **options: object) -> list[str]:
    tokenizer, template = load(name)
    (row,) = template.encode(messages, tools=[TOOL], **options).rows  # type: ignore[arg-type]
    assert "\ufdd0" not in (text := tokenizer.decode(row.input_ids)) and "\ufdd1" not in text
    runs: list[list[int]] = [[]]
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label != -100:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4", "qwen2.5", "hermes-3", "llama-3.1"])
def test_a_header_that_people_wrote_cuts_nothing(name: str) -> None:
    tokenizer, template = load(name)
    for token in tokenizer.added_tokens_decoder.values():
        for messages in (
            [QUESTION, call(f"x {token.content} y")],
            [QUESTION, call(content=f"say {token.content} here")],
        ):
            rows = template.encode(messages, tools=[TOOL]).rows
            plain = template.encode([QUESTION, call("x  y")], tools=[TOOL]).rows
            index = tokenizer.convert_tokens_to_ids(token.content)
            if rows and plain:
                assert rows[0].input_ids.count(index) == plain[0].input_ids.count(index)
                assert len(trained(name, messages)) == 1


def test_what_gpt_oss_writes_between_thought_and_call_is_trained() -> None:
    """It stops at `<|call|>`, not at `<|end|>`, so it writes the header itself."""
    (text,) = trained("gpt-oss", [QUESTION, call(content="")])
    assert text.endswith("<|call|>")


def test_the_call_of_command_r7b_ends_before_the_next_prompt() -> None:
    result = {"role": "tool", "name": "look", "tool_call_id": "c", "content": "blue"}
    chat = [QUESTION, call(), result, {"role": "assistant", "content": "Blue."}]
    for messages in (chat[:2], chat):
        first = trained("command-r7b", messages)[0]
        assert first.endswith("<|END_ACTION|><|END_OF_TURN_TOKEN|>")
    assert trained("command-r7b", chat)[1].endswith("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")


TWO_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% if m.tool_calls %}<|im_start|>"
    "assistant\n{{ m.tool_calls[0].function | tojson }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_header_after_the_end_of_a_turn_is_not_trained() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    template = Template(tokenizer, TWO_TURNS)
    (row,) = template.encode([QUESTION, call(content="Let me see.")]).rows
    trained_ids = [token if label != -100 else None for token, label in zip(row.input_ids, row.labels, strict=True)]
    runs = [list(group) for on, group in groupby(trained_ids, key=lambda token: token is not None) if on]
    assert [tokenizer.decode(run) for run in runs] == [
        "Let me see.<|im_end|>",
        '{"name": "look", "arguments": {"place": "sky"}}<|im_end|>',
    ]


LEFT_OPEN = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'").replace(
    "message['role'] + '\\n' + message['content']",
    "message['role'] + '\\n' + ('<think>\\n' if message.role == 'assistant' else '') + message['content']",
)


def test_an_answer_is_not_trained_inside_an_open_thought() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    template = Template(tokenizer, LEFT_OPEN)
    messages = [QUESTION, {"role": "assistant", "content": "Blue."}]
    assert not template.encode(messages).rows
    (row,) = template.encode(messages, open_thought="close").rows
    assert tokenizer.decode(row.input_ids).endswith("assistant\n<think>\n\n</think>\n\nBlue.<|im_end|>\n")
    reasoned = {**messages[1], "reasoning_content": "I look."}
    (row,) = template.encode([QUESTION, reasoned]).rows
    assert tokenizer.decode(row.input_ids).endswith("assistant\n<think>\nI look.\n</think>\n\nBlue.<|im_end|>\n")


def test_weights_of_parts_leave_the_reasoning_alone() -> None:
    tokenizer, template = load("qwen3")
    answer = {
        "role": "assistant",
        "content": "alpha beta",
        "reasoning_content": "RRR",
        "segments": [(6, 0.0), (4, 1.0)],
    }
    (row,) = template.encode([QUESTION, answer]).rows
    on = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert tokenizer.decode(on) == "<think>\nRRR\n</think>\n\nbeta<|im_end|>"
    _, r1 = load("deepseek-r1")
    thought = {"role": "assistant", "content": "<think>\nr\n</think>\n\nbeta", "segments": [(20, 0.0), (4, 1.0)]}
    with pytest.raises(DataError, match="parts of an answer that begins with a thought"):
        r1.encode([QUESTION, thought])


def test_split_tokens_of_the_template_for_tools_are_named() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    other = CHATML.replace("<|im_start|>", "<|nope_start|>").replace("<|im_end|>", "<|nope_end|>")
    template = Template(tokenizer, CHATML, source_for_tools=other)
    assert template.split_markers(strict=True) == ["<|nope_start|>", "<|nope_end|>"]
    assert Template(tokenizer, CHATML).split_markers(strict=True) == []
