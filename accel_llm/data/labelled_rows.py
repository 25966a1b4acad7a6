"""Parse a row into one text, or two, and its label. A bad row raises DataError, see data/formats.py."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from accel_llm.chat.guard import check_encodable
from accel_llm.chat.values import (
    BAD_TARGET,
    EMPTY_TEXT,
    MISSING_VALUE,
    NO_COLUMN,
    NO_LABEL,
    is_blank,
    is_nothing,
    read_text,
    show_keys,
    show_value,
)
from accel_llm.data.columns import read_truth, refuse_media
from accel_llm.data.labels import Label, is_number, parse_label
from accel_llm.data.ledger import Unused
from accel_llm.data.unused import count_characters, list_unused
from accel_llm.errors import DataError

LABELLED_FIELDS = ("text", "text_pair", "label")  # what `columns` can rename
# Names of columns, in small letters. Beside the names of two texts no other text may stand.
_TEXTS = (
    *("text", "sentence", "content", "review", "review_text", "review_body", "reviewtext", "comment", "comment_text"),
    *("tweet", "document", "body", "message", "utterance", "question", "query", "title", "headline", "description"),
    *("abstract", "passage"),
)
_PAIRS = (
    *(("text", "text_pair"), ("text_a", "text_b"), ("text1", "text2"), ("sentence1", "sentence2")),
    *(("sentence_a", "sentence_b"), ("sent1", "sent2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("question", "passage"), ("question", "answer"), ("query", "passage")),
    *(("query", "document"), ("s1", "s2")),
)
_LABELS = (
    *("label", "labels", "target", "targets", "class", "classes", "category", "categories", "class index"),
    *("gold_label", "score", "stars", "rating", "sentiment", "polarity", "intent", "emotion", "topic"),
)
_TEXT_NAMES = frozenset(_TEXTS) | {name for pair in _PAIRS for name in pair}
_BY_NUMBER = "name its columns by number, as in columns: text=0 label=1"


class LabelledRow(NamedTuple):
    """One text, or two, and the label. `names` are those that the row's source gives to its classes, in their order.

    For the fields from `unused` on see `Conversation` in data/formats.py.
    """

    text: str
    text_pair: str | None
    label: Label
    label_column: str
    names: tuple[str, ...] | None
    unused: tuple[tuple[str, Unused], ...]
    characters: int
    remarks: tuple[str, ...] = ()


class LabelledColumns(NamedTuple):
    """The columns of a row that are read: several for the label are columns of 0 and 1, whose names are the classes."""

    text: str
    text_pair: str | None
    labels: tuple[str, ...]


def labelled_column_problems(columns: Mapping[str, str]) -> list[str]:
    """Return one sentence for each entry of `columns` that is no field of a text with a label."""
    return [
        f"columns: {field}={column}, but {field!r} is not a field of a text with a label; the fields are "
        f"{', '.join(LABELLED_FIELDS)}."
        for field, column in columns.items()
        if field not in LABELLED_FIELDS
    ]


def parse_labelled(
    row: Mapping[str, Any],
    columns: Mapping[str, str] = {},
    class_names: Mapping[str, tuple[str, ...]] = {},
    several: bool = False,
) -> LabelledRow:
    """Parse `row`; `columns` maps `text`, `text_pair` and `label` to its columns, and what it lacks is found.

    `label` may be mapped to several columns of 0 and 1 with commas between them. `class_names` holds the names of the
    class numbers in a column, and `several` says that a label that is no list is a list of labels, too.

    Raises:
        DataError: the row is bad; `reason` is one of those in `accel_llm.chat.values`.
    """
    refuse_media(row)
    found = _find_columns(tuple(row), tuple(columns.items()))
    text = _read_text(row, found.text)
    text_pair = None if found.text_pair is None else _read_text(row, found.text_pair)
    label_column = ", ".join(found.labels)
    if len(found.labels) > 1:
        label, names = _read_binary_columns(row, found.labels), found.labels
    else:
        names = class_names.get(label_column)
        value = row[label_column]
        label = parse_label(_name_classes(value, names, label_column) if names else value, label_column, several)
    unused = ()
    if len(row) > len(found.labels) + 1 + (text_pair is not None):
        used = {found.text, found.text_pair, *found.labels}
        unused = list_unused([(name, value) for name, value in row.items() if name not in used], None)
    return LabelledRow(text, text_pair, label, label_column, names, unused, count_characters(row))


def describe_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Say which columns of a row, which `parse_labelled` can read, are its texts and its label."""
    found = _find_columns(tuple(row), tuple(columns.items()))
    pair = "" if found.text_pair is None else f" and {found.text_pair}"
    return f"text from {found.text}{pair}, label from {', '.join(found.labels)}"


