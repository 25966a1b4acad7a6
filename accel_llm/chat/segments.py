"""Parts of an answer with weights of their own: marks in the text keep their borders through the template."""

import re

from accel_llm.chat.guard import GUARD_CLOSE, GUARD_OPEN
from accel_llm.chat.targets import Target

# A mark holds the number of the weight that counts from there on. Both characters are Unicode noncharacters.
_OPEN, _CLOSE = "\ufdd6", "\ufdd7"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def mark_segments(text: str, segments: list[tuple[int, float]], weights: list[float]) -> str:
    """Return a guarded `text` with a mark at the start of each segment, and one at the end of the last.

    `segments` are pairs (characters, weight) that cover the text without the marks of `guard`. The weights are appended
    to `weights`, whose indices the marks hold; after the last mark the weight is 1 again. Templates may remove
    whitespace around the text, so no mark stands there. A border inside a control token moves to its end.
    """
    plain = text.replace(GUARD_OPEN, "").replace(GUARD_CLOSE, "")
    first, last = len(plain) - len(plain.lstrip()), len(plain.rstrip())
    borders: dict[int, float] = {}  # place in the plain text -> weight from there on
    place = 0
    for characters, weight in segments:
        borders[min(max(place, first), last)] = weight
        place += characters
    borders[last] = 1.0

    pieces, place, inside = [], 0, False
    due: float | None = None  # the weight of a border inside a control token, which is not cut
    for character in text:
        if character not in (GUARD_OPEN, GUARD_CLOSE):
            due = borders.pop(place, due)
            if due is not None and not inside:
                pieces.append(_new_mark(due, weights))
                due = None
            place += 1
        pieces.append(character)
        inside = (inside or character == GUARD_OPEN) and character != GUARD_CLOSE
        if due is not None and not inside:
            pieces.append(_new_mark(due, weights))
            due = None
    return "".join(pieces) + "".join(_new_mark(weight, weights) for weight in borders.values())


def _new_mark(weight: float, weights: list[float]) -> str:
    weights.append(weight)
    return f"{_OPEN}{len(weights) - 1}{_CLOSE}"


def apply_segments(text: str, targets: list[Target], weights: list[float]) -> tuple[str, list[Target]]:
    """Return the text without the marks of `mark_segments`, and its targets cut at the marks, with their weights."""
    plain, borders, place = [], [], 0  # borders: (place in the text, place in the plain text, weight from there on)
    length = 0
    for mark in _MARK.finditer(text):
        plain.append(text[place : mark.start()])
        length += mark.start() - place
        borders.append((mark.start(), length, weights[int(mark[1])]))
        place = mark.end()
    plain.append(text[place:])

    cut: list[Target] = []
    for target in targets:
        inside = [border for border in borders if target.start <= border[0] < target.end]
        start, weight = _plain_place(text, target.start), 1.0
        for end, next_weight in [*((border[1], border[2]) for border in inside), (_plain_place(text, target.end), 1.0)]:
            if end > start and weight:
                cut.append(Target(start, end, target.weight * weight))
            start, weight = end, next_weight
    return "".join(plain), _join_neighbors(cut)


def _plain_place(text: str, place: int) -> int:
    return place - sum(len(mark[0]) for mark in _MARK.finditer(text, 0, place))


def _join_neighbors(targets: list[Target]) -> list[Target]:
    joined: list[Target] = []
    for target in targets:
        if joined and joined[-1].end == target.start and joined[-1].weight == target.weight:
            target = Target(joined.pop().start, target.end, target.weight)
        joined.append(target)
    return joined
