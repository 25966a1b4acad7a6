import copy
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BAD_MESSAGES, ROLES

from accel_llm.chat import values
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.tools import FLAT_PARAMETERS
from accel_llm.chat.values import (
    ASSISTANT_FIRST,
    BAD_TOKENS,
    BROKEN_TOOLS,
    BROKEN_VARIABLES,
    DOUBLED_KEY,
    EMPTY_ANSWER,
    EMPTY_TEXT,
    HUGE_NUMBER,
    IMAGES,
    MISSING_VALUE,
    NO_ANSWER,
    NOT_JSON,
    NOT_MESSAGES,
    NOT_TEXT,
    NOT_TO_LEARN,
    PREFERENCE_ROW,
    SHIFTED_LABELS,
    SUCH_AS,
    TEXT_ONLY,
    TOO_DEEP,
    TOOL_OUT_OF_PLACE,
    TWO_ASSISTANT_TURNS,
    TWO_USER_TURNS,
    UNKNOWN_ROLE,
    UNKNOWN_SHAPE,
)
from accel_llm.config.fields import DataFormat
from accel_llm.data import formats
from accel_llm.data.columns import column_problems
from accel_llm.data.formats import Conversation, Document, TokenizedRow
from accel_llm.errors import ConfigError, DataError

INSTRUCT = Path(__file__).parents[3] / "shared" / "data" / "instruct"

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CONTEXT = {**ASSISTANT, "train": False}
USER_2 = {"role": "user", "content": "q2"}
ASSISTANT_2 = {"role": "assistant", "content": "a2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
KNOWN_SHAPES = (
    "known shapes are messages, conversations or conversation (a list of role/content, from/value or human/assistant), "
    "instruction/output (optional: input), instruction/response, prompt/completion, query/response, question/answer "
    "(optional for all: system, history, context, reasoning), text, response alone, input_ids (optional: labels)"
)


def parse_row(*args: Any, **options: Any) -> Any:
    """Parse a row, without what `test_unused.py` tests: the values that nothing uses, the size, the remarks."""
    return formats.parse_row(*args, **options)._replace(unused=(), characters=0, remarks=())


def conversation(*messages: dict[str, Any]) -> Conversation:
    return Conversation(list(messages), None, {})


def turns(*pairs: tuple[str, object]) -> list[dict[str, object]]:
    return [{"from": role, "value": value} for role, value in pairs]


SHAPES: dict[str, tuple[dict[str, Any], Conversation | Document | TokenizedRow]] = {
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, conversation(SYSTEM, USER, ASSISTANT)),
    "messages as JSON text": ({"messages": json.dumps([USER, ASSISTANT])}, conversation(USER, ASSISTANT)),
    "conversations of role and content": (
        {"conversations": [USER, ASSISTANT], "id": "7"},
        conversation(USER, ASSISTANT),
    ),
    "belle": ({"conversations": turns(("human", "q"), ("assistant", "a"))}, conversation(USER, ASSISTANT)),
    "sharegpt": (
        {"conversations": turns(("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q2"), ("bot", "a2"))},
        conversation(SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2),
    ),
    "sharegpt with a system column": (
        {"system": "s", "conversations": turns(("human", "q"), ("gpt", "a"))},
        conversation(SYSTEM, USER, ASSISTANT),
    ),
    "a system message goes before the system column": (
        {"system": "t", "messages": [SYSTEM, USER, ASSISTANT]},
        conversation(SYSTEM, USER, ASSISTANT),
    ),
    "conversation of pairs": (
        {"system": "s", "conversation": [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]},
        conversation(SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2),
    ),
    "a question at the end": ({"messages": [USER, ASSISTANT, USER_2]}, conversation(USER, ASSISTANT, USER_2)),
    "only context": ({"messages": [USER, CONTEXT]}, conversation(USER, CONTEXT)),
    "columns filled with None by a loader": (
        {"messages": None, "conversations": turns(("human", "q"), ("gpt", "a")), "system": None, "tools": None},
        conversation(USER, ASSISTANT),
    ),
    "function call and observation": (
        {
            "conversations": turns(
                ("human", "q"),
                ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
                ("observation", "1"),
                ("gpt", "a"),
            ),
            "tools": '[{"name": "add", "parameters": {}}]',
        },
        Conversation(
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                ASSISTANT,
            ],
            [TOOL],
            {},
        ),
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, conversation(USER, ASSISTANT)),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "a"},
        conversation({"role": "user", "content": "q\nx"}, ASSISTANT),
    ),
    "alpaca with input alone": (
        {"instruction": "", "input": "q", "output": "a"},
        conversation(USER, ASSISTANT),
    ),
    "alpaca with system and history": (
        {"instruction": "q2", "input": None, "output": "a2", "system": "s", "history": [["q", "a"]]},
        conversation(SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2),
    ),
    "alpaca as Stanford has it, with the whole prompt beside it": (
        {"instruction": "q", "input": "", "output": "a", "text": "Below is an instruction ..."},
        conversation(USER, ASSISTANT),
    ),
    "Dolly": ({"instruction": "q", "context": "", "response": "a"}, conversation(USER, ASSISTANT)),
    "Dolly with a context": (
        {"instruction": "q", "context": "x", "response": "a"},
        conversation({"role": "user", "content": "q\nx"}, ASSISTANT),
    ),
    "instruction and response, where a loader filled output": (
        {"instruction": "q", "output": None, "response": "a"},
        conversation(USER, ASSISTANT),
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, conversation(USER, ASSISTANT)),
    "lists of prompt and completion": (
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        conversation(SYSTEM, USER, ASSISTANT),
    ),
    "the prompt's answers are context, the completion's are trained": (
        {"prompt": [USER, {**ASSISTANT, "weight": 0.5}], "completion": [USER_2, ASSISTANT_2]},
        conversation(USER, CONTEXT, USER_2, ASSISTANT_2),
    ),
    "a list and a text": ({"prompt": [USER], "completion": "a"}, conversation(USER, ASSISTANT)),
    "a text and a list": ({"prompt": "q", "completion": [ASSISTANT]}, conversation(USER, ASSISTANT)),
    "query and response": ({"query": "q", "response": "a", "history": []}, conversation(USER, ASSISTANT)),
    "query and response with history as JSON text": (
        {"query": "q2", "response": "a2", "history": '[["q", "a"]]', "system": ""},
        conversation(USER, ASSISTANT, USER_2, ASSISTANT_2),
    ),
    "question and answer": (
        {"question": "q", "answer": "a", "system": "s"},
        conversation(SYSTEM, USER, ASSISTANT),
    ),
    "an empty question": ({"query": "", "response": "a"}, conversation({"role": "user", "content": ""}, ASSISTANT)),
    "text": ({"text": " t\n", "url": "x", "timestamp": 7}, Document(" t\n")),
    "response alone": ({"response": "t", "system": None}, Document("t")),
    "input_ids": ({"input_ids": [1, 2, 0]}, TokenizedRow([1, 2, 0], [1, 2, 0])),
    "input_ids and labels": (
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1], "text": "t"},
        TokenizedRow([1, 2, 3], [-100, 2, 3]),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes(shape: str) -> None:
    row, parsed = SHAPES[shape]
    before = copy.deepcopy(row)
    result = parse_row(row)
    assert result == parsed and type(result) is type(parsed)
    assert row == before


