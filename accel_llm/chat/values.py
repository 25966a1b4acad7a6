"""Reads and shows single values of a row, and lists the reasons for which a row is refused.

Errors about a row are `DataError`s with one of these reasons. Their text has no file, row number or full stop: the
caller knows file and row and completes the sentence.
"""

import json
import re
from collections.abc import Mapping
from json.encoder import encode_basestring
from math import isinf
from typing import Any

from accel_llm.errors import DataError

# Reasons to refuse a row; the ledger counts refused rows by them.
UNKNOWN_SHAPE = "unknown shape"
MISSING_VALUE = "missing value"
NOT_TEXT = "not text"
NOT_JSON = "not JSON"
DOUBLED_KEY = "a key twice in an object"
HUGE_NUMBER = "a number too large"
NOT_MESSAGES = "not a list of messages"
UNKNOWN_ROLE = "unknown role"
EMPTY_ANSWER = "empty answer"
EMPTY_TEXT = "empty text"
NO_ANSWER = "no answer"
ASSISTANT_FIRST = "assistant first"
TWO_USER_TURNS = "two user turns in a row"
TWO_ASSISTANT_TURNS = "two assistant turns in a row"
TOOL_OUT_OF_PLACE = "tool turn out of place"
BROKEN_TOOLS = "broken tools"
BROKEN_VARIABLES = "broken chat_template_kwargs"
TWO_REASONINGS = "two reasonings"
BAD_WEIGHT = "bad weight"
BAD_TOKENS = "bad tokens"
SHIFTED_LABELS = "labels that are not the tokens"
IMAGES = "images"
NOT_TO_LEARN = "an answer not to learn"
PREFERENCE_ROW = "a preference row"
EQUAL_ANSWERS = "chosen equals rejected"
EQUAL_SCORES = "equal scores"
NO_SHARED_PROMPT = "sides that share no prompt"
NO_PREFERENCE = "not a row of preferences"
ONE_END_TOKEN = "an end token on one side only"
BAD_LABEL = "a label that is neither true nor false"
BAD_MARGIN = "a bad margin"
NO_LABEL = "no label"
UNKNOWN_LABEL = "unknown label"
BAD_TARGET = "a label of the wrong kind"
NO_COLUMN = "no column found"
TOO_DEEP = "nested too deep"

SUCH_AS = ", such as "  # before the example of a remark: the ledger joins remarks that differ in it alone
TEXT_ONLY = "this program trains on text alone"

# Control characters, line ends that only some programs know, and halves of characters (lone surrogates).
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SHOWN = 80  # characters of a value
_encode_json = json.JSONEncoder(ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>").encode


class Findings:
    """What reading a row finds beside its messages: values that nothing uses, tools, remarks for the ledger.

    `unused` maps a name such as `'x' of messages` to the values. `tools` holds the tools of system messages, each with
    the name of its place. `calls` holds the functions of tool calls whose arguments may have nulls from Arrow.
    """

    __slots__ = ("calls", "remarks", "tools", "unused")

    def __init__(self) -> None:
        self.unused: dict[str, list[Any]] = {}
        self.tools: list[tuple[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.remarks: list[str] = []

    def leave(self, key: str, place: str, value: Any) -> None:
        """Note a value that nothing uses: `key` of a `place` such as messages. Empty values say nothing."""
        if not is_nothing(value):
            self.unused.setdefault(f"{show_name(key)} of {place}", []).append(value)

    def remark(self, sentence: str) -> None:
        """Note a sentence that is true of this row; the same sentence is kept once."""
        if sentence not in self.remarks:
            self.remarks.append(sentence)


def is_nothing(value: Any) -> bool:
    """Tell whether a value says nothing: null, or an empty text, list or object. Data loaders fill rows with these."""
    return value is None or (not value and isinstance(value, (str, list, dict, tuple)))


def is_blank(value: Any) -> bool:
    """Tell whether a value is nothing, blank text, or a list or object of such values alone."""
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and not value.strip())


def read_text(fields: Mapping[str, Any], field: str) -> str:
    """Return the text of a field.

    Raises:
        DataError: the field is missing or not text.
    """
    value = fields.get(field)
    if isinstance(value, str):
        return value
    problem = f"found {show_value(value)}" if field in fields else "missing"
    raise DataError(
        f"{field}: {problem}; needs text ({show_keys(fields)})", MISSING_VALUE if value is None else NOT_TEXT
    )


def read_json(value: Any, where: str) -> Any:
    """Parse `value` if it is text (blank text gives None); return anything else unchanged.

    Raises:
        DataError: the text is not JSON; `where` names the field.
    """
    if not isinstance(value, str):
        return value
    if not value or value.isspace():
        return None
    try:
        return parse_json(value)
    except DataError as error:
        raise DataError(f"{where}: {error}", error.reason) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: found {show_value(value)}, which is not JSON ({error})", NOT_JSON) from None


def decode_object(value: Any, where: str) -> Any:
    """Return the object that a JSON text holds, also if it was encoded more than once; else `value` unchanged.

    Raises:
        DataError: the text is JSON that loses something when it is read; `where` names the field.
    """
    inner = value
    while isinstance(inner, str):
        try:
            inner = parse_json(inner)
        except DataError as error:
            raise DataError(f"{where}: {error}", error.reason) from None
        except (ValueError, RecursionError):
            return value
    return inner if isinstance(inner, dict) else value


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text; without this the last of two values under one key would be kept in silence."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise DataError(f"found the key {show_name(doubled)} twice in an object; needs each key once", DOUBLED_KEY)
    return result


def _read_number(digits: str) -> float:
    """Return the number that a JSON text writes; one of 1e400 would be infinity."""
    number = float(digits)
    if isinf(number):
        raise DataError(f"found the number {shorten(digits)}; needs at most 1.8e308", HUGE_NUMBER)
    return number


# Parses as `json.loads` does. Raises DataError (without place) if the text has a key twice or too large a number.
parse_json = json.JSONDecoder(object_pairs_hook=_read_object, parse_float=_read_number).decode


def show_value(value: Any) -> str:
    """Format `value` for an error message: JSON in one line of at most 80 characters, all of them printable."""
    # The beginning of a long text is enough; each character is at least one of the JSON.
    return shorten(encode_basestring(value[: _SHOWN + 1]) if isinstance(value, str) else write_json(value))


def write_json(value: Any) -> str:
    """Return `value` as JSON, with the type in place of what JSON cannot write."""
    try:
        return _encode_json(value)
    except (TypeError, ValueError, RecursionError):  # a key, number or nesting that JSON cannot write
        return f"<{type(value).__name__}>"


def shorten(text: str) -> str:
    """Return the first 80 characters of a text, all of them printable; three dots stand for the rest."""
    if len(text) <= _SHOWN and text.isprintable():
        return text
    shown = make_printable(text[: _SHOWN + 1])
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


def show_keys(fields: Mapping[str, Any]) -> str:
    """Format the keys of a row or message for an error message: one line of at most 200 characters of names."""
    names = make_printable(" ".join(", ".join(map(str, fields)).split()))
    return "its keys: " + (names if len(names) <= 200 else names[:197] + "...")


def show_name(name: str) -> str:
    """Format one key or column between quotes, in at most 80 printable characters."""
    return f"'{shorten(str(name))}'"


def make_printable(text: str) -> str:
    """Return `text` with escapes such as \\ud83d in place of characters that a terminal or file cannot show."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
