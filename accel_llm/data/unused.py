"""Counts what a row holds, and what of it nothing uses."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from accel_llm.chat.values import Findings, is_nothing, show_name, show_value, write_json
from accel_llm.data.ledger import Unused

_LONGEST_RECORD = 100  # characters of a short text
# Last words of names that record where a row comes from or how good it is, whatever stands before them.
_LAST_WORDS = (
    r"id|ids|idx|index|uuid|guid|hash|md5|sha\d*|checksum|digest|url|uri|link|path|file|filename|source|origin|dataset|"
    r"subset|split|category|subcategory|domain|score|rating|rank|reward|quality|difficulty|votes|likes|timestamp|date|"
    r"datetime|created|updated|language|lang|locale|license|licence|engine|generator|author|annotator|version|revision"
)
# Other words of which a record may consist. `answer_type` and `prompt_length` say something of the row: no records.
_WORDS = "type|tag|level|length|len|size|count|model|name|time|year|at|n|tokens?|chars?|words?|turns?|row|data"
_RECORDS = re.compile(
    rf"(?:.*_)?(?:{_LAST_WORDS})|(?:num|n|sha\d*|md5|hash)_\w+|(?:{_LAST_WORDS}|{_WORDS})(?:_(?:{_LAST_WORDS}|{_WORDS}))*"
)


def count_characters(row: Mapping[str, Any]) -> int:
    """Return the characters of all values of a row, as `measure` counts them."""
    total = 0
    for value in row.values():
        # Most rows hold texts, or a list of messages that are objects of texts.
        if type(value) is str:
            total += len(value)
        elif type(value) is list and value and type(value[0]) is dict:
            try:
                total += sum(
                    [len(part) if type(part) is str else measure(part) for turn in value for part in turn.values()]
                )
            except AttributeError:  # not only objects
                total += measure(value)
        elif value is not None:
            total += measure(value)
    return total


def measure(value: Any) -> int:
    """Return the characters of one value: of a text its own, of objects in a list their values, else of its JSON.

    Each number in a list of numbers counts as one.
    """
    if isinstance(value, str):
        return len(value)
    if is_nothing(value):
        return 0
    if isinstance(value, (list, tuple)):
        if isinstance(value[0], (int, float)):
            return len(value)
        if isinstance(value[0], dict) and all(type(item) is dict for item in value):
            return sum(measure(part) for item in value for part in item.values())
    return len(write_json(value))


def list_unused(columns: Iterable[tuple[str, Any]], findings: Findings | None) -> tuple[tuple[str, Unused], ...]:
    """Return by name what nothing uses: the columns, and what `findings` has of messages, parts and calls."""
    unused = [(f"column {show_name(name)}", _count(name, [value])) for name, value in columns if not is_nothing(value)]
    for name, values in findings.unused.items() if findings else ():
        unused.append((name, _count(name[1:].partition("' of ")[0], values)))
    return tuple(unused)


def _count(name: str, values: list[Any]) -> Unused:
    is_record, characters = is_record_name(name), 0
    for value in values:
        is_record = is_record and _is_record_value(value)
        characters += measure(value)
    first = values[0]
    # The beginning of a long list of words or numbers is enough for an example.
    if isinstance(first, list) and isinstance(first[0], (int, float, str)):
        first = first[:_LONGEST_RECORD]
    return Unused(1, characters, show_value(first), is_record)


@lru_cache(maxsize=4096)
def is_record_name(name: str) -> bool:
    """Tell whether a column or key of this name plainly records where a row comes from or how good it is."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower().strip("_")
    return _RECORDS.fullmatch(snake) is not None


def _is_record_value(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_RECORD and len(value.splitlines()) <= 1
    return isinstance(value, (bool, int, float))