def test_labels_are_a_copy_of_the_ids() -> None:
    ids = [1, 2, 3]
    tokenized = parse_row({"input_ids": ids})
    assert isinstance(tokenized, TokenizedRow)
    tokenized.labels[0] = tokenized.input_ids[1] = -100
    assert (ids, tokenized) == ([1, 2, 3], TokenizedRow([1, -100, 3], [-100, 2, 3]))


def test_template_variables_of_a_row() -> None:
    row = {"messages": [USER, ASSISTANT]}
    for value in ({"enable_thinking": False, "date": None}, '{"enable_thinking": false}'):
        parsed = parse_row({**row, "chat_template_kwargs": value})
        assert parsed == Conversation([USER, ASSISTANT], None, {"enable_thinking": False})
    for nothing in (None, "", {}, "{}"):
        assert parse_row({**row, "chat_template_kwargs": nothing}) == conversation(USER, ASSISTANT)


FORMS: dict[DataFormat, dict[str, Any]] = {
    "messages": {"conversations": turns(("human", "q"), ("gpt", "a"))},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "query_response": {"query": "q", "response": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "text": {"text": "t"},
    "tokenized": {"input_ids": [1]},
}
EVERYTHING = {column: value for form in FORMS.values() for column, value in form.items()}


@pytest.mark.parametrize("data_format", get_args(DataFormat))
def test_data_format_chooses_among_the_shapes_of_a_row(data_format: DataFormat) -> None:
    alone = parse_row(FORMS[data_format])
    assert parse_row(EVERYTHING, data_format) == alone
    assert parse_row({**EVERYTHING, **dict.fromkeys(EVERYTHING), **FORMS[data_format]}) == alone


NEEDED = {
    "messages": "messages or conversations or conversation",
    "alpaca": "instruction and output or instruction and response",
    "prompt_completion": "prompt and completion",
    "query_response": "query and response",
    "question_answer": "question and answer",
    "text": "text",
    "tokenized": "input_ids",
}


@pytest.mark.parametrize("data_format", get_args(DataFormat))
def test_a_row_without_the_columns_of_data_format(data_format: DataFormat) -> None:
    with pytest.raises(DataError) as caught:
        parse_row({"id": 7}, data_format)
    sentence = f"data_format {data_format}: the row has no {NEEDED[data_format]} (its keys: id)"
    assert (str(caught.value), caught.value.reason) == (sentence, MISSING_VALUE)


def test_columns_name_the_columns_of_a_row() -> None:
    row = {"q": "q", "a": "a", "context": "x", "role_play": "s", "output": "something else"}
    columns = {"instruction": "q", "output": "a", "input": "context", "system": "role_play"}
    expected = conversation(SYSTEM, {"role": "user", "content": "q\nx"}, ASSISTANT)
    assert parse_row(row, None, columns) == expected
    assert parse_row(row, "alpaca", columns) == expected
    assert parse_row({"content": "t"}, "text", {"text": "content"}) == Document("t")
    assert parse_row({"tokens": [1]}, columns={"input_ids": "tokens"}) == TokenizedRow([1], [1])
    swapped = parse_row({"query": "a", "response": "q"}, columns={"query": "response", "response": "query"})
    assert swapped == conversation(USER, ASSISTANT)


def test_columns_name_the_keys_of_messages() -> None:
    dialog = [
        {"speaker": "human", "utterance": "q", "id": 1},
        {"speaker": "bot", "utterance": "a", "keep": False, "why": "t"},
        {"role": "user", "content": "q2"},
    ]
    columns = {
        **{"messages": "dialog", "role": "speaker", "content": "utterance"},
        **{"train": "keep", "reasoning_content": "why"},
    }
    expected = conversation(USER, {**CONTEXT, "reasoning_content": "t", "thinking": "t"}, USER_2)
    for value in (dialog, json.dumps(dialog)):
        assert parse_row({"dialog": value}, None, columns) == expected
    sides = {"prompt": dialog[:1], "completion": [{"speaker": "bot", "utterance": "a"}]}
    assert parse_row(sides, None, {"role": "speaker", "content": "utterance"}) == conversation(USER, ASSISTANT)
    pairs = {"conversation": [{"Q": "q", "A": "a"}]}
    assert parse_row(pairs, None, {"human": "Q", "assistant": "A"}) == conversation(USER, ASSISTANT)


def test_unknown_columns_are_named() -> None:
    assert column_problems({"instruction": "q", "content": "c", "labels": "l"}) == []
    assert column_problems({"instruction": "q", "output": "a"}, "alpaca") == []
    assert column_problems({"query": "q", "input": "x"}, "alpaca") == [
        "columns: query=q, but 'query' is not a field of data_format alpaca; the fields are instruction, input, "
        "output, response, history, context, reasoning, system, tools, functions, chat_template_kwargs."
    ]
    (problem,) = column_problems({"sytem": "s"})
    assert problem.startswith("columns: sytem=s, but 'sytem' is not a field; the fields are messages, conversations, ")
    with pytest.raises(ConfigError) as caught:
        parse_row({"s": "s", "query": "q", "response": "a"}, None, {"sytem": "s"})
    assert caught.value.problems == [problem]


def test_every_media_column_is_refused_by_name_unless_it_is_empty() -> None:
    row = {"messages": [USER, ASSISTANT]}
    for column in ("image", "images", "video", "videos", "audio", "audios"):
        with pytest.raises(DataError) as caught:
            parse_row({**row, column: ["a.png"]})
        assert str(caught.value) == f'{column}: found ["a.png"], but this program trains on text alone'
        assert caught.value.reason == IMAGES
        for nothing in (None, [], ""):
            assert parse_row({**row, column: nothing}) == conversation(USER, ASSISTANT)


ALPACA = "(its keys: instruction, output)"
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no shape": (
        {"title": "x", "id": 1},
        f"unknown row shape: its keys: title, id, {KNOWN_SHAPES}",
        UNKNOWN_SHAPE,
    ),
    "an empty row": ({}, f"unknown row shape: its keys: , {KNOWN_SHAPES}", UNKNOWN_SHAPE),
    "half a shape": (
        {"instruction": "q"},
        f"unknown row shape: its keys: instruction, {KNOWN_SHAPES}",
        UNKNOWN_SHAPE,
    ),
    "a response that is not alone": (
        {"title": "q", "response": "a"},
        f"unknown row shape: its keys: title, response, {KNOWN_SHAPES}",
        UNKNOWN_SHAPE,
    ),
    "null messages": (
        {"messages": None},
        "messages: found null; needs a list of messages that is not empty",
        NOT_MESSAGES,
    ),
    "a missing answer": (
        {"instruction": "q", "output": None},
        f"output: found null; needs text {ALPACA}",
        MISSING_VALUE,
    ),
    "a missing answer beside text": (
        {"instruction": "q", "output": None, "text": "t"},
        "output: found null; needs text (its keys: instruction, output, text)",
        MISSING_VALUE,
    ),
    "a missing question is no plain text": (
        {"query": None, "response": "a"},
        "query: found null; needs text (its keys: query, response)",
        MISSING_VALUE,
    ),
    "all missing": (
        {"prompt": None, "completion": None},
        "prompt: found null; needs text (its keys: prompt, completion)",
        MISSING_VALUE,
    ),
    "a number as question": (
        {"instruction": 7, "output": "a"},
        f"instruction: found 7; needs text {ALPACA}",
        NOT_TEXT,
    ),
    "a number as answer": (
        {"instruction": "q", "output": 3.3},
        f"output: found 3.3; needs text {ALPACA}",
        NOT_TEXT,
    ),
    "a list as answer": (
        {"question": "q", "answer": ["a", "b"]},
        'answer: found ["a", "b"]; needs text (its keys: question, answer)',
        NOT_TEXT,
    ),
    "a number as input": (
        {"instruction": "q", "output": "a", "input": 0},
        "input: found 0; needs text (its keys: instruction, output, input)",
        NOT_TEXT,
    ),
    "a number as system": (
        {"system": 0, "query": "q", "response": "a"},
        "system: found 0; needs text (its keys: system, query, response)",
        NOT_TEXT,
    ),
    "an empty answer": (
        {"instruction": "q", "output": " \n"},
        f"output: the answer is empty; needs text {ALPACA}",
        EMPTY_ANSWER,
    ),
    "an empty answer of a message": (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        "messages[1].content: the assistant's answer is empty; needs text to train on",
        EMPTY_ANSWER,
    ),
    "an empty answer in history": (
        {"query": "q", "response": "a", "history": [["q", ""]]},
        "history[0].answer: the answer is empty; needs text (its keys: question, answer)",
        EMPTY_ANSWER,
    ),
    "no pair in history": (
        {"query": "q", "response": "a", "history": [["q", "a"], ["q"]]},
        'history[1]: found ["q"]; needs a pair [question, answer]',
        NOT_MESSAGES,
    ),
    "history that is no list": (
        {"query": "q", "response": "a", "history": 7},
        "history: found 7; needs a list of pairs [question, answer]",
        NOT_MESSAGES,
    ),
    "history that is not JSON": (
        {"query": "q", "response": "a", "history": "q, a"},
        'history: found "q, a", which is not JSON (Expecting value: line 1 column 1 (char 0))',
        NOT_JSON,
    ),
    "unknown role": (
        {"prompt": [{"role": "narrator", "content": "x"}], "completion": "a"},
        f'prompt[0].role: unknown role "narrator"; known are {ROLES}',
        UNKNOWN_ROLE,
    ),
    "a completion without an answer": (
        {"prompt": [USER, ASSISTANT], "completion": [USER_2]},
        "completion: no assistant turn to train on",
        NO_ANSWER,
    ),
    "an empty completion": (
        {"prompt": [USER], "completion": []},
        "completion: found []; needs a list of messages that is not empty",
        NOT_MESSAGES,
    ),
    "a completion that goes on with an answer": (
        {"prompt": [USER, ASSISTANT], "completion": [ASSISTANT_2]},
        "order: two assistant turns in a row; turns must alternate",
        TWO_ASSISTANT_TURNS,
    ),
    "two questions": (
        {"messages": [USER, USER_2, ASSISTANT]},
        "order: two user turns in a row; turns must alternate",
        TWO_USER_TURNS,
    ),
    "an answer first": (
        {"system": "s", "conversations": turns(("gpt", "lost"), ("human", "q"), ("gpt", "a"))},
        "order: an assistant turn opens the conversation; a user turn must be first",
        ASSISTANT_FIRST,
    ),
    "no answer": ({"messages": [USER]}, "order: no assistant turn to train on", NO_ANSWER),
    "nothing but an empty system prompt": (
        {"messages": [{"role": "system", "content": ""}]},
        "order: no assistant turn to train on",
        NO_ANSWER,
    ),
    "a result that nobody asked for": (
        {"messages": [USER, {"role": "tool", "content": "1"}, ASSISTANT]},
        "order: a tool turn after a user turn; it must follow an assistant turn",
        TOOL_OUT_OF_PLACE,
    ),
    "tools that are no list": (
        {"messages": [USER, ASSISTANT], "tools": '{"name": "add"}'},
        'tools: found {"name": "add"}; needs a list of JSON schemas',
        BROKEN_TOOLS,
    ),
    "variables that are no object": (
        {"messages": [USER, ASSISTANT], "chat_template_kwargs": "[1]"},
        "chat_template_kwargs: found [1]; needs an object of template variables",
        BROKEN_VARIABLES,
    ),
    "variables that are not ours to give": (
        {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs: add_generation_prompt is set by this program, not by a row",
        BROKEN_VARIABLES,
    ),
    "an image in a message": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
        'messages[0].content[0].type: found "image", but this program trains on text alone',
        IMAGES,
    ),
    "an empty text": ({"text": " \n"}, "text: the text is empty (its keys: text)", EMPTY_TEXT),
    "a text that is none": ({"text": 7}, "text: found 7; needs text (its keys: text)", NOT_TEXT),
    "null input_ids": (
        {"input_ids": None},
        "input_ids: found null; needs a list of integers (its keys: input_ids)",
        MISSING_VALUE,
    ),
    "no input_ids": (
        {"input_ids": []},
        "input_ids: found []; needs a list of one or more integers",
        BAD_TOKENS,
    ),
    "truth values as input_ids": (
        {"input_ids": [1, True]},
        "input_ids: found [1, true]; needs a list of one or more integers",
        BAD_TOKENS,
    ),
    "input_ids that are no integers": (
        {"input_ids": [1.0]},
        "input_ids: found [1.0]; needs a list of one or more integers",
        BAD_TOKENS,
    ),
    "input_ids beyond all vocabularies": (
        {"input_ids": [2**31]},
        "input_ids: found [2147483648]; needs a list of one or more integers",
        BAD_TOKENS,
    ),
    "a negative id": (
        {"input_ids": [1, -100]},
        "input_ids: found -100; needs token ids from 0 upwards",
        BAD_TOKENS,
    ),
    "labels of another length": (
        {"input_ids": [1, 2], "labels": [1]},
        "labels: found 1 for 2 input_ids; needs one for each",
        BAD_TOKENS,
    ),
    "labels that are shifted": (
        {"input_ids": [5, 6, 7], "labels": [-100, 7, 8]},
        "labels[1]: found 7, but input_ids[1] is 6; needs labels that are not shifted: each is the token at its own "
        "place, or -100",
        SHIFTED_LABELS,
    ),
    "a key twice in messages as text": (
        {"messages": '[{"role": "user", "content": "q", "content": "r"}]'},
        "messages: found the key 'content' twice in an object; needs each key once",
        DOUBLED_KEY,
    ),
    "a key twice in tools as text": (
        {"messages": [USER, ASSISTANT], "tools": '[{"name": "f", "name": "g"}]'},
        "tools: found the key 'name' twice in an object; needs each key once",
        DOUBLED_KEY,
    ),
    "a key twice in arguments as text": (
        {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}]},
        "messages[1].tool_calls: arguments of 'f': found the key 'x' twice in an object; needs each key once",
        DOUBLED_KEY,
    ),
    "a number that would be infinity": (
        {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": '{"x": [-1e400]}'}]}]},
        "messages[1].tool_calls: arguments of 'f': found the number -1e400; needs at most 1.8e308",
        HUGE_NUMBER,
    ),
    "a negative label": (
        {"input_ids": [1, 2], "labels": [-100, -1]},
        "labels: found -1; needs token ids, or -100 where nothing is trained",
        BAD_TOKENS,
    ),
    "an answer not to learn": (
        {"messages": [USER, ASSISTANT], "label": False},
        "label: found false, so the answer is one not to learn, which is for launch/kto.py (show_data.py kto), not for this script; "
        "allowed: true",
        NOT_TO_LEARN,
    ),
    "an answer not to learn, as a number": (
        {"prompt": "q", "completion": "a", "label": 0},
        "label: found 0, so the answer is one not to learn, which is for launch/kto.py (show_data.py kto), not for this script; "
        "allowed: true",
        NOT_TO_LEARN,
    ),
    "two answers": (
        {"messages": [USER, ASSISTANT], "rejected_response": "b"},
        'rejected_response: found "b", but a row of two answers is for launch/dpo.py (show_data.py dpo), not for this script',
        PREFERENCE_ROW,
    ),
    "two answers and no completion": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        'rejected: found "b", but a row of two answers is for launch/dpo.py (show_data.py dpo), not for this script',
        PREFERENCE_ROW,
    ),
    "padding": (
        {"input_ids": [1, 0], "attention_mask": [1, 0]},
        "attention_mask: found padding; needs rows without padding",
        BAD_TOKENS,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_sentence(fault: str) -> None:
    row, sentence, reason = FAULTS[fault]
    before = copy.deepcopy(row)
    with pytest.raises(DataError) as caught:
        parse_row(row)
    assert (str(caught.value), caught.value.reason) == (sentence, reason)
    assert row == before


def test_columns_that_a_row_lacks() -> None:
    with pytest.raises(DataError) as caught:
        parse_row({"q": "q", "answer": "a"}, None, {"question": "query"})
    assert str(caught.value) == "columns: question is read from 'query', which is missing (its keys: q, answer)"
    assert caught.value.reason == MISSING_VALUE
    with pytest.raises(DataError) as caught:
        parse_row({"messages": [USER, ASSISTANT]}, None, {"content": "utterance"})
    assert str(caught.value) == "columns: content is read from 'utterance', which no message of messages has"
    assert caught.value.reason == MISSING_VALUE


def test_every_reason_is_met() -> None:
    every = {value for name, value in vars(values).items() if name.isupper() and isinstance(value, str)}
    met = {reason for _, _, reason in FAULTS.values()} | {reason for _, _, reason in BAD_MESSAGES.values()}
    # Rows of preferences have reasons of their own, see test_pairs.py and test_encode_answers.py.
    of_preferences = {values.EQUAL_ANSWERS, values.EQUAL_SCORES, values.NO_SHARED_PROMPT, values.NO_PREFERENCE}
    of_preferences |= {values.ONE_END_TOKEN, values.BAD_LABEL, values.BAD_MARGIN}
    # So have texts with labels, see test_labels.py and test_labelled_rows.py.
    of_labels = {values.NO_LABEL, values.UNKNOWN_LABEL, values.BAD_TARGET, values.NO_COLUMN}
    assert every - met == {TEXT_ONLY, TOO_DEEP, SUCH_AS} | of_preferences | of_labels


def test_values_nested_beyond_all_bounds_are_a_bad_row() -> None:
    arguments: dict[str, Any] = {"x": None}
    for _ in range(3000):
        arguments = {"x": arguments}
    with pytest.raises(DataError) as caught:
        parse_row({"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": arguments}]}]})
    sentence = "values nested too deep (its keys: messages); needs fewer levels"
    assert (str(caught.value), caught.value.reason) == (sentence, TOO_DEEP)


