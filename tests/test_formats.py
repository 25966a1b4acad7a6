import json
from pathlib import Path

import pytest

from accel_llm.errors import DataError
from accel_llm.formats import conversation_of, messages_of

INSTRUCT = Path(__file__).parents[2] / "shared" / "data" / "instruct"

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
USER_2 = {"role": "user", "content": "q2"}
ASSISTANT_2 = {"role": "assistant", "content": "a2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def turns(*pairs: tuple[str, object]) -> list[dict[str, object]]:
    return [{"from": role, "value": value} for role, value in pairs]


SHAPES = {
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    "messages with empty system": (
        {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]},
        [USER, ASSISTANT],
    ),
    "conversations of role and content": ({"conversations": [USER, ASSISTANT], "id": "7"}, [USER, ASSISTANT]),
    "belle": ({"conversations": turns(("human", "q"), ("assistant", "a"))}, [USER, ASSISTANT]),
    "sharegpt": (
        {"conversations": turns(("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q2"), ("bot", "a2"))},
        [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2],
    ),
    "sharegpt with a system column": (
        {"system": "s", "conversations": turns(("human", "q"), ("gpt", "a"))},
        [SYSTEM, USER, ASSISTANT],
    ),
    "conversation of pairs": (
        {"system": "s", "conversation": [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]},
        [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2],
    ),
    "columns filled with None by a loader": (
        {"messages": None, "conversations": turns(("human", "q"), ("gpt", "a")), "system": None, "tools": None},
        [USER, ASSISTANT],
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, [USER, ASSISTANT]),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "a"},
        [{"role": "user", "content": "q\nx"}, ASSISTANT],
    ),
    "alpaca with system and history": (
        {"instruction": "q2", "input": None, "output": "a2", "system": "s", "history": [["q", "a"]]},
        [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2],
    ),
    "query and response": ({"query": "q", "response": "a", "history": []}, [USER, ASSISTANT]),
    "question and answer": ({"question": "q", "answer": "a"}, [USER, ASSISTANT]),
    "an empty question": (
        {"conversations": turns(("human", ""), ("gpt", "a"))},
        [{"role": "user", "content": ""}, ASSISTANT],
    ),
    "whitespace is kept": (
        {"messages": [USER, {"role": "assistant", "content": " a\n"}]},
        [USER, {"role": "assistant", "content": " a\n"}],
    ),
    "function call and observation": (
        {
            "conversations": turns(
                ("human", "q"),
                ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
                ("observation", "1"),
                ("gpt", "a"),
            )
        },
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ASSISTANT],
    ),
    "tool calls without content": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "typed parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}],
                    "loss_weight": 1.0,
                },
            ]
        },
        [
            {"role": "user", "content": "q", "train": False},
            {"role": "assistant", "content": "a", "reasoning_content": "hm", "train": True},
        ],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes(shape: str) -> None:
    row, messages = SHAPES[shape]
    assert messages_of(row) == messages


def test_the_row_itself_is_left_alone() -> None:
    row = {"system": "s", "messages": [ASSISTANT, USER, ASSISTANT]}
    before = json.dumps(row)
    messages_of(row)
    assert json.dumps(row) == before


def test_an_opening_answer_is_skipped_and_counted() -> None:
    conversation = conversation_of(
        {"conversations": turns(("system", "s"), ("gpt", "lost"), ("human", "q"), ("gpt", "a"))}
    )
    assert conversation.messages == [SYSTEM, USER, ASSISTANT]
    assert conversation.skipped_turns == 1
    assert conversation_of({"messages": [USER, ASSISTANT]}).skipped_turns == 0


def test_tools_are_read_from_text_or_list() -> None:
    tool = {"name": "add", "parameters": {}}
    wrapped = [{"type": "function", "function": tool}]
    row = {"messages": [USER, ASSISTANT]}
    assert conversation_of({**row, "tools": json.dumps([tool])}).tools == wrapped
    assert conversation_of({**row, "tools": wrapped}).tools == wrapped
    for nothing in (None, "", [], "[]"):
        assert conversation_of({**row, "tools": nothing}).tools is None


