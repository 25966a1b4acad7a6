"""For speed only: what a chat template sees while `prefixes` renders it in parts. It serves `prefixes` alone.

A part of a template runs once, and its result is used again for every prefix of the conversation that it holds for.
For that, a part gets objects that note what it depends on: a `Number` instead of the conversation's length notes the
outcome of comparisons, a `View` instead of the list of messages notes how far it was read, a `Space` (Jinja's
namespace) notes its reads and assignments. Where no note is fine enough, the exact value is noted. An operation that
could escape the notes raises `NotCovered`.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace, missing

Key = Any  # COUNT, PROMPT, ("variable", name) or (number of a namespace, attribute)
COUNT, PROMPT = "count", "prompt"  # the prefix's number of messages, and whether it gets a generation prompt
# Variables of a loop's body: its one item, `loop`, and the memory, which has outer variables as attributes.
ITEMS, LOOP, VARIABLES = "accel_llm_items", "accel_llm_loop", "accel_llm_variables"
ITER, CHOICE = "accel_llm_iter", "accel_llm_choice"  # variables that tell `prefixes` what to loop over, which branch

_PLAIN = frozenset({str, int, float, bool, type(None), type(missing), range})
_ENDLESS = range(1 << 40)  # the items of a range that ends with the conversation


class NotCovered(BaseException):
    """A template does what cannot be noted. Not an Exception, because Jinja catches those when it tries an operation."""


class Record:
    """What one run of a part depended on, and what it did.

    It holds while every number in `ranges` lies in its range and every value in `exact` is the same; both are values
    from before the run. `writes` are its assignments; `broke` says that it left a loop by `break`.
    """

    def __init__(self) -> None:
        self.ranges: dict[Key, tuple[float, float]] = {}
        self.exact: dict[Key, Any] = {}
        self.writes: dict[Key, Any] = {}
        self.text, self.broke = "", False

    def holds(self, state: dict[Key, Any]) -> bool:
        """Return whether the part would do the same in this state."""
        for key, value in self.exact.items():
            if not same(state.get(key, missing), value):
                return False
        for key, (low, high) in self.ranges.items():
            value = state.get(key, missing)
            if type(value) is not int or not low <= value <= high:
                return False
        return True


class Memory:
    """The variables of a template that is rendered in parts; notes the reads and assignments of the part that runs.

    `constants` are the template's variables and functions. `assigned` are the names that the template assigns outside
    of loops; those in `hidden` have no value before that, even if a constant has this name.
    """

    def __init__(self, messages: list[Any], constants: dict[str, Any], assigned: set[str], hidden: set[str]):
        self.messages = View(self, messages)
        self.state: dict[Key, Any] = {}
        self.record = Record()
        self.settled: Any = ()  # keys that earlier iterations of the running loop assigned: no need to note their reads
        self.part, self.spaces, self.in_loop = 0, 0, False
        self.items: Any = ()
        self.loop: Loop | None = None
        self._constants, self._assigned, self._hidden = constants, assigned, hidden

    def read(self, key: Key) -> Any:
        """Return a value and note it. A number is noted later, when it is used."""
        value = self.state.get(key, missing)
        if key in self.record.writes or key in self.settled:
            return value
        if type(value) is int:
            self.note(key, -inf, inf)  # it is a number
            return Number(self, key, value, 0)
        self.record.exact[key] = value
        return value

    def write(self, key: Key, value: Any) -> None:
        if key == ("variable", ITER):  # it is only looked at, so an iterator does no harm
            value = value if type(value) is View else None
        self.record.writes[key] = self.state[key] = self._checked(value)

    def note(self, key: Key, low: float, high: float) -> None:
        """Note that the number of this key lies in this range."""
        old_low, old_high = self.record.ranges.get(key, (-inf, inf))
        self.record.ranges[key] = max(low, old_low), min(high, old_high)

    def at_least(self, count: int) -> bool:
        """Return whether the prefix has so many messages, and note it."""
        if count <= 0:
            return True
        enough = self.state[COUNT] >= count
        self.note(COUNT, count if enough else -inf, inf if enough else count - 1)
        return enough

    def resolve(self, name: str) -> Any:
        """Return the value of a name, as the template sees it now."""
        if name == ITEMS:
            return self.items
        if name == LOOP:
            return self.loop
        if name == VARIABLES:
            return self
        if name in self._assigned:
            value = self.read(("variable", name))
            if value is not missing or name in self._hidden:
                return value
        if name == "messages":
            return self.messages
        if name == "add_generation_prompt":
            return self.read(PROMPT)
        return self._constants.get(name, missing)

    def make_space(self, /, *args: Any, **attributes: Any) -> "Space":
        self.spaces += 1
        return Space(self, (self.part, self.spaces), not self.in_loop, dict(*args, **attributes))

    def _checked(self, value: Any) -> Any:
        """Return a value that other parts may read.

        Raises:
            NotCovered: it could change without an assignment (an iterator, a function).
        """
        kind = type(value)
        if kind in _PLAIN or kind is View or isinstance(value, Undefined):
            return value
        if kind is Number:
            return value.plain()
        if kind in (list, tuple, dict):
            for item in value.values() if kind is dict else value:
                if self._checked(item) is not item:
                    raise NotCovered
            return value
        # Made in an iteration, these would hold on to the iteration's own variables.
        if (kind is Macro and not self.in_loop) or (kind is Space and value.is_shared):
            return value
        raise NotCovered


def same(one: Any, other: Any) -> bool:
    """Return whether a template cannot tell two values apart; False when in doubt."""
    kind = type(one)
    if one is other:
        return True
    if kind is not type(other):
        return False
    if kind in _PLAIN:
        return one == other
    if kind is View:
        return one.key == other.key
    if kind is Space:
        return one.number == other.number
    if kind in (list, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, Undefined)


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

    __slots__ = ("base", "key", "memory", "shift")

    def __init__(self, memory: Memory, key: Key, base: int, shift: int):
        self.memory, self.key, self.base, self.shift = memory, key, base, shift

    def plain(self) -> int:
        self.memory.note(self.key, self.base, self.base)
        return self.base + self.shift

    def _below(self, limit: int) -> bool:
        limit -= self.shift
        below = self.base < limit
        self.memory.note(self.key, -inf if below else limit, limit - 1 if below else inf)
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
        return Number(self.memory, self.key, self.base, self.shift + sign * by)


class View:
    """The messages of a prefix from `start` on, without the last `-cut` ones; or whole numbers in their place.

    It notes how far it is read. `backward`: from the last one to the first.
    """

    __slots__ = ("_items", "backward", "cut", "memory", "start")

    def __init__(self, memory: Memory, items: Sequence[Any], start: int = 0, cut: int = 0, backward: bool = False):
        self.memory, self._items, self.start, self.cut, self.backward = memory, items, start, cut, backward

    @property
    def key(self) -> Any:
        return id(self._items), self.start, self.cut, self.backward

    @property
    def stop(self) -> int:
        """The position after the last item. Not noted."""
        return max(self.start, self.memory.state[COUNT] + self.cut)

    def at(self, position: int) -> Any:
        return self._items[position]

    def reaches(self, position: int) -> bool:
        """Return whether there is an item at this position (of at least `start`), and note it."""
        return self.memory.at_least(position + 1 - self.cut)

    def length(self) -> Any:
        if not self.memory.at_least(self.start - self.cut):
            return 0
        return Number(self.memory, COUNT, self.memory.state[COUNT], self.cut - self.start)

    def plain(self) -> Any:
        """Return a list (or a range), with the prefix's length noted."""
        count = self.memory.state[COUNT]
        self.memory.note(COUNT, count, count)
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
            return View(self.memory, self._items, self.start, self.cut, not self.backward)
        first = 0 if start is None else start
        if self.backward or step not in (None, 1) or type(first) is not int or first < 0:
            return self.plain()[start:stop:step]
        begin = self.start + first
        if stop is None:
            return View(self.memory, self._items, begin, self.cut)
        if type(stop) is not int:
            return self.plain()[start:stop:step]
        if stop < 0:
            return View(self.memory, self._items, begin, self.cut + stop)
        if stop == 0 or self.reaches(self.start + stop - 1):
            return self._items[begin : max(begin, self.start + stop)]
        return View(self.memory, self._items, begin, self.cut)


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