KEYS = st.sampled_from(
    [
        *("messages", "conversations", "conversation", "instruction", "input", "output", "history", "system", "prompt"),
        *("completion", "query", "response", "question", "answer", "text", "input_ids", "labels", "attention_mask"),
        *("tools", "chat_template_kwargs", "image", "role", "content", "from", "value", "human", "assistant", "type"),
        *("reasoning_content", "thinking", "reasoning", "tool_calls", "function_call", "tool_call_id", "name", "id"),
        *("function", "arguments", "train", "weight", "loss_weight", "loss", "loss_scale", "masked", "train_detail"),
        *("begin_offset", "end_offset", "functions", "parameters", "properties", "default", "enum", "anyOf", "context"),
        *("system_prompt", "label", "rejected", "loss_mask", "prompt_mask", "tool_mask", "weights", "mood", "\ud83d\n"),
    ]
)
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "gpt",
        "system",
        "tool",
        "tool_call",
        "text",
        "image",
        "",
        " ",
        "{}",
        "[]",
        "[[",
        "\ud83d",
        '"{}"',
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5) | st.builds(json.dumps, inner),
    max_leaves=20,
)
# Nearly right: one value of a good row, or of one of its messages, is replaced.
GOOD_ROWS = st.sampled_from([row for row, _ in SHAPES.values()])
SPOILT_ROWS = st.builds(lambda row, key, value: {**row, key: value}, GOOD_ROWS, KEYS, VALUES)
SPOILT_TURNS = st.builds(
    lambda turns, at, key, value: {"messages": [*turns[:at], {**turns[at], key: value}, *turns[at + 1 :]]},
    st.sampled_from([[USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2]]),
    st.sampled_from([0, 1]),
    KEYS,
    VALUES,
)
ROWS = SPOILT_ROWS | SPOILT_TURNS | st.dictionaries(KEYS | st.text(max_size=3), VALUES, max_size=8)


