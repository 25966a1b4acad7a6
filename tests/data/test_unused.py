"""What a row says and nobody reads: it is counted, with its size and an example."""

import json
import timeit
from pathlib import Path
from typing import Any

import pytest

from accel_llm.chat.reads import TemplateReads
from accel_llm.data.formats import JOINED_CONTEXT, Conversation, parse_row
from accel_llm.data.ledger import Unused
from accel_llm.data.unused import count_characters, is_record_name

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CHAT = {"messages": [USER, ASSISTANT]}


def unused(row: dict[str, Any], **options: Any) -> dict[str, Unused]:
    return dict(parse_row(row, **options).unused)


def conversation(row: dict[str, Any], **options: Any) -> Conversation:
    parsed = parse_row(row, **options)
    assert isinstance(parsed, Conversation)
    return parsed


def test_columns_of_every_format() -> None:
    notes = {"notes": "x" * 200, "id": 7, "empty": "", "null": None, "list": [], "object": {}}
    counted = {
        "column 'notes'": Unused(1, 200, '"' + "x" * 76 + "...", False),
        "column 'id'": Unused(1, 1, "7", True),
    }
    for row in (
        CHAT,
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"query": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"text": "t"},
        {"input_ids": [1, 2]},
    ):
        assert unused({**row, **notes}) == counted
        assert unused(row) == {}


def test_columns_that_are_used_are_not_counted() -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]], "tools": "[]"}
    assert unused({**row, "functions": None, "chat_template_kwargs": "{}"}) == {}
    assert unused({"input_ids": [1], "labels": [1], "attention_mask": [1], "loss_mask": [1], "weights": [1]}) == {}
    assert unused({**CHAT, "label": True}) == {} and unused({**CHAT, "label": 1}) == {}


def test_columns_that_lose_are_counted() -> None:
    with_system = {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}
    assert unused({**with_system, "system": "t"}) == {"column 'system'": Unused(1, 1, '"t"', False)}
    assert unused({**with_system, "system": "s", "system_prompt": "s"}) == {}
    assert list(unused({**CHAT, "system": "s", "system_prompt": "t"})) == ["column 'system_prompt'"]
    both = {"instruction": "q", "output": "a", "response": "b", "text": "t"}
    assert list(unused(both)) == ["column 'response'", "column 'text'"]
    assert list(unused({**CHAT, "prompt": "q", "history": [["q", "a"]]})) == ["column 'prompt'", "column 'history'"]
    listed = {"prompt": [USER], "completion": "a", "history": [["q", "a"]], "context": "x", "reasoning": "t"}
    assert list(unused(listed)) == ["column 'history'", "column 'context'", "column 'reasoning'"]
    assert list(unused({"text": "t", "label": False, "rejected": "x"})) == ["column 'label'", "column 'rejected'"]
    renamed = unused({"q": "q", "question": "x", "answer": "a"}, columns={"question": "q"})
    assert renamed == {"column 'question'": Unused(1, 1, '"x"', False)}
    turns = {"messages": [{"role": "user", "text": "q", "content": "x"}, {"role": "assistant", "text": "a"}]}
    assert list(unused(turns, columns={"content": "text"})) == ["'content' of messages"]


def test_keys_of_messages_and_parts() -> None:
    turns = [
        {**USER, "mood": "good", "id": 1},
        {"role": "assistant", "content": [{"type": "text", "text": "a", "note": "xy"}], "mood": {"x": 1}, "id": "b"},
    ]
    assert unused({"messages": turns}) == {
        "'mood' of messages": Unused(1, 4 + 8, '"good"', False),
        "'id' of messages": Unused(1, 2, "1", True),
        "'note' of content parts": Unused(1, 2, '"xy"', False),
    }


def test_a_record_is_one_by_name_and_value() -> None:
    for name in ("id", "prompt_id", "conversationId", "uuid", "source", "dataset", "category", "hash", "sha256"):
        assert is_record_name(name)
    for name in ("md5", "url", "score", "helpful_score", "timestamp", "date", "language", "split", "index", "license"):
        assert is_record_name(name)
    for name in ("model", "num_turns", "createdAt", "_id", "sha1", "token_count", "model_name", "type"):
        assert is_record_name(name)
    for name in ("notes", "solution", "label", "rationale", "idea", "valid", "title", "answer_key", "task", "text"):
        assert not is_record_name(name)
    for name in ("kto_tag", "has_answer", "answer_type", "prompt_length", "is_safe", "is_correct", "provided"):
        assert not is_record_name(name)
    for value in (7, 0.5, True, "x" * 100):
        assert unused({**CHAT, "source": value})["column 'source'"].is_record
    for value in ("x" * 101, "two\nlines", ["x"], {"x": 1}):
        assert not unused({**CHAT, "source": value})["column 'source'"].is_record


