"""The labels of texts: what a label column holds, and the class numbers, or numbers, on which a model is trained."""

import ast
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from accel_llm.chat.values import BAD_TARGET, NO_LABEL, UNKNOWN_LABEL, is_blank, shorten, show_value
from accel_llm.errors import DataError

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)  # Hugging Face's names, as in the config of a model
REGRESSION_NAMES = ("score",)

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,300})(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|[+-]?\.\d+(?:[eE][+-]?\d{1,3})?")
_NOT_FINITE = frozenset({"nan", "inf", "+inf", "-inf", "infinity", "-infinity"})
_TRUTHS = frozenset({"true", "false"})
_BINARY = frozenset({"0", "1"}) | _TRUTHS
_LARGEST = float(np.finfo(np.float32).max)  # targets are float32
_MANY = 20  # labels from which on a label column is checked for looking like something else
_SHOWN = 20  # names in a message
_NEEDED = "needs a name, a number or a list of them"

# A name, or a number as text ("3", "0.5"); of a text with several labels a tuple of them.
Label = str | tuple[str, ...]


class Labels(NamedTuple):
    """What a classifier tells of a text: `problem_type` is one of PROBLEM_TYPES.

    `names` are in the order of the class numbers. For regression they are REGRESSION_NAMES.
    """

    problem_type: str
    names: tuple[str, ...]


class LabelKind(NamedTuple):
    """What labels are read as: the problem type (None: found), and the names of a trained model (None: found)."""

    problem_type: str | None = None
    names: tuple[str, ...] | None = None


class Vocabulary(NamedTuple):
    """The labels, and how a label becomes its targets."""

    labels: Labels
    numbers: dict[str, int]  # label -> class number
    one_hot: bool = False  # lists hold 0 or 1 for each class, in the order of the class numbers
    trained: bool = False  # the names are those of a trained head


def parse_label(value: Any, column: str, several: bool = False) -> Label:
    """Return the label, or labels, of one text; with `several` one label, or a text with commas, is a list too.

    The same number has one form, whether it is written 0, 0.0 or "0", and so has a truth value (true, "True"). A list may be JSON text, or Python's.

    Raises:
        DataError: there is no label, or it is no name and no finite number.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_list(value)
    if several and isinstance(value, str) and value.strip():
        value = re.split(r"\s*[,;|]\s*", value.strip())
    if isinstance(value, list | tuple):
        return tuple(_parse_one(item, column) for item in value)
    one = _parse_one(value, column)
    return (one,) if several else one


def _parse_list(text: str) -> Any:
    """Return the list that a text writes as JSON or as pandas writes it to .csv; another text is itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return text


def _parse_one(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return _write_number(value)
        raise DataError(f"{column}: found {value}; needs a finite number", BAD_TARGET)
    if is_blank(value):
        raise DataError(f"{column}: found no label; {_NEEDED}", NO_LABEL)
    if not isinstance(value, str):
        raise DataError(f"{column}: found {show_value(value)}; {_NEEDED}", BAD_TARGET)
    text = value.strip()
    if text.lower() in _NOT_FINITE:
        raise DataError(f"{column}: found {text}; needs a finite number", BAD_TARGET)
    if not is_number(text):
        return text.lower() if text.lower() in _TRUTHS else text  # as pandas writes a truth value to .csv
    if text.lstrip("+-").isdecimal():
        return str(int(text))
    return _parse_one(float(text), column)


def is_number(text: str) -> bool:
    """Tell whether a label is a number. Numbers with a leading zero, such as 007, are names."""
    return _NUMBER.fullmatch(text) is not None


def _write_number(number: float) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


@dataclass
class LabelCounts:
    """Counts the labels of all rows, so that their kind can be told."""

    labels: Counter[str] = field(default_factory=Counter)  # label -> rows that have it
    rows: int = 0
    lists: int = 0  # rows whose labels are a list
    widths: set[int] = field(default_factory=set)  # lengths of these lists
    binary: bool = True  # these lists hold nothing but 0 and 1, or true and false

    def add(self, label: Label) -> None:
        """Count the label, or labels, of one row."""
        self.rows += 1
        if isinstance(label, str):
            self.labels[label] += 1
            return
        self.lists += 1
        self.widths.add(len(label))
        self.binary = self.binary and _BINARY.issuperset(label)
        self.labels.update(set(label))


def find_vocabulary(counts: LabelCounts, kind: LabelKind, named: tuple[str, ...] | None = None) -> Vocabulary:
    """Return the vocabulary of the labels that were counted. It does not depend on the order of the rows.

    `named` are names that the data gives to the classes, in their order: those of a `datasets.ClassLabel`, or the names
    of columns of 0 and 1. The names of a trained model come before them. Without either, numbers are sorted by value,
    and come before names in the order of the alphabet.

    Raises:
        DataError: the labels are of no problem type, or look like another one than that which would be found.
    """
    problem_type = kind.problem_type or _find_problem_type(counts, kind, named)
    if problem_type == REGRESSION:
        return Vocabulary(Labels(REGRESSION, REGRESSION_NAMES), {})
    one_hot = problem_type == MULTI_LABEL and named is None and _is_one_hot(counts)
    names = kind.names or named
    if names is None:
        _check_classes(counts, kind)
        (width,) = counts.widths if one_hot else (0,)
        names = tuple(map(str, range(width))) if one_hot else tuple(sorted(counts.labels, key=_sort_key))
        _check_kinds(counts, one_hot)
    numbers = {name: number for number, name in enumerate(names)}
    if kind.names and not any(map(is_number, names)):
        # Data may have the class numbers of a trained model in place of its names.
        numbers = {str(number): number for number in range(len(names))} | numbers
    return Vocabulary(Labels(problem_type, names), numbers, one_hot, kind.names is not None)


def _find_problem_type(counts: LabelCounts, kind: LabelKind, named: tuple[str, ...] | None) -> str:
    if counts.lists:
        return MULTI_LABEL
    if kind.names:
        return SINGLE_LABEL if len(kind.names) > 1 else REGRESSION
    if named:
        return SINGLE_LABEL
    numbers = [label for label in counts.labels if is_number(label)]
    # A name among numbers is a bad row, but a number among names is a name.
    mostly_numbers = 2 * sum(counts.labels[label] for label in numbers) >= counts.rows
    fractional = any(not float(label).is_integer() for label in numbers)
    return REGRESSION if fractional and mostly_numbers else SINGLE_LABEL


def _is_one_hot(counts: LabelCounts) -> bool:
    """Tell whether all labels are lists of 0 and 1 of one length. A list of one number is that class."""
    return counts.binary and counts.lists == counts.rows > 0 and len(counts.widths) == 1 and min(counts.widths) > 1


def _sort_key(label: str) -> tuple[bool, float, str]:
    number = is_number(label)
    return not number, float(label) if number else 0.0, label


def _check_classes(counts: LabelCounts, kind: LabelKind) -> None:
    """Check that many labels look like classes. Where the problem type is given, only fractions do not.

    Raises:
        DataError: they look like numbers to learn, or like something that differs from row to row.
    """
    labels, count = counts.labels, len(counts.labels)
    if count < _MANY:
        return
    remedy = f"if each is a class, set problem_type: {MULTI_LABEL if counts.lists else SINGLE_LABEL}"
    alone = sum(number == 1 for number in labels.values())
    if not counts.lists and all(map(is_number, labels)):
        values = [float(label) for label in labels]
        span = f"from {_write_number(min(values))} to {_write_number(max(values))}"
        problem = f"found {count:,} different numbers {span} in {counts.rows:,} rows, which look like a score"
        if not all(value.is_integer() for value in values):
            raise DataError(f"label: {problem}; set problem_type: regression.")
        # Numbers of classes have no gaps.
        if not kind.problem_type and (alone >= _MANY or max(values) - min(values) + 1 > count):
            raise DataError(f"label: {problem}; set problem_type: regression, or {remedy}.")
    if not kind.problem_type and alone >= _MANY and 2 * alone >= count:
        example = ", ".join(map(show_value, sorted(labels, key=_sort_key)[:2]))
        problem = f"{alone:,} of {count:,} labels are those of a single row (such as {example})"
        raise DataError(f"label: {problem}, so this may be no column of labels; name it in columns, or {remedy}.")


def _check_kinds(counts: LabelCounts, one_hot: bool) -> None:
    """Check that a class is written in one way, and that lists hold classes.

    Raises:
        DataError: truth values stand beside numbers, or a list holds fractions.
    """
    labels = sorted(counts.labels, key=_sort_key)
    if not one_hot and not _TRUTHS.isdisjoint(labels) and not {"0", "1"}.isdisjoint(labels):
        found = _list_names(tuple(labels))
        raise DataError(f"label: found truth values beside numbers ({found}); needs one way to write a class.")
    fractions = [label for label in labels if is_number(label) and not float(label).is_integer()]
    if counts.lists and fractions:
        problem = "needs the names or numbers of classes, or 0 or 1 for each; regression has one number for a text"
        raise DataError(f"label: found lists with {_list_names(tuple(fractions))}; {problem}.")


def find_targets(label: Label, vocabulary: Vocabulary, column: str) -> list[float]:
    """Return the targets of one text: its class number, its number, or 0 or 1 for each class.

    Raises:
        DataError: the label is not in the vocabulary, or of another kind than it.
    """
    problem_type, names = vocabulary.labels
    if problem_type != MULTI_LABEL:
        if not isinstance(label, str):
            if len(label) != 1:
                found = show_value(list(label))
                raise DataError(f"{column}: found the list {found}; {problem_type} has one label", BAD_TARGET)
            (label,) = label
        return [
            _target_number(label, column) if problem_type == REGRESSION else _class_number(label, vocabulary, column)
        ]
    if isinstance(label, str):
        raise DataError(f"{column}: found {show_value(label)}; needs a list, as in other rows", BAD_TARGET)
    if vocabulary.one_hot:
        if len(label) != len(names) or not _BINARY.issuperset(label):
            problem = f"needs 0 or 1 for each of {len(names)} classes"
            raise DataError(f"{column}: found {show_value(list(label))}; {problem}", BAD_TARGET)
        return [float(item in ("1", "true")) for item in label]
    targets = [0.0] * len(names)
    for item in label:
        targets[int(_class_number(item, vocabulary, column))] = 1.0
    return targets


def _target_number(label: str, column: str) -> float:
    if not is_number(label) or abs(float(label)) > _LARGEST:
        raise DataError(f"{column}: found {show_value(label)}; regression needs a number", BAD_TARGET)
    return float(label)


def _class_number(label: str, vocabulary: Vocabulary, column: str) -> float:
    number = vocabulary.numbers.get(label)
    if number is None:
        known = f"known are {_list_names(vocabulary.labels.names)}"
        known += ", for which the model's head was trained" * vocabulary.trained
        raise DataError(f"{column}: found {show_value(label)}, which is unknown; {known}", UNKNOWN_LABEL)
    return float(number)


def _list_names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shorten, names[:_SHOWN])) + more