@given(row=ROWS, data_format=st.sampled_from([None, *get_args(DataFormat)]), renamed=st.booleans())
def test_a_row_is_parsed_or_refused_and_never_changed(
    row: dict[str, Any], data_format: DataFormat | None, renamed: bool
) -> None:
    before = copy.deepcopy(row)
    columns = {"content": "value"} if renamed and data_format in (None, "messages") else {}
    reads = TemplateReads(frozenset({"mood", "context"}), frozenset({"mood"}), whole_messages=renamed)
    try:
        parsed = formats.parse_row(row, data_format, columns, reads)
    except DataError as error:
        assert error.reason in vars(values).values()
        assert "\n" not in str(error) and str(error).encode()
    else:
        shown = "".join(name + value.example for name, value in parsed.unused)
        assert "\n" not in shown
        shown.encode()  # no halves of characters
        assert sum(value.characters for _, value in parsed.unused) <= parsed.characters
        if isinstance(parsed, Conversation):
            assert all(isinstance(message["content"], str) for message in parsed.messages)
            assert any(message["role"] == "assistant" for message in parsed.messages)
    assert repr(row) == repr(before)  # NaN is not equal to itself


TEXTS = st.text(max_size=20)
ANSWERS = TEXTS.filter(str.strip)


@given(pairs=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4), system=TEXTS)
def test_all_shapes_of_one_conversation_are_the_same(pairs: list[tuple[str, str]], system: str) -> None:
    flat = [turn for question, answer in pairs for turn in (("human", question), ("gpt", answer))]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[role], "content": text} for role, text in flat]
    expected = Conversation([{"role": "system", "content": system}, *messages] if system else messages, None, {})
    history = [list(pair) for pair in pairs[:-1]]
    question, answer = pairs[-1]
    for row in (
        {"messages": messages},
        {"conversations": turns(*flat)},
        {"conversation": [{"human": question, "assistant": answer} for question, answer in pairs]},
        {"instruction": question, "input": "", "output": answer, "history": history},
        {"query": question, "response": answer, "history": history},
        {"question": question, "answer": answer, "history": json.dumps(history)},
        {"prompt": question, "completion": answer, "history": history},
    ):
        # Carriage returns and the like at either end belong to the text as much as any other character.
        assert parse_row({**row, "system": system}) == expected


