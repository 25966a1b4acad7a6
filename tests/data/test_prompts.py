"""Rows as prompts: what plain transformers' chat template writes for the turns before the answer, for every shape."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from accel_llm.chat.template import load_template
from accel_llm.config.fields import Source
from accel_llm.data.formats import Conversation
from accel_llm.data.prompts import parse_prompt
from accel_llm.data.sources import read_source
from accel_llm.data.tokenized import TokenizedRow
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import DataError

INSTRUCT = Path(__file__).parents[3] / "shared" / "data" / "instruct"
Q = {"role": "user", "content": "Who?"}
A = {"role": "assistant", "content": "Me."}
SYSTEM = {"role": "system", "content": "Be brief."}
TWO = [Q, A, {"role": "user", "content": "Why?"}]

# A row -> the messages that the model is shown.
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "chat": ({"messages": [SYSTEM, Q, A]}, [SYSTEM, Q]),
    "chat without an answer": ({"messages": [SYSTEM, Q]}, [SYSTEM, Q]),
    "chat of two questions": ({"messages": [*TWO, A]}, TWO),
    "chat that ends with a question": ({"messages": TWO}, TWO),
    "empty answer": ({"messages": [Q, {"role": "assistant", "content": ""}]}, [Q]),
    "answer that is missing": ({"messages": [Q, {"role": "assistant", "content": None}]}, [Q]),
    "JSON text": ({"messages": json.dumps([Q, A])}, [Q]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]}, [Q]),
    "pairs": ({"conversation": [{"human": "Who?", "assistant": "Me."}]}, [Q]),
    "two pairs": ({"conversation": [{"human": "Who?", "assistant": "Me."}, {"human": "Why?", "assistant": "x"}]}, TWO),
    "alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add\n1 2"}],
    ),
    "alpaca, all in the input": ({"instruction": "", "input": "Who?", "output": "3"}, [Q]),
    "instruction alone": ({"instruction": "Who?"}, [Q]),
    "instruction and response": ({"instruction": "Who?", "response": "Me."}, [Q]),
    "prompt": ({"prompt": "Who?"}, [Q]),
    "prompt and empty completion": ({"prompt": "Who?", "completion": None}, [Q]),
    "prompt of messages": ({"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, Q]),
    "query": ({"query": "Why?", "history": [["Who?", "Me."]], "response": "x"}, TWO),
    "question": ({"question": "Who?", "system": "Be brief.", "answer": "x", "score": 3}, [SYSTEM, Q]),
    "text": ({"text": "Who?"}, [Q]),
    "text beside a question": ({"question": "Who?", "text": "Why?"}, [Q]),
    "preferences": ({"prompt": "Who?", "chosen": "Me.", "rejected": "x"}, [Q]),
    "labels": ({"prompt": "Who?", "completion": "Me.", "label": False}, [Q]),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_prompt_is_what_the_template_writes_before_the_answer(name):
    row, expected = ROWS[name]
    before, tokenizer = json.dumps(row), build_demo_tokenizer()
    parsed = parse_prompt(row)
    assert isinstance(parsed, Conversation) and json.dumps(row) == before
    right = tokenizer.apply_chat_template(expected, add_generation_prompt=True)["input_ids"]
    assert load_template(tokenizer).prompt_ids(parsed.messages, parsed.tools, parsed.variables or None) == right


def test_token_ids_are_cut_before_the_last_trained_ones():
    ids, no = [1, 2, 3, 4, 5, 6], -100
    for row, expected in (
        ({"input_ids": ids}, ids),
        ({"input_ids": ids, "labels": [no, no, 3, no, 5, 6]}, ids[:4]),
        ({"input_ids": ids, "labels": [no, no, no, 4, 5, no]}, ids[:3]),
        ({"input_ids": ids, "labels": [no] * 6}, ids),
    ):
        parsed = parse_prompt(row)
        assert isinstance(parsed, TokenizedRow) and parsed.input_ids == expected


def test_columns_and_roles_are_renamed_and_an_answer_need_not_be_there():
    names = {"instruction": "q", "output": "a"}
    for row in ({"q": "Who?", "a": "Me."}, {"q": "Who?"}):
        assert parse_prompt(row, None, names).messages == [Q]  # type: ignore[union-attr]
    turns = [{"who": "patient", "says": "Who?"}, {"who": "doctor", "says": "Me."}]
    names = {"role": "who", "content": "says", "role:patient": "user", "role:doctor": "assistant"}
    assert parse_prompt({"messages": turns}, None, names).messages == [Q]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": ""}, "prompt: the prompt is empty; needs a question (its keys: prompt)"),
        ({"question": " \n", "answer": "x"}, "question: the prompt is empty; needs a question (its keys: question, answer)"),
        ({"messages": []}, "messages: the prompt is empty; needs a question (its keys: messages)"),
        ({"messages": [A]}, "order: an assistant turn opens the conversation; a user turn must be first"),
        ({"messages": [SYSTEM]}, "order: an assistant turn opens the conversation; a user turn must be first"),
        ({"text": 5}, "text: found 5; needs text (its keys: text)"),
        ({"messages": "nothing"}, "messages: found \"nothing\", which is not JSON"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role: "),
        ({"title": "x"}, "no prompt in this row: its keys: title, known are messages, "),
        ({"prompt": "Who?", "images": ["x.png"]}, "images: found "),
    ],
)  # fmt: skip
def test_a_row_without_a_prompt_is_one_sentence(row, sentence):
    with pytest.raises(DataError) as error:
        parse_prompt(row)
    assert str(error.value).startswith(sentence) and error.value.reason != "not usable"


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason="the data is not here")
@pytest.mark.parametrize("name", sorted(path.name for path in INSTRUCT.glob("*.json*")) if INSTRUCT.is_dir() else [])
def test_published_rows_are_prompts_whether_their_answer_is_there_or_not(name):
    """Without the last answer each row is the same prompt."""
    tried = 0
    for row in itertools.islice(read_source(Source(path=str(INSTRUCT / name))), 40):
        try:
            with_answer = parse_prompt(row.fields)
        except DataError:
            continue
        column = next((name for name in ("messages", "conversations") if isinstance(row.fields.get(name), list)), None)
        if column:
            turns = row.fields[column]
            fields = (
                {**row.fields, column: turns[:-1]}
                if str(turns[-1]).count("assistant") or "gpt" in str(turns[-1])
                else row.fields
            )
        else:
            fields = {name: value for name, value in row.fields.items() if name != "output"}
        assert parse_prompt(fields).messages == with_answer.messages  # type: ignore[union-attr]
        tried += 1
    assert tried or name == "axolotl_conversation.missingturns.json"
