"""Rows of preferences: the shapes that data sets have, and what is wrong with bad ones."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from accel_llm.chat.values import (
    BAD_LABEL,
    BAD_MARGIN,
    EMPTY_ANSWER,
    EQUAL_ANSWERS,
    EQUAL_SCORES,
    IMAGES,
    MISSING_VALUE,
    NO_ANSWER,
    NO_PREFERENCE,
    NO_SHARED_PROMPT,
    NOT_MESSAGES,
    TWO_ASSISTANT_TURNS,
)
from accel_llm.data.formats import Conversation
from accel_llm.data.pairs import EQUAL_SCORES_REMARK, PreferenceKind, PreferenceRow, parse_preferences
from accel_llm.data.sides import TRANSCRIPT_REMARK
from accel_llm.errors import DataError

PREFERENCE = Path(__file__).parents[3] / "shared" / "data" / "preference"
PAIRS, LABELS, MARGINS = PreferenceKind(), PreferenceKind(labelled=True), PreferenceKind(margins=True)
ALL_PAIRS = PreferenceKind(margins=True, all_pairs=True)


def turns(text: str) -> list[dict[str, Any]]:
    """Messages from their short form, such as `s:be brief|u:q|a:x`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in text.split("|")]


def short(conversation: Conversation) -> str:
    """The short form of a conversation: `*` before a turn that is trained, reasoning in brackets, calls by name."""
    shown = []
    for message in conversation.messages:
        trained = message["role"] == "assistant" and message.get("train", True)
        reasoning = f"({message['reasoning_content']})" if "reasoning_content" in message else ""
        calls = "".join(f"<{call['function']['name']}>" for call in message.get("tool_calls", ()))
        shown.append(f"{'*' * trained}{message['role'][0]}:{reasoning}{message['content']}{calls}")
    return "|".join(shown)


def sides(row: PreferenceRow) -> list[str]:
    return [short(side) for one in row.judged for side in one.sides]


def part(role: str, text: str, weight: float) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}


