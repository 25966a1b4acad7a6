"""Reads rows that are token ids already, with the labels, masks and weights beside them."""

import sys
from collections.abc import Mapping
from operator import ne
from typing import Any, NamedTuple

from accel_llm.chat.targets import IGNORED
from accel_llm.chat.values import BAD_TOKENS, MISSING_VALUE, SHIFTED_LABELS, make_printable, show_keys, show_value
from accel_llm.data.ledger import Unused
from accel_llm.errors import DataError

# Masks with a value for each token: 1 where it is trained, or 1 where it is not.
TRAINED_MASKS = (
    *("assistant_masks", "assistant_mask", "completion_mask", "loss_mask", "response_mask", "action_mask"),
    *("train_mask", "label_mask"),
)
UNTRAINED_MASKS = ("prompt_mask",)
TOKEN_WEIGHTS = ("weights", "loss_weights", "loss_weight", "loss_scale", "token_weights")
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", *TRAINED_MASKS, *UNTRAINED_MASKS, *TOKEN_WEIGHTS)
# Without labels or a mask, these say what is trained in a way that nobody knows for sure.
_OTHER_LABELS = ("targets", "target_ids", "target", "label", "label_ids", "labels_ids")
_PROMPT_LENGTHS = ("prompt_length", "prompt_len", "source_length", "source_len")
_OTHER_MASKS = ("attention_mask", "special_tokens_mask")  # these say nothing about training
_MAX_TOKEN_ID = 2**31 - 1  # ids are stored as int32


