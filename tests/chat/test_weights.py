from typing import Any

import pytest
from support import USER, assistant

from accel_llm.chat.messages import read_messages
from accel_llm.chat.values import BAD_WEIGHT
from accel_llm.errors import DataError

ONLY = "only assistant turns are trained (train_on: all trains everything)"


def read(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return read_messages(list(turns), "messages")


def refused(*turns: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read(*turns)
    assert caught.value.reason == BAD_WEIGHT
    return str(caught.value)


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss", "output_with_loss"])
def test_a_switch_makes_a_turn_context(key: str) -> None:
    assert read(assistant(**{key: False})) == [assistant(train=False)]
    for value in (True, None, 1):
        assert read(assistant(**{key: value})) == [assistant()]
    for role in ("user", "system", "tool"):
        turn = {"role": role, "content": "x"}
        assert read({**turn, key: None}) == [turn]
        assert read({**turn, key: False}) == [{**turn, "train": False}]
        sentence = f"messages[0].{key}: found true in a {role} turn, but {ONLY}"
        assert refused({**turn, key: True}) == sentence
    assert refused(assistant(**{key: "no"})) == (
        f'messages[0].{key}: found "no"; allowed: true and false (context only)'
    )
    assert refused(assistant(**{key: 0.5})) == f"messages[0].{key}: found 0.5; allowed: true and false (context only)"


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale"])
def test_a_factor_weighs_a_turn(key: str) -> None:
    assert read(assistant(**{key: 0.0})) == [assistant(train=False)]
    assert read(assistant(**{key: 0.5})) == [assistant(weight=0.5)]
    for value in (1.0, None):
        assert read(assistant(**{key: value})) == [assistant()]
    assert read({**USER, key: 1.0}) == [USER]
    assert read({**USER, key: 0}) == [{**USER, "train": False}]
    sentence = f"messages[0].{key}: found 0.5 in a user turn; needs 0 or 1, as {ONLY}"
    assert refused({**USER, key: 0.5}) == sentence
    assert (
        refused(assistant(**{key: -1})) == f"messages[0].{key}: found -1; needs a number from 0 (context only) upwards"
    )


def test_masked_is_the_opposite_of_train() -> None:
    assert read(assistant(masked=True)) == [assistant(train=False)]
    assert read({**USER, "masked": True}) == [{**USER, "train": False}]
    for value in (False, None):
        assert read(assistant(masked=value), {**USER, "masked": value}) == [assistant(), USER]
    assert refused(assistant(masked="x")) == ('messages[0].masked: found "x"; allowed: true (context only) and false')


def test_several_keys_together_are_a_product() -> None:
    assert read(assistant(weight=0.5, loss_scale=4, train=True)) == [assistant(weight=2.0)]
    assert read(assistant(loss=True, train=False, weight=3)) == [assistant(train=False)]
    assert read(assistant(loss=True, masked=True)) == [assistant(train=False)]


def test_a_pair_of_question_and_answer_has_the_weight_of_its_answer() -> None:
    assert read({"human": "q", "assistant": "a", "loss": False}) == [USER, assistant(train=False)]


def text(content: str, **keys: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **keys}


PARTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "train": (
        [text("No.", train=False), text(" Yes.", train=True)],
        {},
        {"content": "No. Yes.", "segments": [(3, 0.0), (5, 1.0)]},
    ),
    "weight": (
        [text("No.", weight=0), text(" Yes."), text("!", loss_scale=0.5)],
        {},
        {"content": "No. Yes.!", "segments": [(3, 0.0), (5, 1.0), (1, 0.5)]},
    ),
    "all alike": ([text("ab", weight=0.5), text("c", loss_weight=0.5)], {}, {"content": "abc", "weight": 0.5}),
    "nothing": ([text("ab", loss=False), text("c", masked=True)], {}, {"content": "abc", "train": False}),
    "everything": ([text("ab", train=True), text("c")], {}, {"content": "abc"}),
    "empty parts have no segment": (
        [text("", train=False), text("a"), text("b", train=False)],
        {},
        {"content": "ab", "segments": [(1, 1.0), (1, 0.0)]},
    ),
    "a part may be empty and the rest alike": ([text("", train=False), text("a")], {}, {"content": "a"}),
    "beside the weight of the turn": (
        [text("a", train=False), text("b")],
        {"weight": 0.5},
        {"content": "ab", "segments": [(1, 0.0), (1, 1.0)], "weight": 0.5},
    ),
    "in a turn of context": ([text("a", train=False), text("b")], {"loss": False}, {"content": "ab", "train": False}),
    "beside reasoning": (
        [{"type": "thinking", "thinking": "t"}, text("a", train=False), text("b")],
        {},
        {"content": "ab", "segments": [(1, 0.0), (1, 1.0)], "reasoning_content": "t", "thinking": "t"},
    ),
    "reasoning of context in a turn of context": (
        [{"type": "thinking", "thinking": "t", "train": False}, text("a", train=False)],
        {},
        {"content": "a", "train": False, "reasoning_content": "t", "thinking": "t"},
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_with_weights(case: str) -> None:
    parts, keys, message = PARTS[case]
    assert read(assistant(content=parts, **keys)) == [{"role": "assistant", **message}]


def test_parts_that_cannot_have_a_weight() -> None:
    question = {"role": "user", "content": [text("q", train=True)]}
    assert refused(question) == f"messages[0].content[0].train: found true in a user turn, but {ONLY}"
    assert read({"role": "user", "content": [text("q", train=False)]}) == [{**USER, "train": False}]
    assert refused(assistant(content=[text("a", weight="1")])) == (
        'messages[0].content[0].weight: found "1"; needs a number from 0 (context only) upwards'
    )
    thought = {"type": "reasoning", "text": "t", "train": False}
    assert refused(assistant(content=[thought, text("a")])) == (
        'messages[0].content[0]: the part of type "reasoning" has the weight 0; a part of an answer that is no text needs '
        "1, or all parts need 0"
    )
    assert refused(assistant(reasoning_content=[text("t", train=False)])) == (
        'messages[0].reasoning_content: found [{"type": "text", "text": "t", "train": false}]; needs text, or parts of '
        "text without weights"
    )
    reasoning = [text("t"), text("u", train=True)]
    assert read(assistant(reasoning_content=reasoning)) == [assistant(reasoning_content="tu", thinking="tu")]


def detail(begin: int, end: int, train: Any) -> dict[str, Any]:
    return {"begin_offset": begin, "end_offset": end, "train": train}


def test_train_detail_of_the_documentation() -> None:
    """Axolotl's own example: offsets of words, the last character of each belongs to it."""
    content = "I'm doing very well, thank you!"
    details = [detail(0, 8, False), detail(9, 18, True), detail(19, 30, False)]
    expected = {"role": "assistant", "content": content, "segments": [(9, 0.0), (10, 1.0), (12, 0.0)]}
    for value in (details, str(details).replace("'", '"').replace("False", "false").replace("True", "true")):
        assert read({"from": "assistant", "value": content, "train_detail": value}) == [expected]


def test_characters_without_a_detail_are_not_trained() -> None:
    (message,) = read(assistant(content="abcdef", train_detail=[detail(1, 2, True), detail(4, 4, True)]))
    assert message["segments"] == [(1, 0.0), (2, 1.0), (1, 0.0), (1, 1.0), (1, 0.0)]
    assert read(assistant(content="ab", train_detail=[detail(0, 1, True)])) == [assistant(content="ab")]
    assert read(assistant(train_detail=[detail(0, 0, False)])) == [assistant(train=False)]
    for nothing in (None, [], "", "[]"):
        assert read(assistant(train_detail=nothing)) == [assistant()]


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        (
            assistant(train_detail=[detail(0, 1, True)]),
            "[0]: found begin_offset 0 and end_offset 1; needs offsets in order from 0 to 0, the last character",
        ),
        (
            assistant(content="abc", train_detail=[detail(0, 1, True), detail(1, 2, False)]),
            "[1]: found begin_offset 1 and end_offset 2; needs offsets in order from 2 to 2, the last character",
        ),
        (
            assistant(train_detail=[{"begin_offset": 0, "train": True}]),
            '[0]: found {"begin_offset": 0, "train": true}; needs begin_offset and end_offset (whole numbers) and train '
            "(true or false)",
        ),
        (assistant(train_detail=7), ": found 7; needs a list of details"),
        ({**USER, "train_detail": [detail(0, 0, True)]}, f"[0].train: found true in a user turn, but {ONLY}"),
        (
            assistant(content=[text("a")], train_detail=[detail(0, 0, True)]),
            ": found beside a list of parts; needs a content of one text",
        ),
    ],
)
def test_details_that_do_not_fit(turn: dict[str, Any], problem: str) -> None:
    assert refused(turn) == f"messages[0].train_detail{problem}"


def test_details_of_a_question_may_say_that_nothing_is_trained() -> None:
    assert read({**USER, "train_detail": [detail(0, 0, False)]}) == [{**USER, "train": False}]