QA = ["u:q|*a:good", "u:q|*a:bad"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TRAJECTORIES = {
    "chosen": [*turns("u:q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *turns("t:3|a:good")],
    "rejected": turns("u:q|a:bad"),
}
# Name: a row, and the two sides.
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, QA),
    "messages": ({"prompt": turns("u:q"), "chosen": turns("a:good"), "rejected": turns("a:bad")}, QA),
    "a prompt of messages and texts": ({"prompt": turns("u:q"), "chosen": "good", "rejected": "bad"}, QA),
    "a prompt of text and messages": ({"prompt": "q", "chosen": turns("a:good"), "rejected": turns("a:bad")}, QA),
    "one message each": ({"prompt": "q", "chosen": turns("a:good")[0], "rejected": turns("a:bad")[0]}, QA),
    "messages as JSON text": (
        {"prompt": json.dumps(turns("u:q")), "chosen": json.dumps(turns("a:good")), "rejected": "bad"},
        QA,
    ),
    "a prompt with answers": (
        {"prompt": turns("u:p|a:x|u:q"), "chosen": "good", "rejected": "bad"},
        ["u:p|a:x|u:q|*a:good", "u:p|a:x|u:q|*a:bad"],
    ),
    "Intel's orca_dpo_pairs": (
        {"system": "be brief", "question": "q", "chosen": "good", "rejected": "bad"},
        ["s:be brief|u:q|*a:good", "s:be brief|u:q|*a:bad"],
    ),
    "query": ({"query": "q", "chosen": "good", "rejected": "bad"}, QA),
    "alpaca in LLaMA-Factory": (
        {"instruction": "add", "input": "1", "history": [["h", "x"]], "chosen": "good", "rejected": "bad"},
        ["u:h|a:x|u:add\n1|*a:good", "u:h|a:x|u:add\n1|*a:bad"],
    ),
    "instruction, input and messages": (
        {"instruction": "add", "input": "1", "chosen": turns("a:good"), "rejected": turns("a:bad")},
        ["u:add\n1|*a:good", "u:add\n1|*a:bad"],
    ),
    "two outputs, the better one first": ({"instruction": "q", "input": "", "output": ["good", "bad"]}, QA),
    "ShareGPT in LLaMA-Factory": (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        ["s:s|u:q|*a:good", "s:s|u:q|*a:bad"],
    ),
    "OpenAI": (
        {
            "input": {"messages": turns("u:q"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": turns("a:good"),
            "non_preferred_output": turns("a:bad"),
        },
        QA,
    ),
    "input alone, in Axolotl": ({"input": "q", "chosen": "good", "rejected": "bad"}, QA),
    "a prompt as messages": ({"messages": turns("u:q"), "chosen": "good", "rejected": "bad"}, QA),
    "ms-swift": (
        {"messages": turns("s:s|u:p|a:x|u:q|a:good"), "rejected_response": "bad"},
        ["s:s|u:p|a:x|u:q|*a:good", "s:s|u:p|a:x|u:q|*a:bad"],
    ),
    "ms-swift's query and response": (
        {"query": "q", "response": "good", "rejected_response": "bad", "history": [["h", "x"]]},
        ["u:h|a:x|u:q|*a:good", "u:h|a:x|u:q|*a:bad"],
    ),
    "a rejected response as messages": (
        {"messages": turns("u:q|a:good"), "rejected_response": turns("a:bad")},
        QA,
    ),
    "rejected messages": ({"messages": turns("u:q|a:good"), "rejected_messages": turns("u:q|a:bad")}, QA),
    "LLaMA-Factory's format v1": (
        {
            "chosen_messages": [part("user", "q", 0.0), part("assistant", "good", 1.0)],
            "rejected_messages": [part("user", "q", 0.0), part("assistant", "bad", 1.0)],
        },
        QA,
    ),
    "whole conversations": (
        {"chosen": turns("s:s|u:p|a:x|u:q|a:good"), "rejected": turns("s:s|u:p|a:x|u:q|a:bad")},
        ["s:s|u:p|a:x|u:q|*a:good", "s:s|u:p|a:x|u:q|*a:bad"],
    ),
    "whole conversations that part early": (
        {"chosen": turns("u:p|a:x|u:q|a:good"), "rejected": turns("u:p|a:y|u:r|a:bad")},
        ["u:p|*a:x|u:q|*a:good", "u:p|*a:y|u:r|*a:bad"],
    ),
    "UltraFeedback, binarized": (
        {
            "prompt": "q",
            "messages": turns("u:q|a:good"),
            "chosen": turns("u:q|a:good"),
            "rejected": turns("u:q|a:bad"),
        },
        QA,
    ),
    "a prompt that both conversations repeat": (
        {"prompt": turns("u:q"), "chosen": turns("u:q|a:good"), "rejected": turns("u:q|a:bad")},
        QA,
    ),
    "Anthropic's hh-rlhf": (
        {
            "chosen": "\n\nHuman: p\n\nAssistant: x\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: p\n\nAssistant: x\n\nHuman: q\n\nAssistant: bad",
        },
        ["u:p|a:x|u:q|*a:good", "u:p|a:x|u:q|*a:bad"],
    ),
    "hh-rlhf with its prompt": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "response": " good", "chosen": " good", "rejected": " bad"},
        QA,
    ),
    "tools and reasoning": (
        {
            "prompt": turns("u:q"),
            "chosen": [
                {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "add"},
                *turns("t:3|a:good"),
            ],
            "rejected": turns("a:bad"),
            "tools": [TOOL],
        },
        ["u:q|*a:(add)<add>|t:3|*a:good", "u:q|*a:bad"],
    ),
    "tools in whole conversations": ({**TRAJECTORIES, "tools": [TOOL]}, ["u:q|*a:<add>|t:3|*a:good", "u:q|*a:bad"]),
    "scored answers": (
        {"prompt": "q", "responses": ["middle", "bad", "good"], "scores": [2, 1, 3]},
        QA,
    ),
    "UltraFeedback": (
        {
            "instruction": "q",
            "completions": [{"response": "bad", "overall_score": "2.5"}, {"response": "good", "overall_score": 8}],
        },
        QA,
    ),
    "OpenHermesPreferences": (
        {"prompt": "q", "candidates_completions": ["bad", "good", "middle"], "ranks": [3, 1, 2]},
        QA,
    ),
    "Nectar": ({"prompt": "q", "answers": [{"answer": "good", "rank": 1.0}, {"answer": "bad", "rank": 7.0}]}, QA),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_pairs(shape: str) -> None:
    row, expected = SHAPES[shape]
    before = copy.deepcopy(row)
    parsed = parse_preferences(row, PAIRS)
    assert sides(parsed) == expected and row == before
    # The same row as two answers with labels.
    labelled = parse_preferences(row, LABELS)
    assert sides(labelled) == expected and [one.label for one in labelled.judged] == [True, False]
    # Loaders fill the columns of other rows with None.
    assert (
        sides(parse_preferences({**dict.fromkeys(("label", "margin", "rejected_response")), **row}, PAIRS)) == expected
    )


KTO: dict[str, tuple[dict[str, Any], str, bool]] = {
    "messages": ({"messages": turns("s:s|u:p|a:x|u:q|a:good"), "label": True}, "s:s|u:p|a:x|u:q|*a:good", True),
    "texts": ({"prompt": "q", "completion": "bad", "label": False}, "u:q|*a:bad", False),
    "lists": ({"prompt": turns("u:q"), "completion": turns("a:x|u:p|a:y"), "label": 1}, "u:q|*a:x|u:p|*a:y", True),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}], "kto_tag": False},
        "u:q|*a:bad",
        False,
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "good", "kto_tag": "true"}, "u:q|*a:good", True),
    "a word": ({"prompt": "q", "completion": "bad", "label": "undesirable"}, "u:q|*a:bad", False),
    "reasoning": ({"question": "q", "answer": "good", "reasoning": "r", "label": True}, "u:q|*a:(r)good", True),
}