def test_size_and_example_of_other_values() -> None:
    row = {**CHAT, "numbers": [0.25] * 1000, "words": ["ab"] * 100, "object": {"a": None}, "bytes": b"x"}
    counted = unused(row)
    assert counted["column 'numbers'"].characters == 1000
    assert counted["column 'words'"].characters == len(json.dumps(row["words"]))
    assert counted["column 'object'"] == Unused(1, 11, '{"a": null}', False)
    assert counted["column 'bytes'"] == Unused(1, 9, '"<bytes>"', False)
    assert all(len(value.example) <= 80 for value in counted.values())


def test_characters_of_a_row() -> None:
    assert parse_row({"text": "abc", "id": 12, "none": None}).characters == 5
    assert parse_row({"instruction": "ab", "input": "", "output": "c"}).characters == 3
    assert parse_row({**CHAT, "meta": {"a": 1}}).characters == len("userqassistanta") + len('{"a": 1}')
    assert parse_row({"input_ids": [10, 11, 12]}).characters == 3
    calls = [{"name": "f", "arguments": {"x": 1}}]
    row = {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}
    assert parse_row(row).characters == len("userqassistant") + len("f") + len('{"x": 1}')
    assert count_characters({"a": [], "b": [None], "c": [[1]], "d": [{"x": 1}, 2], "e": True}) == 6 + 5 + 13 + 4


@pytest.mark.parametrize("text", ["\ud83d", "\n\x1b[2J", "\u2028"])
def test_whatever_a_name_or_value_holds_can_be_printed(text: str) -> None:
    row = {**CHAT, f"a{text}": f"b{text}", "list": [text], "object": {text: text}}
    row["messages"] = [{**USER, text: text}, ASSISTANT]
    for name, value in unused(row).items():
        for shown in (name, value.example):
            assert shown.isprintable() and shown.encode()
    assert unused({**CHAT, "x": "\ud83d"})["column 'x'"].example == '"\\ud83d"'


def test_long_names_are_shortened() -> None:
    (name,) = unused({**CHAT, "x" * 1000: 1})
    assert len(name) < 100


def test_columns_that_the_template_reads_are_its_variables() -> None:
    reads = TemplateReads(
        variables=frozenset({"persona", "documents", "text", "bos_token", "tools", "context", "quiet"})
    )
    row = {**CHAT, "persona": "kind", "documents": [{"x": None}], "text": "t", "bos_token": "x", "context": "c"}
    parsed = conversation({**row, "quiet": None, "other": "o"}, reads=reads)
    assert parsed.variables == {"persona": "kind", "documents": [{"x": None}], "context": "c"}
    assert list(dict(parsed.unused)) == ["column 'text'", "column 'bos_token'", "column 'other'"]


def test_chat_template_kwargs_go_before_columns() -> None:
    reads = TemplateReads(variables=frozenset({"persona", "mood"}))
    row = {
        **CHAT,
        "persona": "kind",
        "mood": "good",
        "chat_template_kwargs": {"persona": "wise", "mood": "good", "x": 1},
    }
    parsed = conversation(row, reads=reads)
    assert parsed.variables == {"persona": "wise", "mood": "good", "x": 1}
    assert list(dict(parsed.unused)) == ["column 'persona'", "'x' of chat_template_kwargs"]


PAIRS = [
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "response": "a"},
    {"prompt": "q", "completion": "a"},
    {"query": "q", "response": "a"},
    {"question": "q", "answer": "a"},
]


@pytest.mark.parametrize("pair", PAIRS)
def test_context_system_prompt_and_reasoning_beside_question_and_answer(pair: dict[str, Any]) -> None:
    parsed = conversation({**pair, "context": "x"})
    assert parsed.messages == [{"role": "user", "content": "q\nx"}, ASSISTANT]
    assert (parsed.unused, parsed.remarks) == ((), (JOINED_CONTEXT,))
    for column in ("system", "system_prompt", "system_message"):
        parsed = conversation({**pair, column: "s"})
        assert (parsed.messages, parsed.unused) == ([{"role": "system", "content": "s"}, USER, ASSISTANT], ())
    for column in ("reasoning", "reasoning_content", "thinking"):
        parsed = conversation({**pair, column: "t"})
        answer = {**ASSISTANT, "reasoning_content": "t", "thinking": "t"}
        assert (parsed.messages, parsed.unused, parsed.remarks) == ([USER, answer], (), ())
    empty = {"context": "", "system_prompt": None, "system_message": "", "reasoning": "", "thinking": None}
    assert conversation({**pair, **empty}) == conversation(pair)
    others = {"context": {"title": "x"}, "system_prompt": 7, "thinking": True, "reasoning": ["t"]}
    parsed = conversation({**pair, **others})
    assert parsed.messages == [USER, ASSISTANT]
    assert list(dict(parsed.unused)) == [f"column '{name}'" for name in others]


