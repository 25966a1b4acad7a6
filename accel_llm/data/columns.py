"""The columns of a row: their names in each format, those that `columns` renames, and those that refuse a row."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from accel_llm.chat.messages import MESSAGE_FIELDS
from accel_llm.chat.roles import OUR_ROLES, ROLES
from accel_llm.chat.values import (
    IMAGES,
    MISSING_VALUE,
    NOT_TO_LEARN,
    PREFERENCE_ROW,
    TEXT_ONLY,
    Findings,
    is_nothing,
    read_json,
    show_keys,
    show_value,
)
from accel_llm.config.fields import DataFormat
from accel_llm.data.tokenized import TOKEN_COLUMNS
from accel_llm.errors import ConfigError, DataError

CONVERSATION_COLUMNS = ("system", "tools", "functions", "chat_template_kwargs")
PAIR_COLUMNS = ("history", "context", "reasoning", *CONVERSATION_COLUMNS)
# The fields that `columns` can rename.
COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", *CONVERSATION_COLUMNS, *MESSAGE_FIELDS),
    "alpaca": ("instruction", "input", "output", "response", *PAIR_COLUMNS),
    "prompt_completion": ("prompt", "completion", *PAIR_COLUMNS, *MESSAGE_FIELDS),
    "query_response": ("query", "response", *PAIR_COLUMNS),
    "question_answer": ("question", "answer", *PAIR_COLUMNS),
    "text": ("text",),
    "tokenized": TOKEN_COLUMNS,
}
# No column of these names is a variable of the chat template.
FIELDS = frozenset(name for names in COLUMNS.values() for name in names) - {"context", "reasoning"}
_ROLE = "role:"  # before the name of a role that `columns` maps to ours

_MEDIA_COLUMNS = frozenset({"image", "images", "video", "videos", "audio", "audios"})
# ms-swift, TRL and LLaMA-Factory write the second answer of a preference row in these.
_PREFERENCE_COLUMNS = ("rejected", "rejected_response", "rejected_messages", "chosen")
_LABELS = ("label", "kto_tag")  # of KTO, in TRL and ms-swift, and in LLaMA-Factory
# What messages have to switch training off, on the row. `loss` may also be a number that somebody measured.
_SWITCHES = ("train", "training", "trainable", "loss", "masked")
_FACTORS = ("weight", "loss_weight", "loss_scale", "loss_mask")
# The fields of a row of preferences that `columns` can rename, beside those of its prompt.
PREFERENCE_FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages", *_LABELS, "responses", "scores")
PREFERENCE_FIELDS += ("margin", "score_chosen", "score_rejected")
_TRUTHS = {"true": True, "false": False, "desirable": True, "undesirable": False}  # as text; all cells of .csv are text
SPECIAL_COLUMNS = _MEDIA_COLUMNS | {*_PREFERENCE_COLUMNS, *_LABELS, *_SWITCHES, *_FACTORS}


def column_problems(
    columns: Mapping[str, str], data_format: DataFormat | None = None, preferences: bool = False
) -> list[str]:
    """Return one sentence for each entry of `columns` that `data_format` (None: any format) does not know.

    An entry is a field and the column or key of a message that holds it, or `role:` with a name that messages have for
    a role, and our name of it. With `preferences` the fields of rows of preferences are known, too.
    """
    formats: Iterable[DataFormat] = [data_format] if data_format else COLUMNS
    fields = list(dict.fromkeys(column for name in formats for column in COLUMNS[name]))
    fields += PREFERENCE_FIELDS if preferences else ()
    format_text = f" of data_format {data_format}" if data_format else ""
    problems = []
    for field, column in columns.items():
        if field.startswith(_ROLE) and field != _ROLE and "role" in fields:
            if column not in OUR_ROLES:
                known = ", ".join(OUR_ROLES)
                problems.append(f"columns: {field}={column}, but {column!r} is no role; the roles are {known}.")
        elif field not in fields:
            problem = f"columns: {field}={column}, but {field!r} is not a field{format_text}"
            problems.append(f"{problem}; the fields are {', '.join(fields)}.")
    return problems


class Renames(NamedTuple):
    """The entries of `columns`: field -> column of the row, field -> key of its messages, name of a role -> ours."""

    columns: dict[str, str]
    keys: dict[str, str]
    roles: Mapping[str, str]


@lru_cache
def _read_columns(columns: tuple[tuple[str, str], ...], data_format: DataFormat | None, preferences: bool) -> Renames:
    problems = column_problems(dict(columns), data_format, preferences)
    if problems:
        raise ConfigError(*problems)
    roles = {field.removeprefix(_ROLE): column for field, column in columns if field.startswith(_ROLE)}
    # Fields of messages are keys inside the row; all other fields are columns of it.
    keys = {field: column for field, column in columns if field in MESSAGE_FIELDS}
    others = {field: column for field, column in columns if field not in keys and not field.startswith(_ROLE)}
    return Renames(others, keys, {**ROLES, **roles})


def rename_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], data_format: DataFormat | None, preferences: bool = False
) -> tuple[dict[str, Any], Renames, list[tuple[str, Any]]]:
    """Return the row with columns under our names, the entries of `columns`, and the columns that lost their name.

    Raises:
        ConfigError: `columns` has an entry that `data_format` does not know.
        DataError: the row lacks a column.
    """
    renames = _read_columns(tuple(columns.items()), data_format, preferences)
    for field, column in renames.columns.items():
        if column not in row:
            raise DataError(
                f"columns: {field} is read from {column!r}, which is missing ({show_keys(row)})", MISSING_VALUE
            )
    return _rename(row, renames.columns), renames, _overwritten(row, renames.columns)


def _rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return `values` with each name of `names` in place of the name that it maps to."""
    old_names = set(names.values())
    others = {name: value for name, value in values.items() if name not in old_names}
    return {**others, **{name: values[old_name] for name, old_name in names.items() if old_name in values}}