@pytest.mark.parametrize("shape", KTO)
def test_shapes_of_answers_with_a_label(shape: str) -> None:
    row, expected, label = KTO[shape]
    parsed = parse_preferences(row, LABELS)
    assert sides(parsed) == [expected] and [one.label for one in parsed.judged] == [label]


def test_all_pairs_of_scored_answers_and_their_margins() -> None:
    row = {"prompt": "q", "responses": ["b", "a", "c", "b2"], "scores": [2, 3.5, 1, 2], "model": ["m"] * 4}
    parsed = parse_preferences(row, ALL_PAIRS)
    answers = ["".join(side.messages[-1]["content"] for side in one.sides) for one in parsed.judged]
    assert answers == ["ab", "ab2", "ac", "bc", "b2c"]  # b and b2 are equally good
    assert [one.margin for one in parsed.judged] == [1.5, 1.5, 2.5, 1.0, 1.0]
    assert dict(parsed.unused).keys() == {"column 'model'"}
    # Ranks say which is better, not by how much; and with labels an answer must be on one side only.
    ranked = parse_preferences({"prompt": "q", "responses": ["b", "a"], "rank": [2, 1]}, ALL_PAIRS)
    assert sides(ranked) == ["u:q|*a:a", "u:q|*a:b"] and ranked.judged[0].margin == 0
    assert sides(parse_preferences(row, PreferenceKind(labelled=True, all_pairs=True))) == ["u:q|*a:a", "u:q|*a:c"]


def test_margins_are_read_where_they_count() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    scored = {**row, "score_chosen": 8.0, "score_rejected": 5.5}
    assert parse_preferences({**row, "margin": "0.5"}, MARGINS).judged[0].margin == 0.5
    assert parse_preferences(scored, MARGINS).judged[0].margin == 2.5
    assert parse_preferences(scored, MARGINS).unused == ()
    assert parse_preferences(row, MARGINS).judged[0].margin == 0
    equal = parse_preferences({**row, "score_chosen": 5, "score_rejected": 5}, MARGINS)
    assert (equal.judged[0].margin, equal.remarks) == (0, (EQUAL_SCORES_REMARK,))
    # Nothing else reads them, so they stand in the ledger.
    parsed = parse_preferences(scored, PAIRS)
    assert parsed.judged[0].margin == 0 and dict(parsed.unused).keys() == {
        "column 'score_chosen'",
        "column 'score_rejected'",
    }