class Space(Namespace):
    """Jinja's namespace. A shared one keeps its attributes in the memory; others live within one iteration."""

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)  # Namespace's own finds the template's attributes only

    def __init__(self, memory: Memory, number: Any, is_shared: bool, attributes: dict[str, Any]):
        self.memory, self.number, self.is_shared = memory, number, is_shared
        self._own: dict[str, Any] = {}
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise NotCovered  # refused by transformers
        if self.is_shared:
            self.memory.write((self.number, name), value)
        else:
            self._own[name] = value

    def attribute(self, name: str) -> Any:
        """Return an attribute of the template's, or `missing`."""
        return self.memory.read((self.number, name)) if self.is_shared else self._own.get(name, missing)

    def __repr__(self) -> str:
        raise NotCovered


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


def make_range(memory: Memory, *limits: Any) -> Any:
    """Return a range of which one end is the end of the conversation."""
    start, stop = (0, limits[0]) if len(limits) == 1 else limits[:2]
    if len(limits) < 3 and type(stop) is Number and stop.key == COUNT and (start := plain(start)) >= 0:
        return View(memory, _ENDLESS, start, stop.shift)
    if len(limits) == 3 and type(start) is Number and start.key == COUNT and limits[1:] == (-1, -1):
        return View(memory, _ENDLESS, 0, start.shift + 1, backward=True)
    return range(*map(plain, limits))