def _overwritten(values: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Return the names and values that `_rename` replaces by others."""
    old_names = set(names.values())
    taken = [name for name, old_name in names.items() if old_name in values and name in values]
    return [(name, values[name]) for name in taken if name not in old_names]


def rename_keys(turns: Any, field: str, keys: Mapping[str, str], findings: Findings) -> Any:
    """Return `turns` with the keys of its messages under our names.

    Raises:
        DataError: no message has the key that holds the role or the content.
    """
    if not keys:
        return turns
    turns = read_json(turns, field)
    if not isinstance(turns, list):
        return turns
    # A message may lack an optional key, but these keys must be in some message.
    for name in ("role", "content", "human", "assistant"):
        key = keys.get(name)
        if key is not None and not any(isinstance(turn, dict) and key in turn for turn in turns):
            raise DataError(f"columns: {name} is read from {key!r}, which no message of {field} has", MISSING_VALUE)
    for turn in turns:
        for name, value in _overwritten(turn, keys) if isinstance(turn, dict) else ():
            findings.leave(name, "messages", value)
    return [_rename(turn, keys) if isinstance(turn, dict) else turn for turn in turns]


def refuse_media(row: Mapping[str, Any]) -> None:
    """Refuse a row with images, videos or sounds.

    Raises:
        DataError: one of their columns is not empty.
    """
    for column in row:
        if column in _MEDIA_COLUMNS and row[column]:
            raise DataError(f"{column}: found {show_value(row[column])}, but {TEXT_ONLY}", IMAGES)


def refuse_preferences(row: Mapping[str, Any]) -> None:
    """Refuse a row with a second answer, to which the first is preferred.

    Raises:
        DataError: one of the columns for it is not empty.
    """
    for column in _PREFERENCE_COLUMNS:
        value = row.get(column)
        if isinstance(value, str | list | dict) and not is_nothing(value):
            problem = "a row of two answers is for launch/dpo.py (show_data.py dpo), not for this script"
            raise DataError(f"{column}: found {show_value(value)}, but {problem}", PREFERENCE_ROW)


def read_label(row: Mapping[str, Any], data_format: DataFormat) -> frozenset[str]:
    """Return the columns that say that a row's answer is one to learn, as rows for KTO have them.

    Beside question and answer a label that is a number is something else: a class.

    Raises:
        DataError: the answer is not to be learned, or a `kto_tag` is not understood.
    """
    used: set[str] = set()
    for column in (*_LABELS, *_SWITCHES, *_FACTORS):
        value = row.get(column)
        if is_nothing(value):
            continue
        truth = read_truth(value)
        if isinstance(truth, (int, float)) and not isinstance(truth, bool):
            is_class = column == "label" and data_format not in ("messages", "prompt_completion")
            truth = None if is_class or column == "loss" or truth not in (0, 1) else bool(truth)
        if truth is None and column == "kto_tag":
            raise DataError(f"kto_tag: found {show_value(value)}; allowed: true", NOT_TO_LEARN)
        if truth is (column == "masked"):
            _refuse_answer(column, value)
        if truth is not None:
            used.add(column)
    return frozenset(used)


def read_truth(value: Any) -> bool | float | None:
    """Return the boolean or the number that a value is, perhaps as text, or None."""
    if not isinstance(value, str):
        return value if isinstance(value, (bool, int, float)) else None
    word = value.strip().lower()
    try:
        return _TRUTHS[word] if word in _TRUTHS else float(word)
    except ValueError:
        return None


def _refuse_answer(column: str, value: Any) -> None:
    found = f"{column}: found {show_value(value)}, so"
    if column in _LABELS:
        problem = "the answer is one not to learn, which is for launch/kto.py (show_data.py kto), not for this script"
        raise DataError(f"{found} {problem}; allowed: true", NOT_TO_LEARN)
    raise DataError(f"{found} the row is not to be trained; leave it out, or remove the column", NOT_TO_LEARN)