def load(name: str) -> list[dict[str, Any]]:
    text = (INSTRUCT / name).read_text(encoding="utf-8")
    if name.endswith(".csv"):
        # As a loader gives them: text, and None for an empty cell.
        return [{key: value or None for key, value in row.items()} for row in csv.DictReader(text.splitlines())]
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)
    return rows if isinstance(rows, list) else [rows]


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for row in rows:
        try:
            parsed = parse_row(row)
        except DataError as error:
            counted[error.reason] += 1
            continue
        counted[type(parsed).__name__] += 1
        if not isinstance(parsed, Conversation):
            continue
        for message in parsed.messages:
            counted[message["role"]] += 1
            counted["trained"] += message["role"] == "assistant" and message.get("train", True)
            counted["calls"] += len(message.get("tool_calls", ()))
            counted["reasoning"] += "reasoning_content" in message
        counted["with tools"] += parsed.tools is not None
        counted["tools"] += len(parsed.tools or ())
    return {name: count for name, count in counted.items() if count}


def talk(rows: int, turns: int, **others: int) -> dict[str, int]:
    """Conversations in which every answer is trained; `turns` has questions and as many answers."""
    return {"Conversation": rows, "user": turns, "assistant": turns, "trained": turns, **others}


COUNTS = {
    "alpaca_en_demo.json": (999, talk(999, 999)),
    "alpaca_zh_demo.json": (1000, talk(1000, 1000)),
    "axolotl_conversation.json": (1, talk(1, 6)),
    "axolotl_conversation.missingturns.json": (1, {"empty answer": 1}),
    "belle_format_from_sharegpt_zh_100.jsonl": (100, talk(100, 650)),
    "belle_readme_conversations.jsonl": (2, talk(2, 4)),
    "dummy_conversation.json": (500, talk(500, 1000)),
    # 211 of the answers are calls.
    "glaive_toolcall_en_demo.json": (
        300,
        {
            **{"Conversation": 300, "user": 746, "assistant": 957, "tool": 211, "trained": 957, "calls": 211},
            **{"with tools": 191, "tools": 219},
        },
    ),
    "identity.json": (91, talk(91, 91)),
    # Twelve answers hold two or three calls.
    "reason_tool_use_demo_50.jsonl": (
        50,
        {
            **{"Conversation": 50, "system": 50, "user": 70, "assistant": 112, "tool": 42, "trained": 112, "calls": 68},
            **{"reasoning": 112, "with tools": 48, "tools": 121},
        },
    ),
    "v1_sft_demo.jsonl": (500, talk(500, 500)),
    "ms-swift/alpaca.csv": (3, talk(3, 3, system=1)),
    "ms-swift/alpaca.jsonl": (3, talk(3, 4, system=1)),
    "ms-swift/chatml.jsonl": (3, talk(3, 5, system=1)),
    "ms-swift/conversations.jsonl": (3, talk(3, 5, system=1)),
    "ms-swift/sharegpt.jsonl": (3, talk(3, 5, system=1)),
    "ms-swift/swift_multi.json": (3, talk(3, 5, system=1)),
    "ms-swift/swift_multi.jsonl": (3, talk(3, 5, system=1)),
    "ms-swift/swift_pre.jsonl": (3, {"Document": 3}),
    "ms-swift/swift_single.csv": (3, talk(3, 3, system=1)),
    "ms-swift/swift_single.jsonl": (3, talk(3, 3, system=1)),
}
needs_data = pytest.mark.skipif(not INSTRUCT.is_dir(), reason="needs the shared data folder")