def test_columns_can_be_renamed() -> None:
    row = {"ask": "q", "better": "good", "worse": "bad"}
    assert sides(parse_preferences(row, PAIRS, None, {"prompt": "ask", "chosen": "better", "rejected": "worse"})) == QA
    chat = [{"who": "customer", "says": "q"}, {"who": "gpt", "says": "good"}]
    columns = {"role": "who", "content": "says", "role:customer": "user"}
    bad = [{"who": "gpt", "says": "bad"}]
    for row in (
        {"prompt": chat[:1], "chosen": chat[1], "rejected": bad},
        {"messages": chat[:1], "chosen": "good", "rejected": "bad"},
        {"chosen": chat, "rejected": [*chat[:1], *bad]},
        {"messages": chat, "rejected_response": bad},
        {"messages": chat, "rejected_response": "bad"},
    ):
        assert sides(parse_preferences(row, PAIRS, None, columns)) == QA, row
    parsed = parse_preferences({"messages": chat, "good": "yes", "kto_tag": True}, LABELS, None, columns)
    assert sides(parsed) == QA[:1]
    renamed = parse_preferences({"prompt": "q", "completion": "bad", "liked": 0}, LABELS, None, {"label": "liked"})
    assert renamed.judged[0].label is False


def test_what_nothing_reads_is_listed() -> None:
    long = {"role": "assistant", "content": "good", "mood": "fine"}
    row = {
        "prompt": "q",
        "chosen": [long],
        "rejected": "bad",
        "reasoning": "because",
        "output": "other",
        "source": "web",
    }
    parsed = parse_preferences(row, PAIRS)
    assert dict(parsed.unused).keys() == {
        "column 'reasoning'",
        "column 'output'",
        "column 'source'",
        "'mood' of messages",
    }
    assert parsed.characters == sum(map(len, ("q", "good", "assistant", "fine", "bad", "because", "other", "web")))
    completions = [{"response": "bad", "score": 1, "model": "m"}, {"response": "good", "score": 2, "model": "n"}]
    parsed = parse_preferences({"prompt": "q", "completions": completions}, PAIRS)
    assert dict(parsed.unused).keys() == {"'model' of completions"}
    row, _ = SHAPES["Anthropic's hh-rlhf"]
    assert parse_preferences(row, PAIRS).remarks == (TRANSCRIPT_REMARK,)
    # A prompt that is another text than the one in both conversations.
    row = {"prompt": "other", "chosen": turns("u:q|a:good"), "rejected": turns("u:q|a:bad")}
    assert dict(parse_preferences(row, PAIRS).unused).keys() == {"column 'prompt'"}