class TokenizedRow(NamedTuple):
    """Token ids; `labels[k]` belongs to `input_ids[k]` (unshifted) and is IGNORED where it is not trained.

    `weights[k]` is the weight of that label in the loss; None if all are 1. For the other fields see `Conversation`.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    unused: tuple[tuple[str, Unused], ...] = ()
    characters: int = 0
    remarks: tuple[str, ...] = ()


def read_tokens(row: Mapping[str, Any]) -> TokenizedRow:
    """Read token ids. A token is trained if `labels` and every mask say so; without any, all of them are trained.

    Raises:
        DataError: a column is no list of the right numbers, or of another length than `input_ids`; a mask of a name
            that is not known.
    """
    ids = _read_integers(row, "input_ids")
    if min(ids) < 0:
        raise DataError(f"input_ids: found {min(ids)}; needs token ids from 0 upwards", BAD_TOKENS)
    mask = row.get("attention_mask")
    if mask is not None and 0 in _read_integers(row, "attention_mask"):
        raise DataError("attention_mask: found padding; needs rows without padding", BAD_TOKENS)
    labels = list(ids) if row.get("labels") is None else _read_labels(row, ids)
    has_mask = False
    for column in row:
        if "mask" in column.lower():
            has_mask = _apply_mask(row, column, labels) or has_mask
    if row.get("labels") is None and not has_mask:
        _refuse_other_labels(row, len(ids))
    return TokenizedRow(ids, labels, _read_weights(row, labels))


def _read_labels(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    labels = _read_integers(row, "labels")
    _check_length("labels", labels, len(ids))
    if min(labels) < 0:
        bad_label = next((label for label in labels if label < 0 and label != IGNORED), None)
        if bad_label is not None:
            raise DataError(
                f"labels: found {bad_label}; needs token ids, or {IGNORED} where nothing is trained", BAD_TOKENS
            )
    # No id is negative, so each ignored label differs from its token.
    if labels != ids and sum(map(ne, labels, ids)) != labels.count(IGNORED):
        index = next(k for k, label in enumerate(labels) if label not in (ids[k], IGNORED))
        problem = f"found {labels[index]}, but input_ids[{index}] is {ids[index]}"
        needed = f"needs labels that are not shifted: each is the token at its own place, or {IGNORED}"
        raise DataError(f"labels[{index}]: {problem}; {needed}", SHIFTED_LABELS)
    return labels


def _refuse_other_labels(row: Mapping[str, Any], length: int) -> None:
    """Refuse a row with a column that seems to say what is trained, under a name that says it in no certain way."""
    for column in _OTHER_LABELS:
        value = row.get(column)
        if isinstance(value, list | tuple) and len(value) == length:
            remedy = f"columns: labels={column} takes it for labels that are not shifted"
            raise DataError(
                f"{column}: found one value for each of {length} input_ids, but no labels; {remedy}", BAD_TOKENS
            )
    for column in _PROMPT_LENGTHS:
        if isinstance(row.get(column), int) and row[column]:
            problem = f"found {show_value(row[column])}, but no labels and no mask, so the prompt would be trained"
            raise DataError(f"{column}: {problem}; needs labels, or a prompt_mask", BAD_TOKENS)


def _apply_mask(row: Mapping[str, Any], column: str, labels: list[int]) -> bool:
    """Set the labels to IGNORED that a mask does not train, and return whether the column is such a mask.

    Raises:
        DataError: the mask has another length or other values than 0 and 1, or nobody knows what it means.
    """
    mask = row[column]
    if column in _OTHER_MASKS or mask is None:
        return False
    if column not in TRAINED_MASKS and column not in UNTRAINED_MASKS:
        if not isinstance(mask, list | tuple):
            return False  # no mask of tokens
        known = ", ".join((*TRAINED_MASKS, *UNTRAINED_MASKS))
        remedy = f"columns: loss_mask={column} names one where 1 is trained"
        raise DataError(make_printable(f"{column}: a mask of unknown meaning; known are {known}; {remedy}"), BAD_TOKENS)
    # 1, 1.0 and true are equal.
    if not isinstance(mask, list | tuple) or any(value not in (0, 1) for value in mask):
        raise DataError(f"{column}: found {show_value(mask)}; needs a list of 0 and 1, one for each token", BAD_TOKENS)
    _check_length(column, mask, len(labels))
    untrained = 0 if column in TRAINED_MASKS else 1
    for index, value in enumerate(mask):
        if value == untrained:
            labels[index] = IGNORED
    return True


def _read_weights(row: Mapping[str, Any], labels: list[int]) -> list[float] | None:
    """Return the product of the columns of weights, None if it is 1 everywhere. A weight of 0 trains nothing."""
    result: list[float] | None = None
    for column in TOKEN_WEIGHTS:
        weights = row.get(column)
        if weights is None:
            continue
        if not isinstance(weights, list | tuple) or not all(map(_is_weight, weights)):
            raise DataError(
                f"{column}: found {show_value(weights)}; needs a list of numbers from 0 upwards, one for each token",
                BAD_TOKENS,
            )
        _check_length(column, weights, len(labels))
        result = [float(a) * b for a, b in zip(weights, result or [1.0] * len(labels), strict=True)]
    if result is None or result == [1.0] * len(labels):
        return None
    for index, weight in enumerate(result):
        if weight == 0:
            labels[index] = IGNORED
    return result


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _check_length(column: str, values: list[Any] | tuple[Any, ...], length: int) -> None:
    if len(values) != length:
        raise DataError(f"{column}: found {len(values)} for {length} input_ids; needs one for each", BAD_TOKENS)


def _read_integers(row: Mapping[str, Any], field: str) -> list[int]:
    """Return a copy of the integers in a column: token ids, labels or a mask."""
    numbers = row[field]
    if numbers is None:
        raise DataError(f"{field}: found null; needs a list of integers ({show_keys(row)})", MISSING_VALUE)
    # set(map(type)) is the fastest way to check thousands of numbers; unlike isinstance it tells bool from int.
    if not isinstance(numbers, list | tuple) or set(map(type, numbers)) != {int} or max(numbers) > _MAX_TOKEN_ID:
        raise DataError(f"{field}: found {show_value(numbers)}; needs a list of one or more integers", BAD_TOKENS)
    return list(numbers)