@needs_data
def test_no_file_is_left_out() -> None:
    files = {path.relative_to(INSTRUCT).as_posix() for path in INSTRUCT.rglob("*") if path.is_file()}
    others = {"reason_tool_use_demo_50.jsonl", "axolotl_conversation.missingturns.json"}
    assert files == COUNTS.keys() == ONE_ROW_EACH.keys() | LONG.keys() | others


@needs_data
@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_real_files(name: str) -> None:
    rows = load(name)
    number, counted = COUNTS[name]
    assert len(rows) == number
    assert counts(rows) == counted


def dialog(*texts: str, system: str = "") -> Conversation:
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages, None, {})


# file: row (from 0), what it is
ONE_ROW_EACH: dict[str, tuple[int, Conversation | Document]] = {
    "alpaca_en_demo.json": (554, dialog("Sum up the numbers.\n3, 2, 5", "The sum of the numbers is 10.")),
    "alpaca_zh_demo.json": (664, dialog("将以下罗马数字转换为阿拉伯数字。\n输入：XIV", "输出：14")),  # noqa: RUF001
    "belle_format_from_sharegpt_zh_100.jsonl": (
        81,
        dialog("写一首有关雨的俳句。", "树叶上的雨滴\n水落的舒缓声音\n大自然的旋律"),
    ),
    "dummy_conversation.json": (
        73,
        dialog("Who created you?", "I'm created by Large Model Systems Organization (LMSYS)."),
    ),
    "glaive_toolcall_en_demo.json": (
        203,
        Conversation(
            [
                {
                    "role": "user",
                    "content": "Hi, I was born on 1990-05-15. Can you tell me how old I am today?",
                },
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "calculate_age", "arguments": {"birthdate": "1990-05-15"}},
                        }
                    ],
                },
                {"role": "tool", "content": '{"age": 31}'},
                {
                    "role": "assistant",
                    "content": "Based on the birthdate you provided, you are 31 years old today.",
                },
            ],
            [
                {
                    "type": "function",
                    "function": {
                        "name": "calculate_age",
                        "description": "Calculate the age based on birthdate",
                        "parameters": {
                            "type": "object",
                            "properties": {
                                "birthdate": {
                                    "type": "string",
                                    "description": "The birthdate in YYYY-MM-DD format",
                                }
                            },
                            "required": ["birthdate"],
                        },
                    },
                }
            ],
            {},
        ),
    ),
    "identity.json": (10, dialog("Who built you?", "I am an AI assistant built by {{author}}.")),
    "v1_sft_demo.jsonl": (
        412,
        conversation(
            {"role": "user", "content": "Calculate 15% of 500.", "train": False},
            {"role": "assistant", "content": "15% of 500 is 75."},
        ),
    ),
    "ms-swift/alpaca.csv": (0, dialog("11111\n22222", "3.3", system="00000")),
    "ms-swift/alpaca.jsonl": (0, dialog("aaaaa", "bbbbb", "11111\n22222", "33333", system="system123")),
    "ms-swift/chatml.jsonl": (1, dialog("aaaaa", "bbbbb", "ccccc", "ddddd")),
    "ms-swift/conversations.jsonl": (0, dialog("11111", "22222", system="00000")),
    "ms-swift/sharegpt.jsonl": (2, dialog("AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE", "FFFFF")),
    "ms-swift/swift_multi.json": (2, dialog("AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE", "FFFFF")),
    "ms-swift/swift_multi.jsonl": (0, dialog("55555", "66666", system="00000")),
    "ms-swift/swift_pre.jsonl": (0, Document("11111")),
    "ms-swift/swift_single.csv": (1, dialog("aaaaa", "bbbbb")),
    "ms-swift/swift_single.jsonl": (0, dialog("11111", "22222", system="00000")),
}
# file: row (from 0), its first question, number of messages
LONG = {
    "axolotl_conversation.json": (
        0,
        "how could i implement a minesweeper algorithm that utilises algebraic topology to solve boards?",
        12,
    ),
    "belle_readme_conversations.jsonl": (1, "根据给定的食材，编写一道美食菜谱。\n鸡腿肉、蘑菇、洋葱", 6),  # noqa: RUF001
}


