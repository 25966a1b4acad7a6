import json
from typing import Any

import pytest
from support import BAD_MESSAGES, CALL, USER, assistant

from accel_llm.chat.messages import READS_NOTHING, check_order, read_messages
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.tools import read_tools
from accel_llm.chat.values import (
    ASSISTANT_FIRST,
    BROKEN_TOOLS,
    NO_ANSWER,
    NOT_JSON,
    TOOL_OUT_OF_PLACE,
    TWO_ASSISTANT_TURNS,
    TWO_USER_TURNS,
    Findings,
)
from accel_llm.errors import DataError

ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("role", "read"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("human", "user"),
        ("assistant", "assistant"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function", "tool"),
        ("tool_response", "tool"),
        ("function_response", "tool"),
        *(("prompter", "user"), ("chatgpt", "assistant"), ("bing", "assistant"), ("bard", "assistant")),
        *(("chatbot", "assistant"), ("ai", "assistant"), ("ipython", "tool"), ("environment", "tool")),
        *(("tool_result", "tool"), ("tool_results", "tool"), ("tool_output", "tool"), ("function_result", "tool")),
        *(("USER", "user"), ("Assistant", "assistant")),
    ],
)
def test_every_role_under_both_names_of_the_fields(role: str, read: str) -> None:
    assert read_messages([{"role": role, "content": "x"}], "messages") == [{"role": read, "content": "x"}]
    assert read_messages([{"from": role, "value": "x"}], "messages") == [{"role": read, "content": "x"}]
    filled = {"role": None, "content": None, "from": role, "value": "x", "tool_calls": None, "name": None}
    assert read_messages([filled], "messages") == [{"role": read, "content": "x"}]