def name_targets(targets: np.ndarray, labels: Labels) -> str:
    """Return the label of one text in words; `targets` [labels] are its class number, its number, or 0 or 1 for each class."""
    if labels.problem_type == REGRESSION:
        return f"{float(targets[0]):g}"
    numbers = np.flatnonzero(targets) if labels.problem_type == MULTI_LABEL else targets.astype(np.int64)
    return _list_names(tuple(labels.names[k] for k in numbers)) or "no label"


def describe_targets(targets: np.ndarray, labels: Labels, limit_rows: int | None = None) -> str:
    """Return a sentence for the ledger on the targets [rows, labels] of all rows to train on.

    Raises:
        DataError: nothing can be learned from them, since all are the same.
    """
    problem_type, names = labels
    begin = f"Labels to train on ({problem_type})"
    if problem_type == REGRESSION:
        low, high, mean, deviation = (
            f"{value:.6g}" for value in (targets.min(), targets.max(), targets.mean(dtype=np.float64), targets.std())
        )
        if low == high:
            raise DataError(f"train_files: the label of all {len(targets):,} rows is {low}; needs different ones.")
        return f"{begin}: numbers from {low} to {high}, mean {mean}, standard deviation {deviation}."
    if problem_type == MULTI_LABEL:
        counts, without = targets.sum(0, dtype=np.int64), int((targets.sum(1) == 0).sum())
    else:
        counts, without = np.bincount(targets[:, 0].astype(np.int64), minlength=len(names)), 0
    used = np.flatnonzero(counts)
    if problem_type == SINGLE_LABEL and len(used) < 2:
        found = f"the label of all {len(targets):,} rows is {names[used[0]]}"
        of_limit = f", and limit_rows reads the first {limit_rows:,} only" if limit_rows else ""
        raise DataError(f"train_files: {found}; a classifier needs rows of two labels or more{of_limit}.")
    if problem_type == MULTI_LABEL and not len(used):
        raise DataError(f"train_files: none of the {len(targets):,} rows has a label.")
    # All classes in their order, or of many those with the most rows.
    shown = range(len(names)) if len(names) <= _SHOWN else sorted(range(len(names)), key=lambda k: -counts[k])[:_SHOWN]
    parts = [f"{shorten(names[k])} ({counts[k]:,})" for k in shown]
    if len(names) > _SHOWN:
        parts.append(f"{len(names) - _SHOWN:,} more, each with at most {counts[shown[-1]]:,}")
    never = tuple(name for name, count in zip(names, counts, strict=True) if not count)
    facts = [f"{begin}, by rows: {', '.join(parts)}"]
    facts += [f"{without:,} rows without a label"] if without else []
    facts += [f"no row teaches {_list_names(never)}"] if never else []
    return "; ".join(facts) + "."
