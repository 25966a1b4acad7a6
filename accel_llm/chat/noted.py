"""For speed only: numbers, lists and loops that note what a template asks of them. They serve `prefixes` alone.

A part of a template gets them in place of what depends on the conversation's length. A `Number` instead of the length
notes the outcome of comparisons, a `View` instead of the list of messages notes how far it was read. Where no note is
fine enough, the exact value is noted. An operation that could escape the notes raises `NotCovered`.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any, Protocol

from jinja2.runtime import Undefined

Key = Any  # COUNT, PROMPT, ("variable", name) or (number of a namespace, attribute)
COUNT = "count"  # the key of the prefix's number of messages

_ENDLESS = range(1 << 40)  # the items of a range that ends with the conversation


class NotCovered(BaseException):
    """A template does what cannot be noted. Not an Exception, because Jinja catches those when it tries an operation."""


class Notes(Protocol):
    """What takes the notes; `state` has the true values by key."""

    state: dict[Key, Any]

    def note(self, key: Key, low: float, high: float) -> None:
        """Note that the number of this key lies in this range."""
        ...

    def at_least(self, count: int) -> bool:
        """Return whether the prefix has so many messages, and note it."""
        ...


def plain(value: Any) -> Any:
    """Return a number or list as Python's own, with its exact value noted; anything else unchanged."""
    if type(value) is Loop:
        raise NotCovered
    return value.plain() if type(value) in (Number, View) else value


def _on_plain(method: str) -> Callable[..., Any]:
    def act(self: Any, *args: Any) -> Any:
        own = self.plain()
        return getattr(own, method)(*map(plain, args)) if hasattr(own, method) else NotImplemented

    return act


class Number:
    """A whole number of which comparisons are noted; `base + shift`, where `base` is the value of `key`."""

    __slots__ = ("base", "key", "notes", "shift")

    def __init__(self, notes: Notes, key: Key, base: int, shift: int):
        self.notes, self.key, self.base, self.shift = notes, key, base, shift

    def plain(self) -> int:
        self.notes.note(self.key, self.base, self.base)
        return self.base + self.shift

    def _below(self, limit: int) -> bool:
        limit -= self.shift
        below = self.base < limit
        self.notes.note(self.key, -inf if below else limit, limit - 1 if below else inf)
        return below

    def _compare(self, other: Any, method: str, by_limit: Callable[[int], bool]) -> Any:
        compare = getattr(operator, method)
        if type(other) is Number and other.key == self.key:
            return compare(self.shift, other.shift)
        if type(other) is Number and self.key != COUNT:  # a range of counts is worth more
            return compare(self.plain(), other)
        other = plain(other)
        return by_limit(other) if isinstance(other, int) else compare(self.plain(), other)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, "__lt__", self._below)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, "__le__", lambda limit: self._below(limit + 1))

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, "__gt__", lambda limit: not self._below(limit + 1))

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, "__ge__", lambda limit: not self._below(limit))

    def __eq__(self, other: Any) -> Any:
        return self._compare(other, "__eq__", self._is)

    def __ne__(self, other: Any) -> Any:
        return not self == other

    def _is(self, value: int) -> bool:
        if self.base + self.shift == value:
            self.plain()
            return True
        self._below(value if self.base + self.shift < value else value + 1)
        return False

    def __bool__(self) -> bool:
        return not self._is(0)

    def __add__(self, other: Any) -> Any:
        return self._moved(other, 1) if type(other) is int else self.plain() + plain(other)

    def __sub__(self, other: Any) -> Any:
        if type(other) is Number and other.key == self.key:
            return self.shift - other.shift
        return self._moved(other, -1) if type(other) is int else self.plain() - plain(other)

    def __radd__(self, other: Any) -> Any:
        return self + other

    def _moved(self, by: int, sign: int) -> "Number":
        return Number(self.notes, self.key, self.base, self.shift + sign * by)


