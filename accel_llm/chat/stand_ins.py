"""A chat template's text as a pattern: worked out once for a kind of conversation, filled in for all others like it.

The template is rendered with stand-ins for what people wrote. A stand-in answers whatever the template asks of its text
("does it hold </think>?") from the real text, and question and answer are kept; what the template makes of a text (its
ends trimmed, a part of it) is a stand-in again. A pattern therefore holds for every conversation of the same shape
whose texts give the same answers. What cannot be followed raises `Untraceable`, and templates that could look at a text
behind a stand-in's back are recognised from their syntax tree and never traced.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace
from transformers.utils.chat_template_utils import _compile_jinja_template

from accel_llm.chat.sandbox import FREE_OUTPUT

MAX_QUESTIONS = 64  # characters that may come in place of a short text
_STAND_IN = re.compile("\ufdd3(\\d+)\ufdd4")  # Unicode noncharacters
_OF_DICTS = frozenset(dir(dict))
_FILTERS = {"trim", "length", "count", "default", "d", "string", "first", "last", "tojson", "upper", "lower", "title"}
_FILTERS |= {"capitalize"}
_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "boolean", "true", "false", "number"}
_TESTS |= {"odd", "even", "divisibleby", "eq", "equalto", "==", "ne", "!="}
_FUNCTIONS = {"namespace", "raise_exception", "strftime_now", "range"}
_REFUSED = (nodes.Macro, nodes.FilterBlock, nodes.AssignBlock, nodes.Include, nodes.Import, nodes.FromImport)
_REFUSED += (nodes.Extends, nodes.Block, nodes.ScopedEvalContextModifier)


class Untraceable(Exception):
    """The template does something with a text that a pattern cannot say."""


class Asked(NamedTuple):
    """`method(*arguments)` of the text that `marked` stands for gave `answer`; `made` are the stand-ins it gave."""

    marked: str
    method: str
    arguments: tuple[Any, ...]
    answer: Any
    made: int  # how many texts came of it: they follow those that were there before
    number: int  # of the text that `marked` is, -1 if it is put together


class Trace:
    """What a template asked while it was rendered with stand-ins for `texts`, which grows by what it made of them."""

    def __init__(self, texts: list[str]):
        self.texts = list(texts)
        self.asked: list[Asked] = []
        self.touched: dict[Asked, None] = {}  # what was asked since it was last emptied, known before or not
        self._known: dict[tuple[str, str, tuple[Any, ...]], tuple[Asked, Any]] = {}

    def stand_in(self, index: int) -> "StandIn":
        return StandIn(f"\ufdd3{index}\ufdd4", self)

    def ask(self, marked: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """The answer of the real text; texts in it are stand-ins, one that is unchanged is the same stand-in."""
        if any(isinstance(argument, StandIn) for argument in arguments) or _multiplies(method, arguments):
            raise Untraceable(method)
        key = marked, method, arguments
        if key not in self._known:
            self._known[key] = self._answer(*key)
            self.asked.append(self._known[key][0])
        asked, answer = self._known[key]
        self.touched[asked] = None
        return answer

    def _answer(self, marked: str, method: str, arguments: tuple[Any, ...]) -> tuple[Asked, Any]:
        real, alone = fill_in(marked, self.texts), _STAND_IN.fullmatch(marked)
        number = int(alone[1]) if alone else -1
        answer = _apply(real, method, arguments)
        if answer == real and isinstance(answer, str):
            return Asked(marked, method, arguments, None, 0, number), StandIn(marked, self)
        if isinstance(answer, str | list):
            made = [answer] if isinstance(answer, str) else answer
            first = len(self.texts)
            self.texts += made
            stand_ins = [self.stand_in(first + k) for k in range(len(made))]
            asked = Asked(marked, method, arguments, None, len(made), number)
            return asked, stand_ins if isinstance(answer, list) else stand_ins[0]
        return Asked(marked, method, arguments, answer, 0, number), answer

    def agrees(self, asked: Iterable[Asked]) -> bool:
        """Whether the texts here give the answers of another rendering, which made no texts; they are asked as well."""
        for known in asked:
            self.ask(known.marked, known.method, known.arguments)
            if self._known[known[:3]][0] != known:
                return False
        return True


def replay(asked: list[Asked], texts: list[str]) -> list[str] | None:
    """`texts` and what the template would make of them; None if one of its questions has another answer here, or if one
    of these is so long that its render must be bounded."""
    texts = list(texts)
    for marked, method, arguments, answer, made, number in asked:
        real = texts[number] if number >= 0 else fill_in(marked, texts)
        found = _apply(real, method, arguments)
        if isinstance(found, list):
            if len(found) != made:
                return None
            texts += found
        elif isinstance(found, str):
            if made != (found != real):
                return None
            if len(found) > FREE_OUTPUT:
                return None
            if made:
                texts.append(found)
        elif found != answer:
            return None
    return texts


def fill_in(marked: str, texts: list[str]) -> str:
    """The real text that `marked` stands for."""
    parts: list[Any] = _STAND_IN.split(marked)
    parts[1::2] = [texts[int(index)] for index in parts[1::2]]
    return "".join(parts)


def formatted(marked: str) -> tuple[str, tuple[int, ...]]:
    """The text for the % operator, and the numbers of the texts that it takes."""
    numbers = tuple(int(number) for number in _STAND_IN.findall(marked))
    return _STAND_IN.sub("%s", marked.replace("%", "%%")), numbers


def _apply(real: str, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "__bool__":
        return real != ""
    return getattr(real, method)(*arguments)


def _multiplies(method: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a text may grow without measure: patterns are filled in without the bounds that a render has."""
    return method == "replace" and len(arguments) > 1 and len(arguments[1]) > len(arguments[0]) + MAX_QUESTIONS