@needs_data
@pytest.mark.parametrize("name", ONE_ROW_EACH)
def test_one_row_of_each_real_file(name: str) -> None:
    number, expected = ONE_ROW_EACH[name]
    assert parse_row(load(name)[number]) == expected


@needs_data
@pytest.mark.parametrize("name", LONG)
def test_one_row_of_files_with_long_texts_only(name: str) -> None:
    number, opening, texts = LONG[name]
    row = load(name)[number]
    parsed = parse_row(row)
    assert parsed == dialog(*(turn["value"] for turn in row["conversations"]))
    assert isinstance(parsed, Conversation)
    assert (parsed.messages[0]["content"], len(parsed.messages)) == (opening, texts)


@needs_data
def test_one_row_with_reasoning_calls_and_tools() -> None:
    row = load("reason_tool_use_demo_50.jsonl")[8]
    system, _, answer = row["messages"]
    thought = answer["content"][0]["value"]
    assert thought.startswith("Okay, the user wants me to retrieve 15 products")
    call = {"name": "get_products_in_category", "arguments": {"category": "Books", "limit": 15, "skip": 20}}
    messages = [
        {"role": "system", "content": system["content"][0]["value"]},
        {
            "role": "user",
            "content": "Retrieve 15 products from the 'Books' category starting from the 20th product.",
        },
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": thought,
            "thinking": thought,
            "tool_calls": [{"type": "function", "function": call}],
        },
    ]
    (tool,) = json.loads(row["tools"])  # its parameters are a flat map of arguments
    schema = {"type": "object", "properties": tool["function"]["parameters"]}
    tools = [{**tool, "function": {**tool["function"], "parameters": schema}}]
    assert parse_row(row) == Conversation(messages, tools, {})
    assert formats.parse_row(row).remarks == (FLAT_PARAMETERS,)