GOOD: dict[str, tuple[list[Any], list[Any]]] = {
    "an empty question": ([{"role": "user", "content": ""}], [{"role": "user", "content": ""}]),
    "an empty system prompt is dropped": ([{"role": "system", "content": ""}, USER], [USER]),
    "whitespace stays": ([assistant(content=" a\n")], [assistant(content=" a\n")]),
    "thinking in the text stays": ([assistant(content="<think>t</think>a")], [assistant(content="<think>t</think>a")]),
    "an unknown field is left out": ([{**USER, "timestamp": 7}], [USER]),
    "human and assistant": ([{"human": "q", "assistant": "a"}], [USER, ASSISTANT]),
    "reasoning_content": ([assistant(reasoning_content="t")], [assistant(reasoning_content="t", thinking="t")]),
    "thinking": ([assistant(thinking="t")], [assistant(reasoning_content="t", thinking="t")]),
    "reasoning": ([assistant(reasoning="t")], [assistant(reasoning_content="t", thinking="t")]),
    "the same reasoning twice": (
        [assistant(reasoning="t", thinking="t")],
        [assistant(reasoning_content="t", thinking="t")],
    ),
    "an empty reasoning is dropped": ([assistant(reasoning_content="", thinking=None)], [ASSISTANT]),
    "typed parts": (
        [
            {"role": "user", "content": [{"type": "text", "text": "q", "image": None}, {"type": "text", "value": "2"}]},
            assistant(content=[{"type": "reasoning", "value": "t"}, {"type": "text", "text": "a"}]),
        ],
        [{"role": "user", "content": "q2"}, assistant(reasoning_content="t", thinking="t")],
    ),
    "parts of thinking and calls": (
        [
            assistant(
                content=[
                    {"type": "thinking", "thinking": "t"},
                    {"type": "tool_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                ]
            )
        ],
        [assistant(content="", reasoning_content="t", thinking="t", tool_calls=[CALL])],
    ),
    "calls without text": ([assistant(content=None, tool_calls=[CALL])], [assistant(content="", tool_calls=[CALL])]),
    "calls without content": (
        [{"role": "assistant", "tool_calls": [CALL]}],
        [assistant(content="", tool_calls=[CALL])],
    ),
    "calls with text": ([assistant(tool_calls=[CALL])], [assistant(tool_calls=[CALL])]),
    "calls as JSON text": ([assistant(tool_calls=json.dumps([CALL]))], [assistant(tool_calls=[CALL])]),
    "no calls": ([assistant(tool_calls=[])], [ASSISTANT]),
    "calls without the wrapping": (
        [assistant(tool_calls=[{"name": "add", "arguments": {"x": 1}}])],
        [assistant(tool_calls=[CALL])],
    ),
    "a call's id and its result": (
        [
            assistant(tool_calls=[{"id": "c1", "index": 0, **CALL}]),
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        ],
        [
            assistant(tool_calls=[{"id": "c1", **CALL}]),
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        ],
    ),
    "arguments as JSON text": (
        [assistant(tool_calls=[{"function": {"name": "add", "arguments": '{"x": 1}'}}])],
        [assistant(tool_calls=[CALL])],
    ),
    "arguments that are no JSON object stay text": (
        [assistant(tool_calls=[{"name": "f", "arguments": "[1]"}, {"name": "f", "arguments": "{x"}])],
        [
            assistant(
                tool_calls=[
                    {"type": "function", "function": {"name": "f", "arguments": "[1]"}},
                    {"type": "function", "function": {"name": "f", "arguments": "{x"}},
                ]
            )
        ],
    ),
    "no arguments": (
        [assistant(tool_calls=[{"name": "f"}, {"name": "f", "arguments": None}, {"name": "f", "arguments": ""}])],
        [assistant(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}] * 3)],
    ),
    "the older function_call": (
        [assistant(content=None, function_call={"name": "add", "arguments": '{"x": 1}'})],
        [assistant(content="", tool_calls=[CALL])],
    ),
    "calls as turns": (
        [{"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}],
        [assistant(content="", tool_calls=[CALL])],
    ),
    "a list of calls in one turn": (
        [{"from": "function_call", "value": json.dumps([{"name": "add", "arguments": {"x": 1}}] * 2)}],
        [assistant(content="", tool_calls=[CALL, CALL])],
    ),
    "calls that follow an answer or a call belong to it": (
        [
            assistant(content="let me see"),
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"x": 1}}'},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"x": 1}}'},
        ],
        [assistant(content="let me see", tool_calls=[CALL, CALL])],
    ),
    "a call does not join what is weighed otherwise": (
        [assistant(train=False), {"role": "tool_call", "content": '{"name": "add", "arguments": {"x": 1}}'}],
        [assistant(train=False), assistant(content="", tool_calls=[CALL])],
    ),
    "train false": (
        [{**USER, "train": False}, assistant(train=False)],
        [{**USER, "train": False}, assistant(train=False)],
    ),
    "train true": ([assistant(train=True)], [ASSISTANT]),
    "train 0": ([assistant(train=0)], [assistant(train=False)]),
    "weight": ([assistant(weight=0.5)], [assistant(weight=0.5)]),
    "a whole weight": ([assistant(weight=2)], [assistant(weight=2.0)]),
    "weight 1": ([assistant(weight=1)], [ASSISTANT]),
    "weight 0": ([assistant(weight=0)], [assistant(train=False)]),
    "loss_weight": ([assistant(loss_weight=0.5, weight=None)], [assistant(weight=0.5)]),
    "weight of what is not trained": ([assistant(weight=0.5, train=False)], [assistant(train=False)]),
    "weight of what is trained": ([assistant(weight=0.5, train=True)], [assistant(weight=0.5)]),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_messages(case: str) -> None:
    turns, messages = GOOD[case]
    before = json.dumps(turns)
    assert read_messages(turns, "messages") == messages
    assert json.dumps(turns) == before


def test_messages_may_be_json_text() -> None:
    assert read_messages(json.dumps([USER, ASSISTANT]), "messages") == [USER, ASSISTANT]


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_are_reported_in_one_sentence(case: str) -> None:
    turns, sentence, reason = BAD_MESSAGES[case]
    with pytest.raises(DataError) as caught:
        read_messages(turns, "messages")
    assert (str(caught.value), caught.value.reason) == (sentence, reason)


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"]
)
def test_no_kind_of_media_is_taken_for_text(kind: str) -> None:
    with pytest.raises(DataError) as caught:
        read_messages([{"role": "user", "content": [{"type": kind, "text": "x"}]}], "messages")
    assert caught.value.reason == "images"


def read(turn: dict[str, Any], reads: TemplateReads = READS_NOTHING) -> tuple[list[Any], dict[str, list[Any]]]:
    findings = Findings()
    return read_messages([turn], "messages", reads, findings=findings), findings.unused


