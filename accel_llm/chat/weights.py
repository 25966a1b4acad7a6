"""Reads which messages are trained, and with which weight, from the keys that data sets use for it.

`train` is Axolotl's key, `training` and `trainable` are other names of it, `loss` belongs to xtuner, AgentInstruct and
ms-swift, `output_with_loss` to xtuner, `masked` to torchtune. `weight` belongs to OpenAI and Mistral, `loss_weight` to LLaMA-Factory, `loss_scale` to
ms-swift. `train_detail` is Axolotl's list of the characters that are trained.
"""

import sys
from collections.abc import Mapping
from typing import Any

from accel_llm.chat.values import BAD_WEIGHT, Findings, read_json, show_value
from accel_llm.errors import DataError

SWITCHES = ("train", "training", "trainable", "loss", "output_with_loss")  # true or false
_FACTORS = ("weight", "loss_weight", "loss_scale")  # a number
WEIGHT_KEYS = frozenset({*SWITCHES, *_FACTORS, "masked", "train_detail"})
_DETAIL_KEYS = ("begin_offset", "end_offset", "train")
_ASSISTANT_ONLY = "only assistant turns are trained (train_on: all trains everything)"

Segments = list[tuple[int, float]]  # (characters, weight), one after the other


def read_weight(fields: Mapping[str, Any], role: str) -> float:
    """Return the weight of a message or of a part of one: the product of what its keys say, 1 if they say nothing.

    Raises:
        DataError: a value that is not allowed, or one that trains a turn of another role than assistant.
    """
    if WEIGHT_KEYS.isdisjoint(fields):
        return 1.0
    weight = 1.0
    for field in SWITCHES:
        weight *= _read_switch(fields, field, role)
    for field in _FACTORS:
        weight *= _read_factor(fields, field, role)
    masked = fields.get("masked")
    if masked not in (None, False, True):
        raise DataError(f"masked: found {show_value(masked)}; allowed: true (context only) and false", BAD_WEIGHT)
    return 0.0 if masked else weight


def _read_switch(fields: Mapping[str, Any], field: str, role: str) -> float:
    value = fields.get(field)
    if value is None:
        return 1.0
    if value not in (False, True):
        raise DataError(f"{field}: found {show_value(value)}; allowed: true and false (context only)", BAD_WEIGHT)
    if value and role != "assistant":
        raise DataError(f"{field}: found true in a {role} turn, but {_ASSISTANT_ONLY}", BAD_WEIGHT)
    return float(value)


def _read_factor(fields: Mapping[str, Any], field: str, role: str) -> float:
    value = fields.get(field)
    if value is None:
        return 1.0
    # The last comparison refuses NaN, infinity and whole numbers too large for a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise DataError(f"{field}: found {show_value(value)}; needs a number from 0 (context only) upwards", BAD_WEIGHT)
    if value not in (0, 1) and role != "assistant":
        found = show_value(value)
        raise DataError(f"{field}: found {found} in a {role} turn; needs 0 or 1, as {_ASSISTANT_ONLY}", BAD_WEIGHT)
    return float(value)


def set_weight(message: dict[str, Any], weight: float, segments: Segments | None = None) -> None:
    """Write the weight of a message, and of the segments of its content, into its fields `train`, `weight`, `segments`.

    The weight of a character is the product of both. A field that would say what holds without it is left out: only
    `train` False, a `weight` other than 0 and 1, and segments that differ are written.
    """
    weights = {segment for _, segment in segments or ()}
    if segments and len(weights) == 1:
        weight *= weights.pop()
    elif segments and weight:
        message["segments"] = segments
    if weight == 0:
        message["train"] = False
    elif weight != 1:
        message["weight"] = weight


def read_train_detail(details: Any, content: str, role: str, findings: Findings) -> Segments | None:
    """Return the segments of `content` that Axolotl's `train_detail` describes; None if it is empty.

    Each detail has `begin_offset`, `end_offset` (the last character that belongs to it) and `train`. As in Axolotl,
    characters of which no detail speaks are not trained. Other keys of a detail go to `findings`.

    Raises:
        DataError: the details do not fit the content, or train a turn of another role than assistant.
    """
    details = read_json(details, "train_detail")
    if not details:
        return None
    if not isinstance(details, list):
        raise DataError(f"train_detail: found {show_value(details)}; needs a list of details", BAD_WEIGHT)
    segments: Segments = []
    end = 0  # of what the segments cover
    for index, (begin, next_end, train) in enumerate(_read_detail(d, k, role, findings) for k, d in enumerate(details)):
        if not end <= begin < next_end <= len(content):
            offsets = f"begin_offset {begin} and end_offset {next_end - 1}"
            needed = f"offsets in order from {end} to {len(content) - 1}, the last character"
            raise DataError(f"train_detail[{index}]: found {offsets}; needs {needed}", BAD_WEIGHT)
        if begin > end:
            segments.append((begin - end, 0.0))
        segments.append((next_end - begin, float(train)))
        end = next_end
    if end < len(content):
        segments.append((len(content) - end, 0.0))
    return segments


def _read_detail(detail: Any, index: int, role: str, findings: Findings) -> tuple[int, int, bool]:
    """Return the first character of a detail, the one after its last, and whether it is trained."""
    values = [detail.get(key) for key in _DETAIL_KEYS] if isinstance(detail, dict) else []
    if [type(value) for value in values] != [int, int, bool]:
        needed = "begin_offset and end_offset (whole numbers) and train (true or false)"
        raise DataError(f"train_detail[{index}]: found {show_value(detail)}; needs {needed}", BAD_WEIGHT)
    for key, value in detail.items() if len(detail) > 3 else ():
        if key not in _DETAIL_KEYS:
            findings.leave(key, "train_detail", value)
    begin, last, train = (detail[key] for key in _DETAIL_KEYS)
    if train and role != "assistant":
        raise DataError(f"train_detail[{index}].train: found true in a {role} turn, but {_ASSISTANT_ONLY}", BAD_WEIGHT)
    return begin, last + 1, train
