"""Parts of an answer with weights of their own: marks in the text keep their borders through the template."""

import re
from typing import NamedTuple

from accel_llm.chat.guard import GUARD_CLOSE, GUARD_OPEN
from accel_llm.chat.targets import Target
from accel_llm.errors import DataError

# A mark holds the number of its border. Both characters are Unicode noncharacters.
_OPEN, _CLOSE = "\ufdd6", "\ufdd7"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# What no border cuts: control tokens of people's text, and tags that templates look for.
_WHOLE = re.compile(rf"{GUARD_OPEN}[^{GUARD_CLOSE}]*{GUARD_CLOSE}|</?[\w:]*think(?:ing)?>")


class Border(NamedTuple):
    """A border inside or at the end of an answer: the weight up to it, and from it on.

    `first` is the number of the first border of this answer, `is_last` says whether this is the last one.
    """

    before: float
    after: float
    first: int
    is_last: bool


def mark_segments(
    text: str, segments: list[tuple[int, float]], borders: list[Border], has_reasoning: bool = False
) -> str:
    """Return a guarded `text` with a mark between its segments and at its end.

    `segments` are pairs (characters, weight) that cover the text without the marks of `guard`. The borders are appended
    to `borders`, whose indices the marks hold; after the last one the weight is 1 again. Templates may remove whitespace
    around the text, so no mark stands there, and no border cuts a control token or a tag. There is a mark at the start
    only if the message has a reasoning: some templates look at how an answer begins.
    """
    plain = text.replace(GUARD_OPEN, "").replace(GUARD_CLOSE, "")
    first, last = len(plain) - len(plain.lstrip()), len(plain.rstrip())
    weights: dict[int, float] = {}  # place in the plain text -> weight from there on
    place = 0
    for characters, weight in segments:
        weights[_after_tag(plain, min(max(place, first), last))] = weight
        place += characters
    weights[last] = 1.0
    weight = 1.0 if has_reasoning else weights.pop(first, 1.0)  # a reasoning before the text counts 1

    start, pieces, done = len(borders), [], 0
    for place, next_weight in sorted(weights.items()):
        end = _guarded_place(text, place)
        borders.append(Border(weight, next_weight, start, place == last))
        pieces += [text[done:end], f"{_OPEN}{len(borders) - 1}{_CLOSE}"]
        done, weight = end, next_weight
    return "".join(pieces) + text[done:]


def _after_tag(plain: str, place: int) -> int:
    """Return the place, or the end of the tag that it lies in."""
    return next((tag.end() for tag in _WHOLE.finditer(plain) if tag.start() < place < tag.end()), place)


def _guarded_place(text: str, place: int) -> int:
    """Return where the character `place` of the plain text stands in the guarded one, after a token that it lies in."""
    seen = 0
    for index, character in enumerate(text):
        if character in (GUARD_OPEN, GUARD_CLOSE):
            continue
        if seen == place:
            token = next((one for one in _WHOLE.finditer(text) if one.start() < index < one.end()), None)
            if token and text[index - 1] == GUARD_OPEN:
                return token.start()
            return token.end() if token else index
        seen += 1
    return len(text)


def apply_segments(text: str, targets: list[Target], borders: list[Border]) -> tuple[str, list[Target]]:
    """Return the text without the marks of `mark_segments`, and its targets cut at the marks, with their weights.

    Raises:
        DataError: the template has lost some of the marks of an answer.
    """
    marks = list(_MARK.finditer(text))
    _check_complete([int(mark[1]) for mark in marks], borders)
    cut: list[Target] = []
    for target in targets:
        inside = [mark for mark in marks if target.start <= mark.start() < target.end]
        start, weight = target.start, borders[int(inside[0][1])].before if inside else 1.0
        for mark in inside:
            cut.append(Target(_plain_place(marks, start), _plain_place(marks, mark.start()), target.weight * weight))
            start, weight = mark.end(), borders[int(mark[1])].after
        cut.append(Target(_plain_place(marks, start), _plain_place(marks, target.end), target.weight * weight))
    return _MARK.sub("", text), _join_neighbors([one for one in cut if one.end > one.start and one.weight])


def _check_complete(numbers: list[int], borders: list[Border]) -> None:
    expected: int | None = None  # the number of the next mark of an answer that has begun
    for number in numbers:
        border = borders[number]
        if number != (border.first if expected is None else expected):
            break
        expected = None if border.is_last else number + 1
    else:
        if expected is None:
            return
    raise DataError("weight: the chat template rewrites an answer whose parts have different weights", "bad weight")


def _plain_place(marks: list[re.Match[str]], place: int) -> int:
    return place - sum(mark.end() - mark.start() for mark in marks if mark.end() <= place)


def _join_neighbors(targets: list[Target]) -> list[Target]:
    joined: list[Target] = []
    for target in targets:
        if joined and joined[-1].end == target.start and joined[-1].weight == target.weight:
            target = Target(joined.pop().start, target.end, target.weight)
        joined.append(target)
    return joined