def test_keys_that_the_template_reads_are_kept_as_they_are() -> None:
    turn = {**USER, "citations": [1], "flag": False, "empty": "", "null": None, "mood": {"x": None}}
    everything = {key: value for key, value in turn.items() if value is not None}
    assert read(turn, TemplateReads(message_keys=frozenset({"flag", "empty", "mood", "null"}))) == (
        [{**USER, "flag": False, "empty": "", "mood": {"x": None}}],
        {"'citations' of messages": [[1]]},
    )
    assert read(turn, TemplateReads(whole_messages=True)) == ([everything], {})
    assert read(turn) == (
        [USER],
        {"'citations' of messages": [[1]], "'flag' of messages": [False], "'mood' of messages": [{"x": None}]},
    )


def test_the_template_of_olmo_reads_the_functions_of_the_system_message_itself() -> None:
    turn = {"role": "system", "content": "", "functions": "[]"}
    assert read(turn, TemplateReads(message_keys=frozenset({"functions"}))) == ([turn], {})
    assert read(turn) == ([], {})


def test_names_and_ids_are_used_if_the_template_reads_them() -> None:
    turn = {"role": "tool", "content": "1", "name": "add", "tool_call_id": "c"}
    assert read(turn) == ([turn], {"'name' of messages": ["add"], "'tool_call_id' of messages": ["c"]})
    assert read(turn, TemplateReads(message_keys=frozenset({"name"}))) == (
        [turn],
        {"'tool_call_id' of messages": ["c"]},
    )
    assert read(turn, TemplateReads(whole_messages=True)) == ([turn], {})


def test_a_second_spelling_that_loses_is_counted() -> None:
    both = {"role": "user", "from": "human", "content": "q", "value": "q"}
    assert read(both) == ([USER], {})
    assert read({**both, "from": "gpt", "value": "x"}) == (
        [USER],
        {"'from' of messages": ["gpt"], "'value' of messages": ["x"]},
    )
    assert read({"role": "", "from": "human", "content": "", "value": "q"}) == ([USER], {})
    parts = [{"type": "text", "text": "q", "value": "q2", "cache_control": {"type": "x"}, "citations": None}]
    assert read({"role": "user", "content": parts}) == (
        [USER],
        {"'value' of content parts": ["q2"], "'cache_control' of content parts": [{"type": "x"}]},
    )


def test_a_part_may_have_its_text_under_other_keys() -> None:
    for key in ("text", "value", "content"):
        assert read({"role": "user", "content": [{"type": "text", key: "q", "text ": ""}]}) == ([USER], {})
    assert read({"role": "user", "content": [{"type": "text", "text": "", "content": None}]}) == (
        [{"role": "user", "content": ""}],
        {},
    )


def test_other_keys_of_a_pair_are_read_as_those_of_its_answer() -> None:
    turn = {"human": "q", "assistant": "a", "reasoning": "t", "source": "x", "train": False}
    answer = {**ASSISTANT, "reasoning_content": "t", "thinking": "t", "train": False}
    assert read(turn) == ([USER, answer], {"'source' of messages": ["x"]})


def test_halves_of_characters_do_not_stop_an_error_message() -> None:
    for turn in ({"role": "\ud83d", "content": "x"}, {"role": "user", "a\ud83d\n": 1}):
        with pytest.raises(DataError) as caught:
            read_messages([turn], "messages")
        assert str(caught.value).encode().isascii() and "\\ud83d" in str(caught.value)


SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "1"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [SYSTEM, USER, ASSISTANT, USER],
        [SYSTEM, SYSTEM, USER, SYSTEM, ASSISTANT],
        [USER, CALLS, TOOL, TOOL, ASSISTANT, USER, CALLS],
        [USER, ASSISTANT, TOOL, USER, ASSISTANT],
        [USER, {**ASSISTANT, "train": False}],
    ],
)
def test_orders_that_are_right(messages: list[Any]) -> None:
    check_order(messages)


