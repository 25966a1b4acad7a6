import json
from typing import Any

import pytest
from support import CALL, USER, assistant

from accel_llm.chat.messages import read_messages
from accel_llm.chat.nulls import clear_arguments, clear_tool, has_nulls
from accel_llm.chat.tool_calls import ROUNDED
from accel_llm.chat.tools import FLAT_PARAMETERS, NULL_ARGUMENTS, NULL_DEFINITIONS, read_tools
from accel_llm.chat.values import Findings
from accel_llm.data.formats import Conversation, parse_row
from accel_llm.errors import DataError

FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOL = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "get"}}
ANSWER = {"role": "assistant", "content": "a"}


def conversation(row: dict[str, Any]) -> Conversation:
    parsed = parse_row({"messages": [USER, ANSWER], **row})
    assert isinstance(parsed, Conversation)
    return parsed


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(**fields: Any) -> list[dict[str, Any]]:
    (message,) = read_messages([assistant(**fields)], "messages")
    return message.get("tool_calls", [])


@pytest.mark.parametrize(
    "tools",
    [
        [FUNCTION],
        [TOOL],
        json.dumps([TOOL]),
        json.dumps(json.dumps([TOOL])),
        [json.dumps(TOOL)],
        json.dumps([json.dumps(FUNCTION)]),
        [{"type": "function", "function": json.dumps(FUNCTION)}],
        [{"type": "function", "function": json.dumps(json.dumps(FUNCTION))}],
        [{"name": "add", "parameters": json.dumps(FUNCTION["parameters"])}],
        [{"type": "function", "function": {**FUNCTION, "parameters": json.dumps(json.dumps(FUNCTION["parameters"]))}}],
        [{"type": "function", **FUNCTION}],
        [{"function": None, "type": "function", **FUNCTION}],
    ],
)
def test_one_tool_in_every_spelling(tools: Any) -> None:
    assert read_tools(tools) == [TOOL]


@pytest.mark.parametrize("nothing", [None, "", " ", "\n", "[]", [], [None], "null", '"[]"', [""], "[null]", {}])
def test_tools_that_are_none(nothing: Any) -> None:
    assert read_tools(nothing) is None
    assert conversation({"tools": nothing}) == conversation({})._replace(
        characters=conversation({"tools": nothing}).characters
    )


