"""For speed only: follows what a chat template does with texts. It serves `patterns` alone and can be removed with it.

The template is rendered with stand-ins in place of people's texts. A stand-in consists of marks and holds no text. When
the template asks something about it ("does it contain </think>?"), the real text answers, and question and answer are
recorded. A text that the template makes of another one (trimmed, a part of it) is a stand-in again. So the render is a
pattern: it holds for every conversation of the same shape whose texts give the same answers.

An operation that cannot be recorded raises `Untraceable`. Templates that could read a text without asking its stand-in
are recognized by their syntax tree and never rendered in this way.
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

MAX_REPLACEMENT_GROWTH = 64  # `replace` may put in at most so many more characters than it takes out
_STAND_IN = re.compile("\ufdd3(\\d+)\ufdd4")  # the number of a text between two Unicode noncharacters
_DICT_METHODS = frozenset(dir(dict))

# Filters, tests and functions that ask stand-ins, or never see one.
_FILTERS = {"trim", "length", "count", "default", "d", "string", "first", "last", "tojson", "upper", "lower", "title"}
_FILTERS |= {"capitalize"}
_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "boolean", "true", "false", "number"}
_TESTS |= {"odd", "even", "divisibleby", "eq", "equalto", "==", "ne", "!="}
_FUNCTIONS = {"namespace", "raise_exception", "strftime_now", "range"}
# These capture output as a new text, load other templates or change escaping: a text could be read without asking.
_UNTRACEABLE_NODES = (nodes.Macro, nodes.FilterBlock, nodes.AssignBlock, nodes.Include, nodes.Import, nodes.FromImport)
_UNTRACEABLE_NODES += (nodes.Extends, nodes.Block, nodes.ScopedEvalContextModifier)


class Untraceable(Exception):
    """The template does something with a text that a pattern cannot express."""


class Question(NamedTuple):
    """One question of a template, `marked.method(*arguments)`, and its answer.

    `marked` is a text with marks in it; `number` is the number of the text that it stands for, or -1 if it is put
    together from several. The answer is a plain value (`answer`), or one or more texts, which are added to the trace's
    texts (`new_texts` says how many; 0 if the answer is the text itself, unchanged).
    """

    marked: str
    method: str
    arguments: tuple[Any, ...]
    answer: Any
    new_texts: int
    number: int


class Trace:
    """Records the questions that a template asks while it is rendered with stand-ins for `texts`.

    `texts` grows by the texts that the template makes of others.
    """

    def __init__(self, texts: list[str]):
        self.texts = list(texts)
        self.questions: list[Question] = []
        self.recent: dict[Question, None] = {}  # questions since this was last emptied, repeated ones included
        self._answers: dict[tuple[str, str, tuple[Any, ...]], tuple[Question, Any]] = {}

    def stand_in(self, index: int) -> "StandIn":
        """Return the stand-in for the text of this number."""
        return StandIn(f"\ufdd3{index}\ufdd4", self)

    def ask(self, marked: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Return the answer of the real text. Texts in the answer are stand-ins; an unchanged text keeps its own."""
        if any(isinstance(argument, StandIn) for argument in arguments) or _multiplies(method, arguments):
            raise Untraceable(method)
        key = marked, method, arguments
        if key not in self._answers:
            self._answers[key] = self._answer(*key)
            self.questions.append(self._answers[key][0])
        question, answer = self._answers[key]
        self.recent[question] = None
        return answer

    def _answer(self, marked: str, method: str, arguments: tuple[Any, ...]) -> tuple[Question, Any]:
        real, alone = fill_stand_ins(marked, self.texts), _STAND_IN.fullmatch(marked)
        number = int(alone[1]) if alone else -1
        answer = _apply(real, method, arguments)
        if answer == real and isinstance(answer, str):
            return Question(marked, method, arguments, None, 0, number), StandIn(marked, self)
        if isinstance(answer, str | list):
            new_texts = [answer] if isinstance(answer, str) else answer
            first = len(self.texts)
            self.texts += new_texts
            stand_ins = [self.stand_in(first + k) for k in range(len(new_texts))]
            question = Question(marked, method, arguments, None, len(new_texts), number)
            return question, stand_ins if isinstance(answer, list) else stand_ins[0]
        return Question(marked, method, arguments, answer, 0, number), answer

    def agrees(self, questions: Iterable[Question]) -> bool:
        """Ask the questions of another render, which made no new texts; return whether all answers are the same."""
        for question in questions:
            self.ask(question.marked, question.method, question.arguments)
            if self._answers[question[:3]][0] != question:
                return False
        return True