def test_input_and_context_and_history() -> None:
    row = {"instruction": "q", "input": "i", "context": "c", "output": "a", "history": [["p", "b"]], "reasoning": "t"}
    assert [message["content"] for message in conversation(row).messages] == ["p", "b", "q\ni\nc", "a"]
    assert conversation(row).messages[3]["thinking"] == "t" and "thinking" not in conversation(row).messages[1]
    assert (
        conversation(
            {"q": "q", "a": "a", "passage": "c"}, columns={"question": "q", "answer": "a", "context": "passage"}
        ).messages[0]["content"]
        == "q\nc"
    )


def test_a_second_reasoning_is_counted() -> None:
    row = {"question": "q", "answer": "a", "reasoning": "t", "thinking": "u"}
    parsed = conversation(row)
    assert parsed.messages[1]["thinking"] == "t" and list(dict(parsed.unused)) == ["column 'thinking'"]


def test_a_label_that_is_a_class_is_counted() -> None:
    for value in (2, "good", -1, 0.5):
        assert list(unused({**CHAT, "label": value})) == ["column 'label'"]
    assert list(unused({"question": "q", "answer": "a", "label": 0})) == ["column 'label'"]
    for nothing in ("", [], None, {}):
        assert unused({**CHAT, "rejected": nothing, "chosen": nothing}) == {}
    assert list(unused({**CHAT, "chosen": True})) == ["column 'chosen'"]


ALPACA = Path(__file__).parents[3] / "shared" / "data" / "instruct" / "alpaca_en_demo.json"


@pytest.mark.skipif(not ALPACA.is_file(), reason="needs the shared data folder")
def test_nothing_of_an_ordinary_file_is_unused() -> None:
    rows = json.loads(ALPACA.read_text(encoding="utf-8"))
    parsed = [conversation(row) for row in rows]
    assert {row.unused for row in parsed} == {()} and {row.remarks for row in parsed} == {()}
    assert sum(row.characters for row in parsed) == sum(len(value) for row in rows for value in row.values())


def test_an_ordinary_row_takes_microseconds() -> None:
    row = {"messages": [USER, ASSISTANT] * 2}
    assert min(timeit.repeat(lambda: parse_row(row), number=200, repeat=5)) / 200 < 100e-6


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_of_other_turns_is_counted(key: str) -> None:
    for role in ("user", "system", "tool"):
        turn = {"role": role, "content": "x", key: "hm"}
        turns = [turn, ASSISTANT] if role == "user" else [USER, ASSISTANT, turn]
        row = {"messages": [turn, USER, ASSISTANT] if role == "system" else turns}
        parsed = conversation(row)
        assert dict(parsed.unused) == {f"'{key}' of messages": Unused(1, 2, '"hm"', False)}
        assert all(message.keys() == {"role", "content"} for message in parsed.messages)
        reads = TemplateReads(message_keys=frozenset({key}))
        assert conversation(row, reads=reads) == parsed
        assert conversation(row, reads=TemplateReads(whole_messages=True)).unused == ()
    assert unused({"messages": [USER, {**ASSISTANT, key: "hm"}]}) == {}


def test_thinking_parts_of_a_user_turn_are_counted() -> None:
    for kind in ("thinking", "reasoning"):
        parts = [{"type": kind, kind: "hm"}, {"type": "text", "text": "q"}]
        parsed = conversation({"messages": [{**USER, "content": parts}, ASSISTANT]})
        assert parsed.messages == [USER, ASSISTANT]
        assert dict(parsed.unused) == {f"'{kind}' of content parts": Unused(1, 2, '"hm"', False)}


def test_other_keys_of_train_detail_are_counted() -> None:
    detail = {"begin_offset": 0, "end_offset": 0, "train": True, "why": "good", "none": None}
    counted = unused({"messages": [USER, {**ASSISTANT, "train_detail": [detail]}]})
    assert counted == {"'why' of train_detail": Unused(1, 4, '"good"', False)}