FAULTS = {
    "unknown shape": (
        {"text": "x", "id": 1},
        r"unknown row shape: its keys: text, id, known shapes are messages .*instruction/output",
    ),
    "half a shape": ({"instruction": "q"}, "unknown row shape: its keys: instruction,"),
    "null messages": ({"messages": None}, r"messages: found null, needs a list .*its keys: messages"),
    "empty messages": ({"messages": []}, r"messages: found \[\]"),
    "a turn that is text": ({"messages": ["hi"]}, r'messages\[0\]: found "hi", needs an object'),
    "unknown role": (
        {"conversations": turns(("narrator", "x"))},
        r'conversations\[0\]\.from: unknown role "narrator", known are system, human',
    ),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\]\.from: unknown role null"),
    "missing content": (
        {"messages": [{"role": "user"}]},
        r"messages\[0\]\.value: missing, needs text \(its keys: role\)",
    ),
    "null content": ({"conversations": turns(("human", None))}, r"conversations\[0\]\.value: found null, needs text"),
    "a number": (
        {"instruction": 7, "output": "a"},
        r"instruction: found 7, needs text \(its keys: instruction, output\)",
    ),
    "a number as system": ({"system": 7, "query": "q", "response": "a"}, "system: found 7, needs text"),
    "an empty answer": (
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        r"messages\[1\]\.content: .*answer is empty",
    ),
    "an empty output": ({"instruction": "q", "output": ""}, "output: the answer is empty"),
    "an empty answer in history": (
        {"query": "q", "response": "a", "history": [["q", ""]]},
        r"history\[0\]\.answer: the answer is empty",
    ),
    "broken history": (
        {"query": "q", "response": "a", "history": [["q"]]},
        r'history\[0\]: found \["q"\], needs a pair',
    ),
    "no answer": ({"messages": [USER]}, "no assistant turn"),
    "only an opening answer": ({"messages": [ASSISTANT]}, "no assistant turn"),
    "two questions": ({"messages": [USER, USER_2, ASSISTANT]}, "two user turns in a row"),
    "two answers": ({"messages": [USER, ASSISTANT, ASSISTANT_2]}, "two assistant turns in a row"),
    "a result nobody asked for": (
        {"messages": [USER, {"role": "tool", "content": "1"}, ASSISTANT]},
        "a tool turn after a user turn",
    ),
    "a call that is not JSON": (
        {"conversations": turns(("human", "q"), ("function_call", "add(1)"))},
        r'found "add\(1\)", which is not JSON',
    ),
    "a call without a name": (
        {"conversations": turns(("human", "q"), ("function_call", "{}"))},
        "needs an object with name and arguments",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "value": "x"}]}]},
        'a part of type "image", allowed: text',
    ),
    "a weight between": (
        {"messages": [USER, {**ASSISTANT, "loss_weight": 0.5}]},
        r"messages\[1\]\.loss_weight: found 0.5, allowed: 0",
    ),
    "tools that are no list": ({"messages": [USER, ASSISTANT], "tools": "{}"}, "tools: found {}, needs a list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_sentence(fault: str) -> None:
    row, sentence = FAULTS[fault]
    with pytest.raises(DataError, match=sentence) as caught:
        conversation_of(row)
    assert "\n" not in str(caught.value)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        messages_of({"messages": "x" * 10_000})
    assert len(str(caught.value)) < 250


# file, rows, messages, rows with tools
COUNTS = [
    ("alpaca_en_demo.json", 999, 1998, 0),
    ("alpaca_zh_demo.json", 1000, 2000, 0),
    ("axolotl_conversation.json", 1, 12, 0),
    ("belle_format_from_sharegpt_zh_100.jsonl", 100, 1300, 0),
    ("belle_readme_conversations.jsonl", 2, 8, 0),
    ("dummy_conversation.json", 500, 2000, 0),
    ("glaive_toolcall_en_demo.json", 300, 1914, 191),
    ("identity.json", 91, 182, 0),
    ("reason_tool_use_demo_50.jsonl", 50, 274, 48),
    ("v1_sft_demo.jsonl", 500, 1000, 0),
    ("ms-swift/alpaca.jsonl", 3, 9, 0),
    ("ms-swift/chatml.jsonl", 3, 11, 0),
    ("ms-swift/conversations.jsonl", 3, 11, 0),
    ("ms-swift/sharegpt.jsonl", 3, 11, 0),
    ("ms-swift/swift_multi.json", 3, 11, 0),
    ("ms-swift/swift_multi.jsonl", 3, 11, 0),
    ("ms-swift/swift_single.jsonl", 3, 7, 0),
]


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize(("name", "rows", "messages", "with_tools"), COUNTS)
def test_real_files(name: str, rows: int, messages: int, with_tools: int) -> None:
    text = (INSTRUCT / name).read_text(encoding="utf-8")
    loaded = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    conversations = [conversation_of(row) for row in (loaded if isinstance(loaded, list) else [loaded])]
    assert len(conversations) == rows
    assert sum(len(conversation.messages) for conversation in conversations) == messages
    assert sum(conversation.tools is not None for conversation in conversations) == with_tools


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason="needs the shared data folder")
def test_a_real_file_with_an_empty_answer() -> None:
    row = json.loads((INSTRUCT / "axolotl_conversation.missingturns.json").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match=r"conversations\[1\]\.value: the assistant's answer is empty"):
        messages_of(row)
