"""Masks and weights beside token ids."""

from typing import Any

import pytest

from accel_llm.chat.values import BAD_TOKENS, SHIFTED_LABELS
from accel_llm.data.formats import parse_row
from accel_llm.data.tokenized import TRAINED_MASKS, TokenizedRow
from accel_llm.errors import DataError

IDS = {"input_ids": [5, 6, 7, 8]}


def read(row: dict[str, Any], **options: Any) -> TokenizedRow:
    parsed = parse_row({**IDS, **row}, **options)
    assert isinstance(parsed, TokenizedRow)
    return parsed


def refused(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.reason == BAD_TOKENS
    return str(caught.value)


@pytest.mark.parametrize("name", TRAINED_MASKS)
def test_a_mask_says_which_tokens_are_trained(name: str) -> None:
    for mask in ([0, 1, 1, 0], [False, True, True, False], [0.0, 1.0, 1.0, 0.0], (0, 1, 1, 0)):
        parsed = read({name: mask})
        assert parsed[:3] == ([5, 6, 7, 8], [-100, 6, 7, -100], None) and parsed.unused == ()
    assert read({name: None}).labels == [5, 6, 7, 8]


def test_a_prompt_mask_says_which_tokens_are_not() -> None:
    assert read({"prompt_mask": [1, 1, 0, 0]}).labels == [-100, -100, 7, 8]


def test_labels_and_every_mask_must_agree() -> None:
    row = {"labels": [-100, 6, 7, 8], "loss_mask": [1, 1, 1, 0], "prompt_mask": [0, 1, 0, 0]}
    assert read(row).labels == [-100, -100, 7, -100]
    assert read({"loss_mask": [0, 0, 0, 0]}).labels == [-100] * 4


def test_the_row_is_not_changed() -> None:
    row = {"input_ids": [5, 6], "labels": [5, 6], "loss_mask": [0, 1]}
    parse_row(row)
    assert row == {"input_ids": [5, 6], "labels": [5, 6], "loss_mask": [0, 1]}


def test_masks_that_are_refused() -> None:
    assert refused({"loss_mask": [1, 1]}) == "loss_mask: found 2 for 4 input_ids; needs one for each"
    assert refused({"loss_mask": []}) == "loss_mask: found 0 for 4 input_ids; needs one for each"
    needs = "needs a list of 0 and 1, one for each token"
    assert refused({"loss_mask": [0, 1, 2, 1]}) == f"loss_mask: found [0, 1, 2, 1]; {needs}"
    assert refused({"prompt_mask": "0110"}) == f'prompt_mask: found "0110"; {needs}'
    assert refused({"tool_mask": [1, 1, 1, 1]}) == (
        "tool_mask: a mask of unknown meaning; known are assistant_masks, assistant_mask, completion_mask, loss_mask, "
        "response_mask, action_mask, train_mask, label_mask, prompt_mask; columns: loss_mask=tool_mask names one where "
        "1 is trained"
    )
    assert refused({"Mask": [0]}).startswith("Mask: a mask of unknown meaning")


def test_masks_that_say_nothing_of_training() -> None:
    row = {"attention_mask": [1, 1, 1, 1], "special_tokens_mask": [1, 0, 0, 0], "mask_id": 3}
    parsed = read(row)
    assert parsed.labels == [5, 6, 7, 8]
    assert [name for name, _ in parsed.unused] == ["column 'special_tokens_mask'", "column 'mask_id'"]


def test_a_mask_may_have_another_name() -> None:
    assert read({"tool_mask": [0, 1, 1, 1]}, columns={"loss_mask": "tool_mask"}).labels == [-100, 6, 7, 8]


def test_weights_of_tokens() -> None:
    parsed = read({"weights": [0, 0.5, 1, 2]})
    assert parsed[:3] == ([5, 6, 7, 8], [-100, 6, 7, 8], [0.0, 0.5, 1.0, 2.0])
    assert read({"loss_weights": [1, 1, 1, 1.0]})[:3] == ([5, 6, 7, 8], [5, 6, 7, 8], None)
    assert read({"weights": [1, 1, 2, 0], "loss_weights": [1, 0.5, 0.5, 1]}).weights == [1.0, 0.5, 1.0, 0.0]
    assert read({"weights": None}).weights is None
    needs = "needs a list of numbers from 0 upwards, one for each token"
    for bad in ([1, -1, 1, 1], [True, 1, 1, 1], 7, "x", [float("nan")] * 4, [float("inf")] * 4, [10**400] * 4):
        assert refused({"weights": bad}).endswith(f"; {needs}")
    assert refused({"loss_weights": [1.0]}) == "loss_weights: found 1 for 4 input_ids; needs one for each"


@pytest.mark.parametrize("name", ["weights", "loss_weights", "loss_weight", "loss_scale", "token_weights"])
def test_every_name_of_token_weights(name: str) -> None:
    parsed = read({name: [0, 0.5, 1, 2]})
    assert parsed[:4] == ([5, 6, 7, 8], [-100, 6, 7, 8], [0.0, 0.5, 1.0, 2.0], ())
    needs = "needs a list of numbers from 0 upwards, one for each token"
    assert refused({name: 0.5}) == f"{name}: found 0.5; {needs}"


@pytest.mark.parametrize("name", ["targets", "target_ids", "target", "label", "label_ids", "labels_ids"])
def test_labels_under_another_name_are_refused(name: str) -> None:
    row = {name: [-100, -100, 7, 8]}
    assert refused(row) == (
        f"{name}: found one value for each of 4 input_ids, but no labels; columns: labels={name} takes it for labels "
        "that are not shifted"
    )
    assert read(row, columns={"labels": name}).labels == [-100, -100, 7, 8]
    parsed = read({**row, "labels": [-100, 6, 7, 8]})
    assert parsed.labels == [-100, 6, 7, 8] and [unused for unused, _ in parsed.unused] == [f"column '{name}'"]
    assert read({name: [1]}).labels == [5, 6, 7, 8]


@pytest.mark.parametrize("name", ["prompt_length", "prompt_len", "source_length", "source_len"])
def test_a_length_of_the_prompt_alone_is_refused(name: str) -> None:
    assert refused({name: 2}) == (
        f"{name}: found 2, but no labels and no mask, so the prompt would be trained; needs labels, or a prompt_mask"
    )
    for more in ({"labels": [-100, -100, 7, 8]}, {"prompt_mask": [1, 1, 0, 0]}):
        parsed = read({name: 2, **more})
        assert parsed.labels == [-100, -100, 7, 8] and [unused for unused, _ in parsed.unused] == [f"column '{name}'"]
    assert read({name: 0}).labels == [5, 6, 7, 8]


def test_labels_that_are_shifted_are_refused() -> None:
    for labels in ([6, 7, 8, -100], [5, 6, 7, 9], [-100, -100, 8, 8]):
        with pytest.raises(DataError, match="needs labels that are not shifted") as caught:
            read({"labels": labels})
        assert caught.value.reason == SHIFTED_LABELS
    assert read({"labels": [-100] * 4}).labels == [-100] * 4
