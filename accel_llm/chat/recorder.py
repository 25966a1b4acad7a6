"""For speed only: what a chat template sees while `prefixes` renders it in parts. It serves `prefixes` alone.

A part of a template runs once, and its result is used again for every prefix of the conversation that it holds for.
For that, a `PartRecord` notes what the part depends on and what it assigns. All variables live in the `Memory`, which
gives out objects that note their use (`noted`); a `Space` (Jinja's namespace) notes its reads and assignments.
"""

from math import inf
from typing import Any

from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace, missing

from accel_llm.chat.noted import COUNT, Key, Loop, NotCovered, Number, View

PROMPT = "prompt"  # the key of whether the prefix gets a generation prompt
# Variables of a loop's body: its one item, `loop`, and the memory, which has outer variables as attributes.
ITEMS, LOOP, VARIABLES = "accel_llm_items", "accel_llm_loop", "accel_llm_variables"
ITER, CHOICE = "accel_llm_iter", "accel_llm_choice"  # variables that tell `prefixes` what to loop over, which branch

_PLAIN = frozenset({str, int, float, bool, type(None), type(missing), range})


class PartRecord:
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
        self.record = PartRecord()
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
