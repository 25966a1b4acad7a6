"""A conversation that is too long for the model is cut at turns: what is left are the tokens of the kept turns alone."""

import pytest
from families import load
from hypothesis import given
from hypothesis import strategies as st

from accel_llm.chat.template import load_template
from accel_llm.model.answers import fit_turns

TURN_TEXTS = st.text("ab 中\n", min_size=1, max_size=30)


def conversation(texts: list[str]) -> list[dict]:
    """Questions and answers in turn; the last is a question."""
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def own_ids(tokenizer, template, messages: list[dict]) -> list[int]:
    """The tokens of plain transformers."""
    text = tokenizer.apply_chat_template(
        messages, chat_template=template.source, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(st.lists(TURN_TEXTS, min_size=1, max_size=9).filter(lambda texts: len(texts) % 2), st.booleans(), st.data())
def test_whole_turns_go_oldest_first_until_the_rest_fits(texts, with_system, data):
    tokenizer, template = load("chatml")
    system, turns = "Be brief." if with_system else None, conversation(texts)
    head = [{"role": "system", "content": system}] if system else []
    lengths = [len(own_ids(tokenizer, template, head + turns[k:])) for k in range(0, len(turns), 2)]
    room = data.draw(st.integers(1, lengths[0] + 1))
    ids, left_out = fit_turns(template, system, turns, room)
    # The longest end of the conversation that fits; the last question alone, if none does.
    expected = next((k for k, length in enumerate(lengths) if length <= room), len(lengths) - 1)
    assert left_out == 2 * expected
    assert ids == own_ids(tokenizer, template, head + turns[left_out:])
    # What is left out stays so, also with more room; without a limit nothing goes.
    assert fit_turns(template, system, turns, 10_000, left_out) == (ids, left_out)
    assert fit_turns(template, system, turns, None) == (own_ids(tokenizer, template, head + turns), 0)


def test_calls_and_their_results_go_with_their_question():
    _, template = load("qwen2.5")
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    turns = [
        {"role": "user", "content": "one"},
        call,
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "It is 1."},
        {"role": "user", "content": "two"},
    ]
    assert fit_turns(template, None, turns, 1)[1] == 4


@pytest.mark.parametrize(
    "name, answer, later",
    [
        ("qwen3", "<think>\nHm.\n</think>\n\nFour.", "Four."),  # the template drops earlier thoughts
        ("deepseek-r1-distill", "Hm.\n</think>\n\nFour.", "Four."),
        ("chatml", "<think>Hm.</think>Four.", "<think>Hm.</think>Four."),  # and this one knows of none
    ],
)
def test_a_thought_is_in_later_turns_as_the_template_has_it(name, answer, later):
    tokenizer, template = load(name)
    turns = conversation(["2+2?", answer, "And 3?"])
    text = tokenizer.decode(fit_turns(template, None, turns, None)[0])
    assert later in text and ("Hm." in text) == ("Hm." in later)


def test_a_template_says_which_tags_a_thought_has():
    tags = {name: load(name)[1].thought_tags for name in ("qwen3", "gemma-4", "chatml")}
    assert tags == {
        "qwen3": ("<think>", "</think>"),
        "gemma-4": ("<|channel>thought", "<channel|>"),
        "chatml": ("<think>", "</think>"),
    }
    assert [load(name)[1].opens_thought for name in ("deepseek-r1-distill", "qwen3", "gemma-4")] == [True, False, False]
    assert load_template(load("qwen3")[0], "chatml").thought_tags == ("<think>", "</think>")
