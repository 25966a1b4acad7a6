"""Parse a row of preferences: two answers to one prompt, several answers with scores, or one answer with a label.

Each side becomes a conversation, parsed as a row of fine-tuning is: the prompt, whose answers are context, and the
answer, which is trained. A bad row raises DataError, see data/formats.py.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from accel_llm.chat.messages import READS_NOTHING
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.values import (
    BAD_LABEL,
    BAD_MARGIN,
    EMPTY_ANSWER,
    EQUAL_ANSWERS,
    MISSING_VALUE,
    NO_ANSWER,
    NO_PREFERENCE,
    is_nothing,
    show_keys,
    show_value,
)
from accel_llm.config.fields import DataFormat
from accel_llm.data.columns import PREFERENCE_FIELDS, read_truth, refuse_media, rename_columns
from accel_llm.data.formats import NO_RENAMES, Conversation
from accel_llm.data.ledger import Unused
from accel_llm.data.scored import find_answer_list, pair_scored_answers
from accel_llm.data.sides import (
    MESSAGE_LISTS,
    SIDE_COLUMNS,
    PreferenceReader,
    compare_conversations,
    read_sides,
    read_tuning_row,
    replace_answer,
    with_context,
)
from accel_llm.data.unused import count_characters, list_unused
from accel_llm.errors import DataError

_SCORES_OF_SIDES = ("score_chosen", "score_rejected")
EQUAL_SCORES_REMARK = "both answers of a pair have the same score: its margin is 0."
_KNOWN = (
    "chosen and rejected (beside prompt, question, query, instruction, messages or conversations, or as whole "
    "conversations), rejected_response or rejected_messages (beside a row of fine-tuning), responses with scores"
)


class PreferenceKind(NamedTuple):
    """What rows of preferences are read for.

    `labelled`: single answers, each with a label (KTO), else pairs. `margins`: read how much better the chosen answer
    is (reward models). `all_pairs`: of several scored answers take each two, not only the best and the worst.
    """

    labelled: bool = False
    margins: bool = False
    all_pairs: bool = False


class Judged(NamedTuple):
    """The chosen and the rejected answer to a prompt, or one answer with a label (True: desirable)."""

    sides: tuple[Conversation, ...]
    margin: float = 0.0
    label: bool | None = None


class PreferenceRow(NamedTuple):
    """What a row of preferences holds; for the fields after the first see `Conversation`."""

    judged: list[Judged]
    unused: tuple[tuple[str, Unused], ...]
    characters: int
    remarks: tuple[str, ...]


def parse_preferences(
    row: Mapping[str, Any],
    kind: PreferenceKind,
    data_format: DataFormat | None = None,
    columns: Mapping[str, str] = {},
    reads: TemplateReads = READS_NOTHING,
) -> PreferenceRow:
    """Parse `row` into pairs, or into single answers with labels; see `parse_row` for the other arguments.

    A pair gives two labelled answers: the chosen one is desirable, the rejected one is not. In a conversation with a
    label, or with `rejected_response`, the last turn is the answer, and all before it is the prompt. The prompt of two
    whole conversations are the turns with which both begin.

    Raises:
        DataError: the row is bad; `reason` is one of those in `accel_llm.chat.values`.
        ConfigError: `columns` names an unknown field.
    """
    characters, overwritten, renames = count_characters(row), [], NO_RENAMES
    refuse_media(row)
    if columns:
        row, renames, overwritten = rename_columns(row, columns, data_format, preferences=True)
    reader = PreferenceReader(_open_input(row), renames, data_format, reads)
    judged = _read_row(reader, kind)
    for pair in judged:
        _check_answers(pair.sides)
    if kind.labelled and judged[0].label is None:
        judged = [Judged((side,), label=k == 0) for pair in judged for k, side in enumerate(pair.sides)]

    # What nothing uses: columns that belong to no side, then what the sides found beside their messages.
    row = reader.row
    left = [(name, row[name]) for name in row if name in SIDE_COLUMNS and name not in reader.used]
    unused = dict(list_unused([*left, *overwritten], reader.findings))
    sides = [side for one in judged for side in one.sides]
    for k, side in enumerate(sides):
        for name, values in side.unused:
            if k == 0 or not name.startswith("column "):
                unused.setdefault(name, values)
    remarks = [*reader.findings.remarks, *(remark for side in sides for remark in side.remarks)]
    return PreferenceRow(judged, tuple(unused.items()), characters, tuple(dict.fromkeys(remarks)))


def _open_input(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with other names of both sides, LLaMA-Factory's or OpenAI's, with the columns that others have."""
    if row.get("chosen_messages") and row.get("rejected_messages"):
        names = {"chosen_messages": "chosen", "rejected_messages": "rejected"}
        others = {name: value for name, value in row.items() if name not in names.values()}
        return {names.get(name, name): value for name, value in others.items()}
    if not isinstance(row.get("input"), dict) or "preferred_output" not in row:
        return row
    names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    columns = {names.get(name, name): value for name, value in row.items() if name != "input"}
    return columns | row["input"]