@pytest.mark.parametrize(
    ("messages", "sentence", "reason"),
    [
        ([USER, USER, ASSISTANT], "order: two user turns in a row; turns must alternate", TWO_USER_TURNS),
        ([USER, SYSTEM, USER], "order: two user turns in a row; turns must alternate", TWO_USER_TURNS),
        (
            [USER, ASSISTANT, ASSISTANT],
            "order: two assistant turns in a row; turns must alternate",
            TWO_ASSISTANT_TURNS,
        ),
        (
            [USER, CALLS, ASSISTANT],
            "order: two assistant turns in a row; turns must alternate",
            TWO_ASSISTANT_TURNS,
        ),
        (
            [SYSTEM, ASSISTANT, USER],
            "order: an assistant turn opens the conversation; a user turn must be first",
            ASSISTANT_FIRST,
        ),
        (
            [USER, TOOL, ASSISTANT],
            "order: a tool turn after a user turn; it must follow an assistant turn",
            TOOL_OUT_OF_PLACE,
        ),
        (
            [SYSTEM, TOOL],
            "order: a tool turn opens the conversation; it must follow an assistant turn",
            TOOL_OUT_OF_PLACE,
        ),
        ([SYSTEM, USER], "order: no assistant turn to train on", NO_ANSWER),
        ([], "order: no assistant turn to train on", NO_ANSWER),
    ],
)
def test_orders_that_are_wrong(messages: list[Any], sentence: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        check_order(messages)
    assert (str(caught.value), caught.value.reason) == (sentence, reason)


TOOL_SCHEMA = {"name": "add", "parameters": {}}
WRAPPED = {"type": "function", "function": TOOL_SCHEMA}


@pytest.mark.parametrize(
    "tools",
    [[TOOL_SCHEMA], [WRAPPED], json.dumps([TOOL_SCHEMA]), [json.dumps(WRAPPED)]],
)
def test_tools_in_every_spelling(tools: Any) -> None:
    assert read_tools(tools) == [WRAPPED]


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_no_tools(tools: Any) -> None:
    assert read_tools(tools) is None


@pytest.mark.parametrize(
    ("tools", "sentence", "reason"),
    [
        ({"name": "add"}, 'tools: found {"name": "add"}; needs a list of JSON schemas', BROKEN_TOOLS),
        ("7", "tools: found 7; needs a list of JSON schemas", BROKEN_TOOLS),
        ([TOOL_SCHEMA, None], "tools[1]: found null; needs a JSON schema", BROKEN_TOOLS),
        (
            "add(x)",
            'tools: found "add(x)", which is not JSON (Expecting value: line 1 column 1 (char 0))',
            NOT_JSON,
        ),
        (
            ["add(x)"],
            'tools[0]: found "add(x)", which is not JSON (Expecting value: line 1 column 1 (char 0))',
            NOT_JSON,
        ),
    ],
)
def test_broken_tools(tools: Any, sentence: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read_tools(tools)
    assert (str(caught.value), caught.value.reason) == (sentence, reason)


def test_long_values_and_many_keys_are_shortened_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        read_messages(
            [{"role": "user", "content": ["x" * 10_000], **{f"key {n}\n": n for n in range(100)}}], "messages"
        )
    assert len(str(caught.value)) < 200
    with pytest.raises(DataError) as caught:
        read_messages([{"role": "user", **{f"key {n}\n": n for n in range(100)}}], "messages")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_json_nested_beyond_all_bounds_is_a_bad_row() -> None:
    with pytest.raises(DataError) as caught:
        read_messages("[" * 200_000, "messages")
    assert caught.value.reason == NOT_JSON


def test_xtuner_writes_question_and_answer_in_one_item() -> None:
    turns = [
        {"system": "s", "input": "q", "output": "a"},
        {"input": "q", "output": "b", "output_with_loss": False, "mood": "good"},
        {"system": "", "input": "q", "output": "a", "output_with_loss": True},
    ]
    findings = Findings()
    answers = [ASSISTANT, {"role": "assistant", "content": "b", "train": False}, ASSISTANT]
    expected = [{"role": "system", "content": "s"}, *(turn for answer in answers for turn in (USER, answer))]
    assert read_messages(turns, "conversation", findings=findings) == expected
    assert findings.unused == {"'mood' of messages": ["good"]}
    with pytest.raises(DataError, match=r"^conversation\[0\]\.output_with_loss: found 2; allowed: true and false"):
        read_messages([{"input": "q", "output": "a", "output_with_loss": 2}], "conversation")
    with pytest.raises(DataError, match=r"^conversation\[0\]\.system: found 5; needs text"):
        read_messages([{"system": 5, "input": "q", "output": "a"}], "conversation")