class View:
    """The messages of a prefix from `start` on, without the last `-cut` ones; or whole numbers in their place.

    It notes how far it is read. `backward`: from the last one to the first.
    """

    __slots__ = ("_items", "backward", "cut", "notes", "start")

    def __init__(self, notes: Notes, items: Sequence[Any], start: int = 0, cut: int = 0, backward: bool = False):
        self.notes, self._items, self.start, self.cut, self.backward = notes, items, start, cut, backward

    @property
    def key(self) -> Any:
        return id(self._items), self.start, self.cut, self.backward

    @property
    def stop(self) -> int:
        """The position after the last item. Not noted."""
        return max(self.start, self.notes.state[COUNT] + self.cut)

    def at(self, position: int) -> Any:
        return self._items[position]

    def reaches(self, position: int) -> bool:
        """Return whether there is an item at this position (of at least `start`), and note it."""
        return self.notes.at_least(position + 1 - self.cut)

    def length(self) -> Any:
        if not self.notes.at_least(self.start - self.cut):
            return 0
        return Number(self.notes, COUNT, self.notes.state[COUNT], self.cut - self.start)

    def plain(self) -> Any:
        """Return a list (or a range), with the prefix's length noted."""
        count = self.notes.state[COUNT]
        self.notes.note(COUNT, count, count)
        items = self._items[self.start : self.stop]
        return items[::-1] if self.backward else items

    def __bool__(self) -> bool:
        return self.reaches(self.start)

    def __len__(self) -> int:
        return len(self.plain())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.plain()) if self.backward else self._forward()

    def _forward(self) -> Iterator[Any]:
        position = self.start
        while self.reaches(position):
            yield self._items[position]
            position += 1

    def __radd__(self, other: Any) -> Any:
        return other + self.plain()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._slice(plain(index.start), plain(index.stop), plain(index.step))
        index = plain(index)
        if type(index) is not int or index < 0 or self.backward:
            return self.plain()[index]
        if not self.reaches(self.start + index):
            raise IndexError
        return self._items[self.start + index]

    def _slice(self, start: Any, stop: Any, step: Any) -> Any:
        if (start, stop, step) == (None, None, -1):
            return View(self.notes, self._items, self.start, self.cut, not self.backward)
        first = 0 if start is None else start
        if self.backward or step not in (None, 1) or type(first) is not int or first < 0:
            return self.plain()[start:stop:step]
        begin = self.start + first
        if stop is None:
            return View(self.notes, self._items, begin, self.cut)
        if type(stop) is not int:
            return self.plain()[start:stop:step]
        if stop < 0:
            return View(self.notes, self._items, begin, self.cut + stop)
        if stop == 0 or self.reaches(self.start + stop - 1):
            return self._items[begin : max(begin, self.start + stop)]
        return View(self.notes, self._items, begin, self.cut)


# All other operations are Python's own, on the exact value.
for _name in {*dir(int), *dir(float)} - {*dir(object)} - {*vars(Number)}:
    if _name.startswith("__") and _name not in ("__getnewargs__", "__getformat__"):
        setattr(Number, _name, _on_plain(_name))
for _kind in (Number, View):
    for _name in ("__str__", "__repr__", "__format__", "__hash__"):
        setattr(_kind, _name, _on_plain(_name))
for _name in (
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__contains__",
    "__add__",
    "__mul__",
    "__rmul__",
):
    setattr(View, _name, _on_plain(_name))


class Loop:
    """The variable `loop` in the body of a loop over messages, at the item of this position."""

    depth, depth0 = 1, 0

    def __init__(self, view: View, position: int, undefined: type[Undefined]):
        self._view, self._position, self._undefined = view, position, undefined

    @property
    def index0(self) -> Any:
        if self._view.backward:
            return self._view.length() - (self._position - self._view.start + 1)
        return self._position - self._view.start

    @property
    def index(self) -> Any:
        return self.index0 + 1

    @property
    def length(self) -> Any:
        return self._view.length()

    @property
    def revindex0(self) -> Any:
        return self.length - self.index

    @property
    def revindex(self) -> Any:
        return self.length - self.index0

    def _is_end(self, forward: bool) -> bool:
        if forward == self._view.backward:
            return self._position == self._view.start
        return not self._view.reaches(self._position + 1)

    @property
    def first(self) -> bool:
        return self._is_end(False)

    @property
    def last(self) -> bool:
        return self._is_end(True)

    @property
    def previtem(self) -> Any:
        step = 1 if self._view.backward else -1
        return self._undefined("there is no previous item") if self.first else self._view.at(self._position + step)

    @property
    def nextitem(self) -> Any:
        step = -1 if self._view.backward else 1
        return self._undefined("there is no next item") if self.last else self._view.at(self._position + step)

    def cycle(self, *args: Any) -> Any:
        return args[plain(self.index0) % len(args)]

    def __str__(self) -> str:
        raise NotCovered

    __repr__ = __str__


def make_range(notes: Notes, *limits: Any) -> Any:
    """Return a range of which one end is the end of the conversation."""
    start, stop = (0, limits[0]) if len(limits) == 1 else limits[:2]
    if len(limits) < 3 and type(stop) is Number and stop.key == COUNT and (start := plain(start)) >= 0:
        return View(notes, _ENDLESS, start, stop.shift)
    if len(limits) == 3 and type(start) is Number and start.key == COUNT and limits[1:] == (-1, -1):
        return View(notes, _ENDLESS, 0, start.shift + 1, backward=True)
    return range(*map(plain, limits))