def parse_texts(row: Mapping[str, Any], columns: Mapping[str, str] = {}) -> tuple[str, str | None]:
    """Return the text of a row, or both, for a model that tells the label: the row need not have one.

    For `columns` see `parse_labelled`; an entry for `label` says only which columns hold no text.

    Raises:
        DataError: the row is bad; `reason` is one of those in `accel_llm.chat.values`.
    """
    refuse_media(row)
    text, text_pair = _find_text_columns(tuple(row), tuple(columns.items()))
    return _read_text(row, text), None if text_pair is None else _read_text(row, text_pair)


def _read_text(row: Mapping[str, Any], column: str) -> str:
    """Return a text as it stands.

    Raises:
        DataError: it is empty, no text, or holds half of a character.
    """
    if is_nothing(row[column]) or is_blank(row[column]):
        raise DataError(f"{column}: the text is empty ({show_keys(row)})", EMPTY_TEXT)
    text = read_text(row, column)
    check_encodable(text)
    return text


def _read_binary_columns(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the columns that hold 1."""
    labels = []
    for column in columns:
        value = read_truth(row[column])
        if value not in (0, 1):  # 1, 1.0 and true are equal
            found = show_value(row[column])
            reason = NO_LABEL if is_blank(row[column]) else BAD_TARGET
            raise DataError(f"{column}: found {found}; needs 0 or 1, as a column of one label", reason)
        if value:
            labels.append(column)
    return tuple(labels)


def _name_classes(value: Any, names: tuple[str, ...], column: str) -> Any:
    """Return the names of class numbers; `datasets` has -1 where a row has no label."""
    if isinstance(value, list):
        return [_name_classes(item, names, column) for item in value]
    if isinstance(value, int):
        if value == -1:
            raise DataError(f"{column}: found -1, which says that the row has no label", NO_LABEL)
        if not 0 <= value < len(names):
            raise DataError(f"{column}: found {value}, but the column has {len(names)} names of classes", BAD_TARGET)
        return names[value]
    return value


@lru_cache(maxsize=1024)
def _find_columns(keys: tuple[str, ...], columns: tuple[tuple[str, str], ...]) -> LabelledColumns:
    """Find the columns of a row by their names.

    Raises:
        DataError: a column is missing, or several may be meant.
    """
    labels = _split_labels(dict(columns).get("label"), keys)
    text, text_pair = _find_text_columns(keys, columns)
    if not labels:
        left = [key for key in keys if key not in (text, text_pair) and key.strip().lower() in _LABELS]
        labels = tuple(left)
        if len(labels) != 1:
            _refuse_columns("label", list(labels), keys)
    return LabelledColumns(text, text_pair, labels)


@lru_cache(maxsize=1024)
def _find_text_columns(keys: tuple[str, ...], columns: tuple[tuple[str, str], ...]) -> tuple[str, str | None]:
    """Find the columns of the text, or of both texts, of a row by their names.

    Raises:
        DataError: a column is missing, or several may be meant.
    """
    given = dict(columns)
    for field, column in columns:
        if field != "label" and column not in keys:
            raise DataError(
                f"columns: {field} is read from {column!r}, which is missing ({_show(keys)})", MISSING_VALUE
            )
    taken = {*given.values(), *map(str.strip, given.get("label", "").split(","))}
    text, text_pair = given.get("text"), given.get("text_pair")
    if text is None:
        left = [key for key in keys if key not in taken and _is_name(key)]
        text, pair = _find_texts({key.strip().lower(): key for key in left}, keys, text_pair is not None)
        text_pair = text_pair or pair
    return text, text_pair


def _is_name(key: str) -> bool:
    return key.strip().lower() in _TEXT_NAMES


def _split_labels(given: str | None, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns that `columns` names for the label: one, or several with commas between them."""
    if given is None:
        return ()
    if given in keys:
        return (given,)
    names = tuple(name.strip() for name in given.split(","))
    for name in names:
        if name not in keys:
            raise DataError(f"columns: label is read from {name!r}, which is missing ({_show(keys)})", MISSING_VALUE)
    return names


def _find_texts(names: dict[str, str], keys: tuple[str, ...], single: bool) -> tuple[str, str | None]:
    """Return the columns of the text, or of both texts; `names` maps known names to the columns that have them."""
    pairs = [] if single else [pair for pair in _PAIRS if names.keys() >= {*pair}]
    alone = [name for name in names if name in _TEXTS]
    if len(pairs) == 1 and {*pairs[0]}.issuperset(alone):
        return names[pairs[0][0]], names[pairs[0][1]]
    if pairs or len(alone) != 1:
        _refuse_columns("text", list(names.values()) if pairs else [names[name] for name in alone], keys)
    return names[alone[0]], None


def _refuse_columns(field: str, found: list[str], keys: tuple[str, ...]) -> None:
    """Refuse a row because of its columns: none is known for `field`, or several are.

    Raises:
        DataError: always.
    """
    if found:
        problem = f"several columns may be the {field}: {', '.join(found)}"
        pair = " (and text_pair=...)" if field == "text" else ""
        raise DataError(f"{problem}; choose with columns: {field}={found[0]}{pair}", NO_COLUMN)
    known = ", ".join(_LABELS if field == "label" else _TEXTS)
    problem = f"no column is known as the {field} ({_show(keys)})"
    remedy = f"name it with columns: {field}=..., or by number if the file has no header"
    raise DataError(f"{problem}; known are {known}; {remedy}", NO_COLUMN)


def _show(keys: tuple[str, ...]) -> str:
    return show_keys(dict.fromkeys(keys))


def name_columns(cells: list[list[str]], columns: Mapping[str, str], needs_label: bool = True) -> list[str] | None:
    """Return names for the columns of a table without a header; None if its first line is the header.

    `cells` are the first lines. Where `columns` names columns by number, from 0, these numbers are the names. Else the
    first line is a header if it names a known column, unless it has a number or what later lines have as well. A header
    names a text and, with `needs_label`, a label.

    Raises:
        DataError: numbers are given for a table with a header, or a table has no header and nobody knows its columns.
    """
    first, rest = [cell.strip() for cell in cells[0]], cells[1:]
    places = [str(place) for place in range(len(first))]
    parts = columns.get("label", "").split(",")
    given = list(filter(None, map(str.strip, (columns.get("text", ""), columns.get("text_pair", ""), *parts))))
    if first == places or any(name in first and not name.isdecimal() for name in given):
        return None
    names = [cell.lower() for cell in first]
    knows_label = not needs_label or any(name in _LABELS for name in names)
    knows_text = any(name in _TEXT_NAMES for name in names)
    if numbers := [name for name in given if name.isdecimal()]:
        if missing := [name for name in numbers if name not in places]:
            raise DataError(f"columns: {missing[0]} is no column of its {len(first)}, which count from 0")
        labels = [int(name) for name in numbers if name in map(str.strip, parts)]
        if (knows_text and knows_label) or any(_is_heading(cells, k) for k in labels):
            raise DataError(
                f"columns: its first line is a header ({', '.join(first)}), so name the columns, not their numbers"
            )
        return places
    if knows_text and knows_label:
        return None
    if not any(
        is_number(cell) or any(line[k : k + 1] == cells[0][k : k + 1] for line in rest)
        for k, cell in enumerate(first)
        if cell
    ):
        return None  # a header of names that nobody knows is refused at its first row
    labels = [k for k in range(len(first)) if _looks_like_labels([line[k] for line in cells if k < len(line)])]
    if len(first) != 2 or len(labels) != 1:
        raise DataError(f"its first line is a row, not a header; {_BY_NUMBER}")
    return ["label", "text"] if labels == [0] else ["text", "label"]


def _is_heading(cells: list[list[str]], column: int) -> bool:
    """Tell whether the first cell of a column is a name, and all others are numbers."""
    others = [line[column].strip() for line in cells[1:] if column < len(line)]
    return bool(others) and not is_number(cells[0][column].strip()) and all(map(is_number, others))


def _looks_like_labels(cells: list[str]) -> bool:
    """Tell whether all cells are numbers, or few different short ones."""
    values = {cell.strip() for cell in cells}
    if all(is_number(value) for value in values):
        return True
    return 2 * len(values) <= len(cells) and all(len(value.split()) <= 4 for value in values)
