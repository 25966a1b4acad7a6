from typing import Any

import pytest

from accel_llm.chat.values import show_value
from accel_llm.config.command_line import parse_options
from accel_llm.config.data_options import DataOptions
from accel_llm.data.columns import column_problems
from accel_llm.data.formats import Conversation, parse_row
from accel_llm.errors import ConfigError, DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "agent", "content": "a"}]


def roles(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    parsed = parse_row(row, None, columns)
    assert isinstance(parsed, Conversation)
    return [message["role"] for message in parsed.messages]


def test_columns_may_name_a_role() -> None:
    with pytest.raises(DataError, match="unknown role"):
        roles({"messages": TURNS}, {})
    assert roles({"messages": TURNS}, {"role:agent": "assistant"}) == ["user", "assistant"]
    sides = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert roles(sides, {"role:agent": "assistant"}) == ["user", "assistant"]
    spoken = [{"who": "user", "text": "q"}, {"who": "agent", "text": "a"}]
    columns = {"messages": "talk", "role": "who", "content": "text", "role:agent": "assistant"}
    assert roles({"talk": spoken}, columns) == ["user", "assistant"]


def test_a_role_of_ours_may_be_named_otherwise() -> None:
    turns = [{"role": "assistant", "content": "q"}, {"role": "user", "content": "a"}]
    assert roles({"messages": turns}, {"role:assistant": "user", "role:user": "assistant"}) == ["user", "assistant"]


def test_an_entry_for_roles_is_checked() -> None:
    assert column_problems({"role:ipython": "tool", "role:x": "system"}, "messages") == []
    assert column_problems({"role:ipython": "agent"}) == [
        "columns: role:ipython=agent, but 'agent' is no role; the roles are system, user, assistant, tool."
    ]
    (problem,) = column_problems({"role:ipython": "tool"}, "alpaca")
    assert problem.startswith("columns: role:ipython=tool, but 'role:ipython' is not a field of data_format alpaca;")
    (problem,) = column_problems({"role:": "tool"})
    assert problem.startswith("columns: role:=tool, but 'role:' is not a field;")
    with pytest.raises(ConfigError):
        parse_row({"messages": TURNS}, None, {"role:agent": "gpt"})


@pytest.mark.parametrize("words", [["role:ipython=tool"], ["{role:ipython: tool}"], ["role=who", "role:ipython=tool"]])
def test_the_option_takes_roles(words: list[str]) -> None:
    options = parse_options(DataOptions, ["--train_files", "x.jsonl", "--columns", *words])
    assert options.columns["role:ipython"] == "tool"


@pytest.mark.parametrize("column", ["rejected", "rejected_response", "rejected_messages", "chosen"])
def test_rows_of_two_answers_are_refused(column: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in (
        {"messages": turns},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q"},
        {"question": "q", "answer": "a"},
    ):
        for value in ("b", [{"role": "assistant", "content": "b"}], {"role": "assistant", "content": "b"}):
            with pytest.raises(DataError) as caught:
                parse_row({**row, column: value})
            assert caught.value.reason == "a preference row"
            assert str(caught.value).startswith(f"{column}: found ")


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_answers_not_to_learn_are_refused(column: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": turns}, {"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}):
        with pytest.raises(DataError) as caught:
            parse_row({**row, column: False})
        assert caught.value.reason == "an answer not to learn"
        assert parse_row({**row, column: True}).unused == ()
        # All cells of a .csv file are text.
        for text in ("False", "false", " FALSE ", "undesirable"):
            with pytest.raises(DataError) as caught:
                parse_row({**row, column: text})
            assert caught.value.reason == "an answer not to learn"
        for text in ("True", "true", "desirable"):
            assert parse_row({**row, column: text}).unused == ()
    for zero in (0, 0.0, "0", "0.0"):
        with pytest.raises(DataError, match=f"^{column}: found "):
            parse_row({"messages": turns, column: zero})
    for one in (1, "1"):
        assert parse_row({"messages": turns, column: one}).unused == ()


def test_a_kto_tag_that_is_not_understood_is_refused() -> None:
    for value in ("good", 2, [False], {"x": 1}):
        with pytest.raises(DataError, match=r"^kto_tag: found .*; allowed: true$"):
            parse_row({"question": "q", "answer": "a", "kto_tag": value})
    with pytest.raises(DataError, match=r"^kto_tag: found 0, so"):
        parse_row({"question": "q", "answer": "a", "kto_tag": 0})
    assert parse_row({"question": "q", "answer": "a", "kto_tag": ""}).unused == ()
    assert len(parse_row({"question": "q", "answer": "a", "label": "0"}).unused) == 1  # a class


ROWS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"question": "q", "answer": "a"},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_is_switched_off_is_refused(row: dict[str, Any]) -> None:
    switches = [(name, off) for name in ("train", "training", "trainable", "loss") for off in (False, "false")]
    factors = [(name, 0) for name in ("weight", "loss_weight", "loss_scale", "loss_mask", "train")]
    for column, value in (*switches, *factors, ("weight", 0.0), ("weight", "0"), ("masked", True), ("masked", "true")):
        with pytest.raises(DataError) as caught:
            parse_row({**row, column: value})
        found = "so the row is not to be trained; leave it out, or remove the column"
        assert str(caught.value) == f"{column}: found {show_value(value)}, {found}"
        assert caught.value.reason == "an answer not to learn"
    for column, value in (("train", True), ("loss", True), ("weight", 1), ("weight", "1.0"), ("masked", False)):
        assert parse_row({**row, column: value}).unused == ()
    for column, value in (("weight", 0.5), ("loss", 0.0), ("loss", 1.25), ("loss_mask", [0, 1]), ("train", "x")):
        assert [name for name, _ in parse_row({**row, column: value}).unused] == [f"column '{column}'"]