def test_rows_keep_tools_and_variables_of_both_sides() -> None:
    row = {**TRAJECTORIES, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    both = parse_preferences(row, PAIRS).judged[0].sides
    row = {"messages": turns("u:q|a:good"), "rejected_response": "bad", **{k: row[k] for k in list(row)[2:]}}
    both += parse_preferences(row, PAIRS).judged[0].sides
    assert all(side.tools == [TOOL] and side.variables == {"enable_thinking": False} for side in both)


BAD: dict[str, tuple[dict[str, Any], PreferenceKind, str, str]] = {
    "equal answers": (
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        PAIRS,
        "rejected: found the chosen answer again; needs another one",
        EQUAL_ANSWERS,
    ),
    "equal conversations": (
        {"chosen": turns("u:q|a:a"), "rejected": turns("u:q|a:a")},
        LABELS,
        "rejected: found the conversation of chosen; needs another answer",
        EQUAL_ANSWERS,
    ),
    "an empty chosen answer": (
        {"prompt": "q", "chosen": " ", "rejected": "bad"},
        PAIRS,
        "chosen: the answer is empty; needs text (its keys: prompt, chosen, rejected)",
        EMPTY_ANSWER,
    ),
    "an empty message": (
        {"prompt": "q", "chosen": "good", "rejected": turns("a:")},
        PAIRS,
        "rejected[0].content: the assistant's answer is empty; needs text to train on",
        EMPTY_ANSWER,
    ),
    "no rejected answer": (
        {"prompt": "q", "chosen": "good", "rejected": None},
        PAIRS,
        "rejected: found null; needs an answer (its keys: prompt, chosen, rejected)",
        EMPTY_ANSWER,
    ),
    "two empty answers": (
        {"prompt": "q", "chosen": "", "rejected": ""},
        PAIRS,
        'rejected: found ""; needs an answer',
        EMPTY_ANSWER,
    ),
    "one conversation is the beginning of the other": (
        {"chosen": turns("u:q|a:x"), "rejected": turns("u:q|a:x|u:p|a:y")},
        PAIRS,
        "chosen: found only the beginning of rejected; needs an answer of its own",
        EMPTY_ANSWER,
    ),
    "an answer that is a number": (
        {"prompt": "q", "chosen": 1, "rejected": 2},
        PAIRS,
        "chosen: found 1; needs a text or a list of messages",
        NOT_MESSAGES,
    ),
    "other questions": (
        {"chosen": turns("u:p|a:x"), "rejected": turns("u:q|a:y")},
        PAIRS,
        "chosen and rejected: they differ first in a user turn, before any answer; needs answers to the same prompt",
        NO_SHARED_PROMPT,
    ),
    "another question later": (
        {"messages": turns("u:p|a:x|u:q|a:y"), "rejected_messages": turns("u:p|a:x|u:r|a:z")},
        PAIRS,
        "messages and rejected_messages: they differ first in a user turn, before any answer; needs answers to the same "
        "prompt",
        NO_SHARED_PROMPT,
    ),
    "one conversation and one answer": (
        {"chosen": turns("u:q|a:good"), "rejected": "bad"},
        PAIRS,
        "chosen: chosen begins with a prompt, but rejected with an answer; needs the same in both",
        NO_SHARED_PROMPT,
    ),
    "another prompt than that of the conversations": (
        {"prompt": turns("s:s"), "chosen": turns("u:q|a:good"), "rejected": turns("u:q|a:bad")},
        PAIRS,
        "prompt: chosen and rejected are whole conversations that do not begin with it; needs answers alone, or the "
        "prompt in both",
        NO_SHARED_PROMPT,
    ),
    "texts without a prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        PAIRS,
        'chosen: "The sky is blue." is a text without a prompt beside it; needs a column prompt, or messages',
        NO_SHARED_PROMPT,
    ),
    "messages without a prompt": (
        {"chosen": turns("a:good"), "rejected": turns("a:bad")},
        PAIRS,
        "no prompt for chosen and rejected (its keys: chosen, rejected); needs one of prompt, messages, conversations, "
        "conversation, question, query, instruction, input",
        NO_SHARED_PROMPT,
    ),
    "a prompt that ends with an answer": (
        {"messages": turns("u:q|a:good"), "chosen": "good", "rejected": "bad"},
        PAIRS,
        "order: two assistant turns in a row; turns must alternate",
        TWO_ASSISTANT_TURNS,
    ),
    "no answer at the end": (
        {"messages": turns("u:q|a:x|u:p"), "label": True},
        LABELS,
        "the answer: the last turn is a user turn; needs an assistant turn to train on",
        NO_ANSWER,
    ),
    "an answer that is not trained": (
        {"messages": [*turns("u:q"), {"role": "assistant", "content": "x", "train": False}], "label": True},
        LABELS,
        "the answer: it is not trained; needs an assistant turn to train on",
        NO_ANSWER,
    ),
    "rejected messages alone": (
        {"rejected_messages": turns("u:q|a:bad")},
        PAIRS,
        "messages: missing beside rejected_messages (its keys: rejected_messages)",
        MISSING_VALUE,
    ),
    "a label for pairs": (
        {"prompt": "q", "completion": "a", "label": True},
        PAIRS,
        "label: found an answer with a label, which is for KTO; needs two answers: chosen and rejected (beside prompt, "
        "question, query, instruction, messages or conversations, or as whole conversations), rejected_response or "
        "rejected_messages (beside a row of fine-tuning), responses with scores",
        NO_PREFERENCE,
    ),
    "a row of fine-tuning": (
        {"prompt": "q", "completion": "a"},
        LABELS,
        "no preference in this row: its keys: prompt, completion; known are a conversation or a prompt and completion "
        "with label or kto_tag, chosen and rejected (beside prompt, question, query, instruction, messages or "
        "conversations, or as whole conversations), rejected_response or rejected_messages (beside a row of "
        "fine-tuning), responses with scores",
        NO_PREFERENCE,
    ),
    "a label beside a text": (
        {"text": "t", "label": True},
        LABELS,
        "a row without a conversation (its keys: text, label); needs one",
        NO_PREFERENCE,
    ),
    "a label that is a class": (
        {"prompt": "q", "completion": "a", "label": 2},
        LABELS,
        "label: found 2; allowed: true (desirable) and false (undesirable)",
        BAD_LABEL,
    ),
    "a label that is null": (
        {"prompt": "q", "completion": "a", "label": None},
        LABELS,
        "label: found null; allowed: true (desirable) and false (undesirable)",
        BAD_LABEL,
    ),
    "a score that is infinite": (
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("inf")]},
        PAIRS,
        "scores: found Infinity; needs a number for each answer",
        BAD_MARGIN,
    ),
    "equal scores": (
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]},
        PAIRS,
        "scores: all are 1, so no answer is better than another",
        EQUAL_SCORES,
    ),
    "too few scores": (
        {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
        PAIRS,
        "scores: found 1 for 2 responses; needs one for each",
        MISSING_VALUE,
    ),
    "no scores": (
        {"prompt": "q", "responses": ["a", "b"]},
        PAIRS,
        "the scores of responses: found null; needs a number for each answer",
        BAD_MARGIN,
    ),
    "a scored object without text": (
        {"prompt": "q", "answers": [{"score": 1, "model": "m"}, {"score": 2, "model": "n"}]},
        PAIRS,
        "answers: an answer has no text; needs one of response, answer, completion, text, output, generation, content, "
        "message (its keys: score, model)",
        MISSING_VALUE,
    ),
    "a negative margin": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1},
        MARGINS,
        "margin: found -1; needs a number from 0 upwards",
        BAD_MARGIN,
    ),
    "scores that say the opposite": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": "2.5"},
        MARGINS,
        'score_chosen: found 1 beside score_rejected "2.5"; needs the larger score for the chosen answer',
        BAD_MARGIN,
    ),
    "scores that say the opposite, where nobody trains on margins": (
        {"prompt": "q", "messages": [], "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
        LABELS,
        "score_chosen: found 1 beside score_rejected 2; needs the larger score for the chosen answer",
        BAD_MARGIN,
    ),
    "an image": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]},
        PAIRS,
        'images: found ["x.png"], but this program trains on text alone',
        IMAGES,
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_rows_are_named_in_one_sentence(fault: str) -> None:
    row, kind, sentence, reason = BAD[fault]
    with pytest.raises(DataError) as caught:
        parse_preferences(row, kind)
    assert (str(caught.value), caught.value.reason) == (sentence, reason)


@pytest.mark.skipif(not PREFERENCE.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("name, answers", [("dpo_en_demo", 600), ("dpo_zh_demo", 600), ("kto_en_demo", 300)])
def test_real_files_arrive_whole(name: str, answers: int) -> None:
    for row in (rows := json.loads((PREFERENCE / f"{name}.json").read_text(encoding="utf-8"))):
        parsed = parse_preferences(row, LABELS)
        assert not parsed.unused and not parsed.remarks
        prompt = row["messages"][:-1] if "messages" in row else row["conversations"]
        ends = (
            [row[side]["value"] for side in ("chosen", "rejected")]
            if "chosen" in row
            else [row["messages"][-1]["content"]]
        )
        assert [one.label for one in parsed.judged] == [row["label"]] if "label" in row else [True, False]
        for one, end in zip(parsed.judged, ends, strict=True):
            *context, answer = one.sides[0].messages
            assert answer == {"role": "assistant", "content": end}
            assert [turn["content"] for turn in context] == [turn.get("value", turn.get("content")) for turn in prompt]
            assert all(turn.get("train") is False for turn in context if turn["role"] == "assistant")
    assert answers == len(rows) * (1 if "label" in rows[0] else 2)
