"""The rows of ../shared/cases, each of which stands for a kind, as `parse_row` reads them."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from accel_llm.chat.tools import NULL_ARGUMENTS
from accel_llm.data.formats import JOINED_CONTEXT, Conversation, parse_row
from accel_llm.errors import DataError

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Tells the time in a zone",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": []},
    },
}


def load(name: str) -> list[dict[str, Any]]:
    path = CASES / name
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations(name: str) -> list[Conversation]:
    parsed = [parse_row(row) for row in load(name)]
    assert all(isinstance(row, Conversation) and row.unused == () for row in parsed)
    return [row for row in parsed if isinstance(row, Conversation)]


def answers(name: str) -> list[list[tuple[str, Any]]]:
    """Return for each row the content of its assistant turns, and whether each is trained."""
    return [
        [(m["content"], m.get("train", m.get("weight", True))) for m in row.messages if m["role"] == "assistant"]
        for row in conversations(name)
    ]


def arguments(name: str) -> list[Any]:
    calls = [call for row in conversations(name) for m in row.messages for call in m.get("tool_calls", ())]
    return [call["function"]["arguments"] for call in calls]


def test_loss_keys() -> None:
    assert answers("loss_keys.jsonl") == [
        [("wrong pong", False), ("pong", True)],
        [("five", False), ("No, four.", True)],
        [("Ready.", False), ("Gone.", True)],
    ]


def test_parts() -> None:
    first, second = (row.messages[1] for row in conversations("part_train.jsonl"))
    assert first == {
        "role": "assistant",
        "content": "Let me guess: 40. It is 42.",
        "segments": [(17, 0.0), (10, 1.0)],
    }
    assert second == {"role": "assistant", "content": "Maybe 41. It is 42.", "segments": [(9, 0.0), (10, 1.0)]}


def test_tools_of_all_places() -> None:
    (row,) = conversations("functions_on_the_row.jsonl")
    assert row.tools == [TOOL]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": {"zone": "Oslo"}}
    first, second = conversations("tools_on_the_system_message.jsonl")
    assert first.tools == second.tools == [TOOL]
    assert first.messages[0] == {"role": "system", "content": "You may call tools."}
    assert [message["role"] for message in second.messages] == ["user", "assistant"]
    (row,) = conversations("parameters_as_text.jsonl")
    assert row.tools and row.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"zone": {"type": "string"}},
    }
    for row in conversations("user_alone_tools_blank.jsonl"):
        assert row[:3] == (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            None,
            {},
        )


def test_arguments() -> None:
    assert arguments("arguments_encoded_twice.jsonl") == [{"metres": 5}]
    assert arguments("argument_keys.jsonl") == [{"<|im_end|>": 1}, {"a\ud83d": 1}]
    assert arguments("arrow_fills_nulls.parquet") == [{"zone": "Oslo"}, {"a": 3}]
    removed = [(f"{NULL_ARGUMENTS}, such as 'a'",), (f"{NULL_ARGUMENTS}, such as 'zone'",)]
    assert [row.remarks for row in conversations("arrow_fills_nulls.parquet")] == removed


def test_columns_beside_question_and_answer() -> None:
    context, system, reasoning = conversations("context_columns.jsonl")
    question = "How old is the oldest clerk?\nCREATE TABLE clerks (name TEXT, age INTEGER)"
    assert context.messages == [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "SELECT MAX(age) FROM clerks"},
    ]
    assert (context.remarks, system.remarks, reasoning.remarks) == ((JOINED_CONTEXT,), (), ())
    assert system.messages[0] == {"role": "system", "content": "Answer in capitals."}
    thought = "Two and three make five."
    assert reasoning.messages[1] == {
        "role": "assistant",
        "content": "5",
        "reasoning_content": thought,
        "thinking": thought,
    }


def test_the_answer_not_to_learn() -> None:
    bad, good = load("label_false.jsonl")
    with pytest.raises(DataError) as caught:
        parse_row(bad)
    assert caught.value.reason == "an answer not to learn"
    parsed = parse_row(good)
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1]["content"] == "I cannot see it from here." and parsed.unused == ()


def test_variables() -> None:
    for row in load("variables.jsonl"):
        parsed = parse_row(row)
        assert isinstance(parsed, Conversation) and parsed.variables == row["chat_template_kwargs"]