def test_parameters_that_are_no_object_stay_text() -> None:
    for text in ("none", "[1]", '"x"', ""):
        assert read_tools([{"name": "add", "parameters": text}]) == [
            {"type": "function", "function": {"name": "add", "parameters": text}}
        ]


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        ([{"function": "add"}], 'tools[0].function: found "add", which is not JSON (Expecting value: line 1 column 1'),
        (
            [{"type": "function", "function": None}],
            'tools[0]: found {"type": "function", "function": {}}; needs a JSON schema',
        ),
        ([TOOL, None], "tools[1]: found null; needs a JSON schema"),
        ([7], "tools[0]: found 7; needs a JSON schema"),
    ],
)
def test_broken_tools(tools: Any, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        read_tools(tools)
    assert str(caught.value).startswith(sentence)


def test_functions_of_the_row_are_tools() -> None:
    assert conversation({"functions": [FUNCTION]}).tools == [TOOL]
    assert conversation({"functions": json.dumps([FUNCTION]), "tools": " "}).tools == [TOOL]


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("value", [[FUNCTION], json.dumps([TOOL]), json.dumps(json.dumps([TOOL]))])
def test_tools_on_the_system_message(key: str, value: Any) -> None:
    for content in ("", None):
        parsed = conversation({"messages": [{"role": "system", "content": content, key: value}, USER, ANSWER]})
        assert (parsed.messages, parsed.tools, parsed.unused) == ([USER, ANSWER], [TOOL], ())
    parsed = conversation({"messages": [{"role": "system", "content": "s", key: value}, USER, ANSWER]})
    assert (parsed.messages[0], parsed.tools) == ({"role": "system", "content": "s"}, [TOOL])


def test_tools_of_several_places_are_joined_and_equal_ones_are_there_once() -> None:
    system = {"role": "system", "content": "s", "tools": [OTHER, TOOL]}
    row = {"messages": [system, USER, ANSWER], "tools": [TOOL], "functions": [FUNCTION, FUNCTION]}
    assert conversation(row).tools == [TOOL, OTHER]


def test_tools_of_other_messages_are_counted() -> None:
    parsed = conversation({"messages": [{**USER, "tools": [TOOL]}, ANSWER]})
    assert parsed.tools is None
    assert [name for name, _ in parsed.unused] == ["'tools' of messages"]


def test_a_broken_tool_of_a_system_message_is_found_by_its_place() -> None:
    with pytest.raises(DataError) as caught:
        conversation({"messages": [{"role": "system", "content": "s", "tools": 7}, USER, ANSWER]})
    assert str(caught.value) == "messages[0].tools: found 7; needs a list of JSON schemas"


@pytest.mark.parametrize(
    "arguments", [{"x": 1}, '{"x": 1}', '"{\\"x\\": 1}"', json.dumps(json.dumps(json.dumps({"x": 1})))]
)
def test_arguments_encoded_any_number_of_times(arguments: Any) -> None:
    assert calls(tool_calls=[call("add", arguments)]) == [CALL]
    assert calls(
        tool_calls=[{"type": "function", "function": json.dumps({"name": "add", "arguments": arguments})}]
    ) == [CALL]
    assert calls(function_call={"name": "add", "arguments": arguments}) == [CALL]


@pytest.mark.parametrize("text", ["[1]", '"x"', "{x", "5", '"[1]"', "null"])
def test_arguments_that_are_no_object_stay_as_they_are(text: str) -> None:
    assert calls(tool_calls=[call("f", text)]) == [call("f", text)]


@pytest.mark.parametrize("key", ["parameters", "input"])
def test_arguments_under_other_names(key: str) -> None:
    assert calls(tool_calls=[{"name": "add", key: {"x": 1}, "arguments": None}]) == [CALL]


@pytest.mark.parametrize(
    "fields",
    [
        {"function_call": {"name": None, "arguments": None}},
        {"function_call": {"name": "", "arguments": ""}},
        {"function_call": " "},
        {"function_call": {}},
        {"tool_calls": [{"id": None, "type": None, "function": {"name": None, "arguments": None}}]},
        {"tool_calls": [{"id": "", "type": "function", "function": {"name": None, "arguments": None}}]},
        {"tool_calls": [None]},
        {"tool_calls": [{"type": "function", "name": None, "arguments": None}]},
        {"tool_calls": " "},
        {"tool_calls": "[]", "function_call": None},
    ],
)
def test_calls_that_are_none(fields: dict[str, Any]) -> None:
    assert read_messages([assistant(**fields)], "messages") == [assistant()]
    assert read_messages([{**USER, **fields}], "messages") == [USER]


def left(**fields: Any) -> dict[str, list[Any]]:
    findings = Findings()
    read_messages([assistant(**fields)], "messages", findings=findings)
    return findings.unused


def test_what_a_call_says_beside_name_and_arguments_is_counted() -> None:
    assert left(tool_calls=[{**CALL, "id": "1", "index": 0}]) == {}
    assert left(tool_calls=[{**CALL, "id": 7, "why": "x", "how": None}]) == {
        "'id' of tool calls": [7],
        "'why' of tool calls": ["x"],
    }
    assert left(tool_calls=[{"name": "f", "arguments": {"x": 1}, "input": {"x": 2}}]) == {
        "'input' of tool calls": [{"x": 2}]
    }
    assert left(tool_calls=[CALL], function_call=CALL["function"]) == {}
    second = {"name": "g", "arguments": "{}"}
    assert left(tool_calls=[CALL], function_call=second) == {"'function_call' of messages": [second]}


SCHEMA = {
    "type": "object",
    "properties": {
        "plain": {"type": "string"},
        "list": {"type": ["string", "null"]},
        "openapi": {"type": "string", "nullable": True},
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "one": {"oneOf": [{"type": "string"}, {"type": "null"}]},
        "enum": {"enum": ["x", None]},
        "reference": {"$ref": "#/$defs/Maybe"},
        "circle": {"$ref": "#/$defs/Circle"},
        "inner": {"type": "object", "properties": {"yes": {"type": "null"}, "no": {"type": "string"}}},
        "items": {"type": "array", "items": {"properties": {"yes": {"nullable": True}}}},
    },
    "$defs": {"Maybe": {"type": ["integer", "null"]}, "Circle": {"$ref": "#/$defs/Circle"}},
}


def test_nulls_stay_where_the_parameters_allow_them() -> None:
    names = ("plain", "list", "openapi", "any", "one", "enum", "reference", "circle", "unknown")
    allowed = ("list", "openapi", "any", "one", "enum", "reference")
    assert clear_arguments(dict.fromkeys(names), SCHEMA) == dict.fromkeys(allowed)
    inner = {
        "inner": {"yes": None, "no": None, "x": 0},
        "items": [{"yes": None, "no": None}, None],
        "other": {"a": None},
    }
    assert clear_arguments(inner, SCHEMA) == {
        "inner": {"yes": None, "x": 0},
        "items": [{"yes": None}, None],
        "other": {},
    }
    for unknown in (None, "text", {}, {"properties": None}, []):
        assert clear_arguments({"x": None, "y": [None], "z": False, "s": ""}, unknown) == {
            "y": [None],
            "z": False,
            "s": "",
        }


def test_parameters_without_the_word_properties() -> None:
    """xLAM's files write each parameter directly."""
    assert clear_arguments({"a": None, "b": None}, {"a": {"type": "str"}, "b": {"nullable": True}}) == {"b": None}


def test_nulls_of_definitions() -> None:
    definition = {
        "name": "f",
        "description": None,
        "parameters": {
            "type": "object",
            "required": ["a", None],
            "properties": {
                "a": {"type": "string", "enum": ["x", None], "default": None, "items": None},
                "b": None,
                "c": {"type": ["string", "null"], "default": None},
                "d": {"anyOf": [{"type": "string", "format": None}, {"type": "null"}], "default": None},
                "default": {"type": "string", "default": None},
                "e": {"type": "object", "default": {"x": None, "y": 1}},
            },
        },
    }
    assert clear_tool(definition) == {
        "name": "f",
        "parameters": {
            "type": "object",
            "required": ["a", None],
            "properties": {
                "a": {"type": "string", "enum": ["x", None], "default": None},
                "c": {"type": ["string", "null"], "default": None},
                "d": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                "default": {"type": "string"},
                "e": {"type": "object", "default": {"y": 1}},
            },
        },
    }


def test_has_nulls() -> None:
    assert has_nulls({"a": None}) and has_nulls([{"a": [{"b": None}]}])
    assert not any(map(has_nulls, [None, [None], {}, {"a": [None]}, "x", {"a": {"b": 0}}]))


def calling(arguments: Any, **row: Any) -> tuple[Any, tuple[str, ...]]:
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call("add", arguments)]}]
    parsed = conversation({"messages": turns, **row})
    return parsed.messages[1]["tool_calls"][0]["function"]["arguments"], parsed.remarks