def replay(questions: list[Question], texts: list[str]) -> list[str] | None:
    """Return `texts` and the texts that the template would make of them.

    None if one of the questions has another answer here, or if a new text is so long that its render must be bounded.
    """
    texts = list(texts)
    for marked, method, arguments, answer, new_texts, number in questions:
        real = texts[number] if number >= 0 else fill_stand_ins(marked, texts)
        real_answer = _apply(real, method, arguments)
        if isinstance(real_answer, list):
            if len(real_answer) != new_texts:
                return None
            texts += real_answer
        elif isinstance(real_answer, str):
            if new_texts != (real_answer != real):  # a changed text in one conversation, an unchanged one in the other
                return None
            if len(real_answer) > FREE_OUTPUT:
                return None
            if new_texts:
                texts.append(real_answer)
        elif real_answer != answer:
            return None
    return texts


def fill_stand_ins(marked: str, texts: list[str]) -> str:
    """Return `marked` with the real texts in place of the marks."""
    parts: list[Any] = _STAND_IN.split(marked)
    parts[1::2] = [texts[int(index)] for index in parts[1::2]]
    return "".join(parts)


def stand_in_numbers(marked: str) -> list[int]:
    """Return the numbers of the texts whose stand-ins stand in `marked`."""
    return [int(number) for number in _STAND_IN.findall(marked)]


def format_string(marked: str) -> tuple[str, tuple[int, ...]]:
    """Return `marked` as a string for the % operator, and the numbers of the texts that go in."""
    numbers = tuple(stand_in_numbers(marked))
    return _STAND_IN.sub("%s", marked.replace("%", "%%")), numbers