def _asks(method: str) -> Callable[..., Any]:
    def ask(self: "StandIn", *arguments: Any) -> Any:
        return self._trace.ask(str(self), method, arguments)

    return ask


def _refuses(method: str) -> Callable[..., Any]:
    def refuse(self: "StandIn", *arguments: Any, **named: Any) -> Any:
        raise Untraceable(method)

    return refuse


class StandIn(str):
    """A text that is not there: its characters are marks, and every question goes to the real one."""

    # The sandbox shows a template no name that begins so.
    _trace: Trace

    def __new__(cls, marked: str, trace: Trace) -> "StandIn":
        made = super().__new__(cls, marked)
        made._trace = trace
        return made

    def __add__(self, other: str) -> "StandIn":
        return StandIn(str(self) + str(other), self._trace)

    def __radd__(self, other: str) -> "StandIn":
        return StandIn(str(other) + str(self), self._trace)

    def __ne__(self, other: object) -> bool:
        return not self == other


_ASKED = ("__contains__", "__eq__", "__len__", "__bool__", "startswith", "endswith", "find", "count", "isspace")
_MADE = ("strip", "lstrip", "rstrip", "split", "rsplit", "replace", "upper", "lower", "title", "capitalize")
_OWN = ("__new__", "__init__", "__str__", "__add__", "__radd__", "__ne__", "__class__", "__doc__", "__init_subclass__")
_OWN += ("__getattribute__", "__setattr__", "__delattr__", "__subclasshook__", "__sizeof__", "__dir__", "__repr__")
for _method in dir(str):
    if _method in _ASKED or _method in _MADE:
        setattr(StandIn, _method, _asks(_method))
    elif _method not in _OWN:
        setattr(StandIn, _method, _refuses(_method))
StandIn.__bool__ = _asks("__bool__")  # type: ignore[attr-defined]
StandIn.__rmod__ = _refuses("__rmod__")  # type: ignore[attr-defined]


@lru_cache
def traceable(source: str) -> jinja2.Template | None:
    """The template for stand-ins; None if it could look at a text without asking the stand-in."""
    # transformers 5.23 has no public way to the environment with the tags and filters of chat templates.
    compiled = _compile_jinja_template(source)
    environment = compiled.environment.overlay()
    tree = environment.parse(source)
    if not _asks_openly(tree):
        return None
    tojson, get = environment.filters["tojson"], environment.getattr

    def get_fast(value: Any, name: str) -> Any:
        # The sandbox's own way to these takes ten times as long, and finds the same.
        if type(value) is dict and name not in _OF_DICTS:
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        if isinstance(value, LoopContext | Namespace) and not name.startswith("_"):
            return getattr(value, name)
        return get(value, name)

    environment.filters = {
        **environment.filters,
        "tojson": lambda value, *rest, **named: tojson(_open(value), *rest, **named),
    }
    setattr(environment, "getattr", get_fast)  # noqa: B010, a method that is replaced on one object
    return environment.from_string(tree)


def _open(value: Any) -> Any:
    """`value`, which holds no stand-in: C code such as the JSON encoder reads a text without asking it."""
    if isinstance(value, StandIn):
        raise Untraceable("tojson")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _open(item)
    return value


def _asks_openly(tree: nodes.Template) -> bool:
    return not (
        any(tree.find_all(_REFUSED))
        or any(
            not isinstance(node.call, nodes.Call) or not isinstance(node.call.node, nodes.ExtensionAttribute)
            for node in tree.find_all(nodes.CallBlock)
        )
        or any(node.name not in _FILTERS for node in tree.find_all(nodes.Filter))
        or any(node.name not in _TESTS for node in tree.find_all(nodes.Test))
        or not all(map(_is_open_call, tree.find_all(nodes.Call)))
        or not all(map(_is_open_search, tree.find_all(nodes.Compare)))
        or sum(1 for _ in tree.find_all(nodes.Concat))
        != sum(isinstance(node, nodes.Concat) for output in tree.find_all(nodes.Output) for node in output.nodes)
    )


def _is_open_call(call: nodes.Call) -> bool:
    """A known function, or a method that gets nothing but constants."""
    if isinstance(call.node, nodes.ExtensionAttribute):
        return True
    if isinstance(call.node, nodes.Name):
        return call.node.name in _FUNCTIONS
    constants = all(isinstance(argument, nodes.Const) for argument in call.args)
    return isinstance(call.node, nodes.Getattr) and constants and not (call.kwargs or call.dyn_args or call.dyn_kwargs)


def _is_open_search(compare: nodes.Compare) -> bool:
    """`x in y` asks y; x is asked only where y is a list."""
    return all(
        operand.op not in ("in", "notin")
        or isinstance(compare.expr, nodes.Const)
        or isinstance(operand.expr, nodes.List | nodes.Tuple)
        for operand in compare.ops
    )