def test_nulls_that_were_removed_are_said() -> None:
    assert calling({"x": 1, "y": None}) == ({"x": 1}, (f"{NULL_ARGUMENTS}, such as 'y'",))
    assert calling({"x": [{"a": 1, "b": None}], "c": None})[1] == (f"{NULL_ARGUMENTS}, such as 'b'",)
    nullable = {"name": "add", "parameters": {"properties": {"y": {"type": ["integer", "null"]}}}}
    assert calling({"x": 1, "y": None}, tools=[nullable]) == ({"x": 1, "y": None}, ())
    assert calling({"x": 1, "y": [None]}) == ({"x": 1, "y": [None]}, ())
    parsed = conversation({"tools": [{**FUNCTION, "strict": None}]})
    assert (parsed.tools, parsed.remarks) == ([TOOL], (f"{NULL_DEFINITIONS}, such as 'strict'",))


def test_nulls_inside_text_are_not_from_arrow() -> None:
    assert calling('{"x": 1, "y": null}') == ({"x": 1, "y": None}, ())
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call("add", {"y": None})]}]
    parsed = conversation({"messages": json.dumps(turns)})
    assert (parsed.messages[1]["tool_calls"], parsed.remarks) == ([call("add", {"y": None})], ())
    tool = {"name": "add", "strict": None}
    assert conversation({"tools": json.dumps([tool])}).tools == [{"type": "function", "function": tool}]
    spoken = {"from": "function_call", "value": '{"name": "add", "arguments": {"y": null}}'}
    assert read_messages([spoken], "messages")[0]["tool_calls"] == [call("add", {"y": None})]