def _apply(real: str, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "__bool__":  # str has no such method
        return real != ""
    return getattr(real, method)(*arguments)


def _multiplies(method: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether a text may grow without limit. Patterns are filled in without the limits that a render has."""
    return method == "replace" and len(arguments) > 1 and len(arguments[1]) > len(arguments[0]) + MAX_REPLACEMENT_GROWTH


def _asking(method: str) -> Callable[..., Any]:
    def ask(self: "StandIn", *arguments: Any) -> Any:
        return self._trace.ask(str(self), method, arguments)

    return ask


def _refusing(method: str) -> Callable[..., Any]:
    def refuse(self: "StandIn", *arguments: Any, **options: Any) -> Any:
        raise Untraceable(method)

    return refuse


class StandIn(str):
    """A string of marks in place of a text. Its methods ask the real text, through the trace."""

    # Jinja's sandbox hides attributes whose names begin with an underscore.
    _trace: Trace

    def __new__(cls, marked: str, trace: Trace) -> "StandIn":
        stand_in = super().__new__(cls, marked)
        stand_in._trace = trace
        return stand_in

    def __add__(self, other: str) -> "StandIn":
        return StandIn(str(self) + str(other), self._trace)

    def __radd__(self, other: str) -> "StandIn":
        return StandIn(str(other) + str(self), self._trace)

    def __ne__(self, other: object) -> bool:
        return not self == other


# Every method of str either asks the real text, or is defined above or harmless, or is refused.
_VALUE_METHODS = ("__contains__", "__eq__", "__len__", "__bool__", "startswith", "endswith", "find", "count", "isspace")
_TEXT_METHODS = ("strip", "lstrip", "rstrip", "split", "rsplit", "replace", "upper", "lower", "title", "capitalize")
_SAFE_METHODS = ("__new__", "__init__", "__str__", "__add__", "__radd__", "__ne__", "__class__", "__doc__")
_SAFE_METHODS += ("__init_subclass__", "__getattribute__", "__setattr__", "__delattr__", "__subclasshook__")
_SAFE_METHODS += ("__sizeof__", "__dir__", "__repr__")
for _method in dir(str):
    if _method in _VALUE_METHODS or _method in _TEXT_METHODS:
        setattr(StandIn, _method, _asking(_method))
    elif _method not in _SAFE_METHODS:
        setattr(StandIn, _method, _refusing(_method))
StandIn.__bool__ = _asking("__bool__")  # type: ignore[attr-defined]  # str has no method of this name
StandIn.__rmod__ = _refusing("__rmod__")  # type: ignore[attr-defined]  # "%s" % stand_in asks its right side first


@lru_cache
def compile_traceable(source: str) -> jinja2.Template | None:
    """Compile a template for stand-ins. None if it could read a text without asking its stand-in."""
    # transformers 5.23 has no public function for the environment with the tags and filters of chat templates.
    compiled = _compile_jinja_template(source)
    environment = compiled.environment.overlay()
    tree = environment.parse(source)
    if not _is_traceable(tree):
        return None
    tojson, get = environment.filters["tojson"], environment.getattr

    def get_fast(value: Any, name: str) -> Any:
        # The sandbox's own lookup gives the same for these types, but takes ten times as long.
        if type(value) is dict and name not in _DICT_METHODS:
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        if isinstance(value, LoopContext | Namespace) and not name.startswith("_"):
            try:
                return getattr(value, name)
            except AttributeError:
                return environment.undefined(obj=value, name=name)
        return get(value, name)

    environment.filters = {
        **environment.filters,
        "tojson": lambda value, *rest, **options: tojson(_without_stand_ins(value), *rest, **options),
    }
    setattr(environment, "getattr", get_fast)  # noqa: B010, a method that is replaced on one object
    return environment.from_string(tree)


def _without_stand_ins(value: Any) -> Any:
    """Return `value` if it holds no stand-in. C code such as the JSON encoder reads a text without asking it.

    Raises:
        Untraceable: it holds one.
    """
    if isinstance(value, StandIn):
        raise Untraceable("tojson")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _without_stand_ins(item)
    return value


def _is_traceable(tree: nodes.Template) -> bool:
    """Return whether every operation in the template asks stand-ins. `~` does not: its result may only be output."""
    return not (
        any(tree.find_all(_UNTRACEABLE_NODES))
        or any(
            not isinstance(node.call, nodes.Call) or not isinstance(node.call.node, nodes.ExtensionAttribute)
            for node in tree.find_all(nodes.CallBlock)
        )
        or any(node.name not in _FILTERS for node in tree.find_all(nodes.Filter))
        or any(node.name not in _TESTS for node in tree.find_all(nodes.Test))
        or not all(map(_is_traceable_call, tree.find_all(nodes.Call)))
        or not all(map(_is_traceable_comparison, tree.find_all(nodes.Compare)))
        or sum(1 for _ in tree.find_all(nodes.Concat))
        != sum(isinstance(node, nodes.Concat) for output in tree.find_all(nodes.Output) for node in output.nodes)
    )


def _is_traceable_call(call: nodes.Call) -> bool:
    """Return whether this calls a function from our list, or a method with constant arguments only."""
    if isinstance(call.node, nodes.ExtensionAttribute):
        return True
    if isinstance(call.node, nodes.Name):
        return call.node.name in _FUNCTIONS
    constants = all(isinstance(argument, nodes.Const) for argument in call.args)
    return isinstance(call.node, nodes.Getattr) and constants and not (call.kwargs or call.dyn_args or call.dyn_kwargs)


def _is_traceable_comparison(compare: nodes.Compare) -> bool:
    """Return whether `x in y` asks x: only y is asked, unless y is a list. Other comparisons are traceable."""
    return all(
        operand.op not in ("in", "notin")
        or isinstance(compare.expr, nodes.Const)
        or isinstance(operand.expr, nodes.List | nodes.Tuple)
        for operand in compare.ops
    )
