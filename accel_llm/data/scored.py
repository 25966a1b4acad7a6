"""Turns a row of several answers with scores or ranks into pairs: the best against the worst, or each two of them."""

from collections.abc import Mapping
from itertools import combinations
from math import isfinite
from typing import Any

from accel_llm.chat.values import BAD_MARGIN, EQUAL_SCORES, MISSING_VALUE, Findings, is_nothing, show_keys, show_value
from accel_llm.data.columns import read_truth
from accel_llm.errors import DataError

# Lists of answers, and lists of numbers beside them.
ANSWER_LISTS = ("responses", "completions", "answers", "candidates", "candidates_completions", "generations")
_SCORE_LISTS = ("scores", "ratings", "rating", "rewards")
_RANK_LISTS = ("ranks", "ranking", "rank")  # 1 is the best
SCORED_COLUMNS = (*ANSWER_LISTS, *_SCORE_LISTS, *_RANK_LISTS)
# Keys of an answer that is an object; the first one that is there counts.
_TEXT_KEYS = ("response", "answer", "completion", "text", "output", "generation", "content", "message")
_SCORE_KEYS = ("score", "overall_score", "reward", "rating")


def find_answer_list(row: Mapping[str, Any]) -> str | None:
    """Return the column with a list of several answers; None if there is none."""
    return next((name for name in ANSWER_LISTS if isinstance(row.get(name), list) and len(row[name]) > 1), None)


def pair_scored_answers(
    row: Mapping[str, Any], column: str, all_pairs: bool, findings: Findings
) -> tuple[list[tuple[Any, Any, float]], set[str]]:
    """Return pairs (better answer, worse answer, difference of their scores), and the columns that were read.

    An answer is as the row has it: a text, a message, or a list of messages. Ranks have no difference that says how
    much better an answer is: with them it is 0. Keys of an answer that nothing uses go to `findings`.

    Raises:
        DataError: an answer has no score, or all of them have the same one.
    """
    answers, used = row[column], {column}
    values, name = [_read_key(answer, _SCORE_KEYS) for answer in answers], f"the scores of {column}"
    sign = 1
    if any(value is None for value in values):
        lists = [other for other in (*_SCORE_LISTS, *_RANK_LISTS) if isinstance(row.get(other), list)]
        if lists:
            values, name = row[lists[0]], lists[0]
            used.add(name)
            sign = -1 if name in _RANK_LISTS else 1
        elif all(isinstance(answer, dict) and "rank" in answer for answer in answers):
            values, name, sign = [answer["rank"] for answer in answers], f"the ranks of {column}", -1
    if len(values) != len(answers):
        raise DataError(f"{name}: found {len(values)} for {len(answers)} {column}; needs one for each", MISSING_VALUE)
    scores = [sign * _read_score(value, name) for value in values]

    # Best first; answers of equal score keep their order.
    order = sorted(range(len(answers)), key=lambda k: -scores[k])
    places = list(combinations(order, 2)) if all_pairs else [(order[0], order[-1])]
    places = [(better, worse) for better, worse in places if scores[better] > scores[worse]]
    if not places:
        raise DataError(f"{name}: all are {show_value(values[0])}, so no answer is better than another", EQUAL_SCORES)
    sides = [_read_answer(answer, column, findings) for answer in answers]
    return [(sides[a], sides[b], scores[a] - scores[b] if sign == 1 else 0.0) for a, b in places], used


def _read_key(answer: Any, keys: tuple[str, ...]) -> Any:
    """Return the first value of `keys` that an answer has; None if it has none, or is no object."""
    if not isinstance(answer, dict):
        return None
    return next((answer[key] for key in keys if not is_nothing(answer.get(key))), None)


def _read_score(value: Any, name: str) -> float:
    """Return a number, perhaps given as text.

    Raises:
        DataError: it is missing, or no number.
    """
    number = read_truth(value)
    if number is None or isinstance(number, bool) or not isfinite(number):
        raise DataError(f"{name}: found {show_value(value)}; needs a number for each answer", BAD_MARGIN)
    return float(number)


def _read_answer(answer: Any, column: str, findings: Findings) -> Any:
    """Return the answer that an object holds; a message, a list of messages or a text is one itself."""
    if not isinstance(answer, dict) or answer.get("role") or answer.get("from"):
        return answer
    key = next((key for key in _TEXT_KEYS if not is_nothing(answer.get(key))), None)
    if key is None:
        needed = ", ".join(_TEXT_KEYS)
        raise DataError(f"{column}: an answer has no text; needs one of {needed} ({show_keys(answer)})", MISSING_VALUE)
    for name, value in answer.items():
        if name != key and name not in (*_SCORE_KEYS, "rank"):
            findings.leave(name, column, value)
    return answer[key]