@needs_data
def test_an_empty_answer_in_a_real_file_is_reported() -> None:
    with pytest.raises(DataError) as caught:
        parse_row(load("axolotl_conversation.missingturns.json")[0])
    sentence = "conversations[1].value: the assistant's answer is empty; needs text to train on"
    assert (str(caught.value), caught.value.reason) == (sentence, "empty answer")


def as_prompt(**fields: Any) -> dict[str, Any]:
    return {"prompt": [USER, {**ASSISTANT, **fields}, USER], "completion": [ASSISTANT]}


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss"])
def test_an_answer_of_a_prompt_that_is_to_be_trained_is_refused(key: str) -> None:
    sentence = (
        f"prompt[1].{key}: found true, but the answers of a prompt are context; move the answer to the completion"
    )
    for row in (as_prompt(**{key: True}), as_prompt(content=[{"type": "text", "text": "a", key: True}])):
        with pytest.raises(DataError) as caught:
            parse_row(row)
        assert str(caught.value) == sentence
    for value in (False, None):
        assert parse_row(as_prompt(**{key: value})) == parse_row(as_prompt())


def test_weights_in_a_prompt_are_counted() -> None:
    for key, value in (("weight", 0.5), ("loss_scale", 1), ("loss_weight", 2.0)):
        parsed = formats.parse_row(as_prompt(**{key: value}))
        assert [name for name, _ in parsed.unused] == [f"'{key}' of messages of the prompt"]
        assert isinstance(parsed, Conversation) and parsed.messages[1] == {**ASSISTANT, "train": False}
    detail = {"begin_offset": 0, "end_offset": 0, "train": True}
    assert [name for name, _ in formats.parse_row(as_prompt(train_detail=[detail])).unused] == [
        "'train_detail' of messages of the prompt"
    ]
    assert formats.parse_row(as_prompt(weight=0)).unused == formats.parse_row(as_prompt(masked=True)).unused == ()


def test_a_text_that_means_a_boolean_is_one_for_the_template() -> None:
    reads = TemplateReads(variables=frozenset({"enable_thinking", "persona"}))
    chat = {"messages": [USER, ASSISTANT]}
    for text, value in (("false", False), ("False", False), (" TRUE ", True), ("no", "no"), ("", "")):
        for row in ({"enable_thinking": text}, {"chat_template_kwargs": {"enable_thinking": text}}):
            parsed = formats.parse_row({**chat, **row}, reads=reads)
            assert isinstance(parsed, Conversation)
            assert (parsed.variables, parsed.unused) == ({"enable_thinking": value}, ())
    both = formats.parse_row(
        {**chat, "enable_thinking": "false", "chat_template_kwargs": {"enable_thinking": False}}, reads=reads
    )
    assert both.unused == ()