def _read_row(reader: PreferenceReader, kind: PreferenceKind) -> list[Judged]:
    row = reader.row
    has = {name: not is_nothing(row.get(name)) for name in PREFERENCE_FIELDS}
    if has["chosen"] or has["rejected"]:
        return [Judged(read_sides(reader), _read_margin(reader, kind))]
    if has["rejected_messages"]:
        turns = next((name for name in MESSAGE_LISTS if row.get(name)), None)
        if turns is None:
            raise DataError(f"messages: missing beside rejected_messages ({show_keys(row)})", MISSING_VALUE)
        reader.used |= {turns, "rejected_messages"}
        sides = compare_conversations(reader, {turns: row[turns], "rejected_messages": row["rejected_messages"]})
        return [Judged(sides, _read_margin(reader, kind))]
    if has["rejected_response"]:
        return [Judged(replace_answer(reader), _read_margin(reader, kind))]
    if isinstance(two := row.get("output"), list) and len(two) == 2 and all(isinstance(text, str) for text in two):
        # LLaMA-Factory's first format.
        reader.row = {**row, "chosen": two[0], "rejected": two[1]}
        reader.used.add("output")
        return [Judged(read_sides(reader), _read_margin(reader, kind))]
    labels = [name for name in ("label", "kto_tag") if has[name]]
    if kind.labelled and labels:
        return [_read_labelled(reader, labels[0])]
    if column := find_answer_list(row):
        return _read_scored(reader, column, kind)
    if labels:
        raise DataError(
            f"{labels[0]}: found an answer with a label, which is for KTO; needs two answers: {_KNOWN}", NO_PREFERENCE
        )
    for name in ("label", "kto_tag") if kind.labelled else ():
        if name in row:
            raise DataError(
                f"{name}: found {show_value(row[name])}; allowed: true (desirable) and false (undesirable)", BAD_LABEL
            )
    for name in ("rejected", "chosen", "rejected_response"):
        if name in row:
            raise DataError(f"{name}: found {show_value(row[name])}; needs an answer", EMPTY_ANSWER)
    label = "a conversation or a prompt and completion with label or kto_tag, " if kind.labelled else ""
    raise DataError(f"no preference in this row: {show_keys(row)}; known are {label}{_KNOWN}", NO_PREFERENCE)


def _read_scored(reader: PreferenceReader, column: str, kind: PreferenceKind) -> list[Judged]:
    row = reader.row
    # With all pairs an answer in the middle would be desirable and undesirable.
    all_pairs = kind.all_pairs and not kind.labelled
    pairs, used = pair_scored_answers(row, column, all_pairs, reader.findings)
    judged = []
    for chosen, rejected, difference in pairs:
        reader.row = {**row, "chosen": chosen, "rejected": rejected}
        judged.append(Judged(read_sides(reader), difference if kind.margins else 0.0))
    reader.used |= used
    return judged


def _read_labelled(reader: PreferenceReader, column: str) -> Judged:
    """Read a row of fine-tuning whose answer has a label.

    Where a completion is a list of messages, all of it is the answer.
    """
    value = read_truth(reader.row[column])
    if value not in (0, 1):  # 1, 1.0 and true are equal
        found = show_value(reader.row[column])
        raise DataError(f"{column}: found {found}; allowed: true (desirable) and false (undesirable)", BAD_LABEL)
    reader.used.add(column)
    parsed = read_tuning_row(reader, PREFERENCE_FIELDS)
    whole = any(reader.row.get(name) for name in MESSAGE_LISTS)
    explicit = isinstance(reader.row.get("completion"), list) and not whole
    return Judged((parsed if explicit else with_context(parsed, len(parsed.messages) - 1),), label=bool(value))


def _read_margin(reader: PreferenceReader, kind: PreferenceKind) -> float:
    """Return how much better the chosen answer is: `margin`, or the difference of the scores; 0 without them.

    Only reward models train on margins. But nothing may be trained on an answer that its own row calls the worse one.

    Raises:
        DataError: it is no number, or negative.
    """
    row = reader.row
    difference = None
    if all(not is_nothing(row.get(name)) for name in _SCORES_OF_SIDES):
        chosen, rejected = (read_truth(row[name]) for name in _SCORES_OF_SIDES)
        difference = math.nan if chosen is None or rejected is None else chosen - rejected
    if kind.margins and not is_nothing(row.get("margin")):
        reader.used.add("margin")
        margin = read_truth(row["margin"])
        if margin is None or isinstance(margin, bool) or not 0 <= margin < math.inf:
            raise DataError(f"margin: found {show_value(row['margin'])}; needs a number from 0 upwards", BAD_MARGIN)
        return float(margin)
    if difference is None:
        return 0.0
    if difference < 0 or (kind.margins and not difference < math.inf):
        found = " beside score_rejected ".join(show_value(row[name]) for name in _SCORES_OF_SIDES)
        raise DataError(f"score_chosen: found {found}; needs the larger score for the chosen answer", BAD_MARGIN)
    if not kind.margins:
        return 0.0
    reader.used |= {*_SCORES_OF_SIDES}
    if difference == 0:
        reader.findings.remark(EQUAL_SCORES_REMARK)
    return float(difference)


def _check_answers(sides: tuple[Conversation, ...]) -> None:
    """Check that each side ends with an answer, and that two sides differ."""
    for conversation in sides:
        last = conversation.messages[-1]
        if last["role"] != "assistant" or not last.get("train", True):
            problem = f"the last turn is a {last['role']} turn" if last["role"] != "assistant" else "it is not trained"
            raise DataError(f"the answer: {problem}; needs an assistant turn to train on", NO_ANSWER)
    if len(sides) == 2 and sides[0].messages == sides[1].messages:
        raise DataError("rejected: found the chosen answer again; needs another one", EQUAL_ANSWERS)