def test_the_row_keeps_its_nulls() -> None:
    arguments = {"x": 1, "y": None}
    calling(arguments, tools=[{**FUNCTION, "strict": None}])
    assert arguments == {"x": 1, "y": None}


def test_numbers_of_too_many_digits_are_said() -> None:
    for digits in ("0.12345678901234567891", "12345678901234567.5", "1e-400"):
        for arguments in (f'{{"x": {digits}}}', json.dumps(f'{{"x": [{digits}]}}')):
            assert calling(arguments)[1] == (ROUNDED,)
        spoken = {"role": "tool_call", "content": f'{{"name": "f", "arguments": {{"x": {digits}}}}}'}
        assert conversation({"messages": [USER, spoken]}).remarks == (ROUNDED,)
    for digits in ("0.30000000000000004", "0.1", "1.10", "12345678901234567890123", "1e300", "NaN"):
        assert calling(f'{{"x": {digits}}}')[1] == ()
    assert calling("0.12345678901234567891") == ("0.12345678901234567891", ())  # stays text


def test_anthropic_writes_the_parameters_as_input_schema() -> None:
    schema = FUNCTION["parameters"]
    for tool in (
        {"name": "add", "input_schema": schema},
        {"name": "add", "parameters": None, "input_schema": schema},
        {"name": "add", "input_schema": json.dumps(schema)},
    ):
        parsed = conversation({"tools": json.dumps([tool])})
        assert (parsed.tools, parsed.remarks) == ([TOOL], ())
    both = {**FUNCTION, "input_schema": {"type": "object"}}
    assert conversation({"tools": [both]}).tools == [{"type": "function", "function": both}]


def test_a_flat_map_of_arguments_becomes_a_schema() -> None:
    flat = {"city": {"type": "str", "description": "Where"}, "days": {"type": "int, optional", "default": 3}}
    for tools in ([{"name": "f", "parameters": flat}], json.dumps([{"name": "f", "parameters": json.dumps(flat)}])):
        parsed = conversation({"tools": tools})
        function = {"name": "f", "parameters": {"type": "object", "properties": flat}}
        assert (parsed.tools, parsed.remarks) == ([{"type": "function", "function": function}], (FLAT_PARAMETERS,))
    assert read_tools([{"name": "f", "parameters": {"type": {"type": "str"}}}]) == [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {"type": {"type": "str"}}}},
        }
    ]
    for schema in (
        {},
        {"type": "object"},
        {"properties": {"x": {"type": "string"}}},
        {"$ref": "#/x", "$defs": {"x": {"type": "object"}}},
        {"additionalProperties": {"type": "string"}},
        {"city": "text"},
        {"city": {}},
    ):
        tool = {"name": "f", "parameters": schema}
        parsed = conversation({"tools": [tool]})
        assert (parsed.tools, parsed.remarks) == ([{"type": "function", "function": tool}], ())


def test_a_call_joins_the_answer_before_it_if_their_weights_are_equal() -> None:
    spoken = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    both = {**ANSWER, "tool_calls": [call("f", {})]}
    for fields, weight in (
        ({"loss": False}, {"train": False}),
        ({"weight": 0.5}, {"weight": 0.5}),
        ({"loss": True}, {}),
    ):
        assert read_messages([USER, {**ANSWER, **fields}, {**spoken, **fields}], "messages") == [USER, both | weight]
    assert read_messages([USER, ANSWER, {**spoken, "loss": True}], "messages") == [USER, both]
    apart = read_messages([USER, ANSWER, {**spoken, "loss": False}], "messages")
    assert apart == [USER, ANSWER, {"role": "assistant", "content": "", "tool_calls": [call("f", {})], "train": False}]
