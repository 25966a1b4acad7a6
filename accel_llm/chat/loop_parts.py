"""For speed only: cuts a chat template into the parts that `prefixes` renders apart. It serves `prefixes` alone."""

import copy
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.idtracking import VAR_LOAD_UNDEFINED, symbols_for_node
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import missing
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from accel_llm.chat.noted import Loop, NotCovered, Number, View, make_range, plain
from accel_llm.chat.recorder import CHOICE, ITEMS, ITER, LOOP, VARIABLES, Memory, Space

_DICT_METHODS = frozenset(dir(dict))
_LOOP_NAMES = frozenset({"index", "index0", "first", "last", "length", "revindex", "revindex0", "previtem", "nextitem"})
_LOOP_NAMES |= {"depth", "depth0", "cycle"}
# These ask a Number or a View nothing, or ask it by its methods. All others get the exact value.
_OPEN_FILTERS = {"default", "d", "first", "select", "reject", "selectattr", "rejectattr", "map"}
_OPEN_TESTS = {"defined", "undefined", "none", "string", "mapping", "boolean", "true", "false"}
_OPEN_TESTS |= {"eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge"}
_OPEN_TESTS |= {">="}


class PartContext(Context):
    """Jinja's context, with names from a memory, and assignments outside of loops into it."""

    def __init__(self, environment: jinja2.Environment, memory: Memory):
        super().__init__(environment, {}, None, {})
        self.memory, self.vars = memory, _Assignments(memory)

    def resolve_or_missing(self, key: str) -> Any:
        return self.memory.resolve(key)


class _Assignments(dict):
    def __init__(self, memory: Memory):
        super().__init__()
        self._memory = memory

    def __setitem__(self, name: str, value: Any) -> None:
        self._memory.write(("variable", name), value)

    def update(self, values: dict[str, Any]) -> None:  # type: ignore[override]
        for name, value in values.items():
            self[name] = value


@lru_cache
def part_environment(source: str) -> jinja2.Environment:
    """Return the environment of chat templates, changed so that parts of this template can run on noting objects."""
    # transformers 5.23 has no public function for the environment with the tags and filters of chat templates.
    environment = _compile_jinja_template(source).environment.overlay()
    length = environment.filters["length"]
    filters = {name: act if name in _OPEN_FILTERS else _pinned(act) for name, act in environment.filters.items()}
    filters["length"] = filters["count"] = lambda value: value.length() if type(value) is View else length(value)
    environment.filters = filters
    environment.tests = {name: act if name in _OPEN_TESTS else _pinned(act) for name, act in environment.tests.items()}
    # Methods that are replaced on one object.
    for name in ("getattr", "getitem", "call"):
        setattr(environment, name, _LOOKUPS[name](environment, getattr(environment, name)))
    return environment


def _pinned(act: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(act)
    def act_on_plain(*args: Any, **options: Any) -> Any:
        return act(*map(plain, args), **{name: plain(value) for name, value in options.items()})

    return act_on_plain


def _make_getattr(environment: jinja2.Environment, sandboxed: Callable[..., Any]) -> Callable[..., Any]:
    def get(value: Any, name: str) -> Any:
        # The sandbox's own lookup gives the same for dictionaries and loops, but takes ten times as long.
        kind = type(value)
        if kind is dict and name not in _DICT_METHODS:
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        if kind is Space or kind is Memory:
            attribute = value.attribute(name) if kind is Space else value.resolve(name)
            return environment.undefined(obj=value, name=name) if attribute is missing else attribute
        if kind is Loop or kind is LoopContext:
            if name in _LOOP_NAMES:
                return getattr(value, name)
            if kind is Loop:
                raise NotCovered
        if kind is View or kind is Number:
            raise NotCovered
        return sandboxed(value, name)

    return get


def _make_getitem(environment: jinja2.Environment, sandboxed: Callable[..., Any]) -> Callable[..., Any]:
    def get(value: Any, argument: Any) -> Any:
        kind = type(value)
        if kind is dict and type(argument) is str and argument in value:
            return value[argument]
        if kind is Number or (kind is Loop and type(argument) is not str):
            raise NotCovered
        if kind is Space or kind is Loop:
            return environment.getattr(value, argument)
        if kind is View:
            try:
                return value[argument]
            except LookupError:
                return environment.undefined(obj=[], name=argument)
        return sandboxed(value, plain(argument))

    return get


def _make_call(environment: jinja2.Environment, sandboxed: Callable[..., Any]) -> Callable[..., Any]:
    namespace = environment.globals["namespace"]

    def call(context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        if type(function) is Macro:
            return sandboxed(context, function, *args, **options)
        if function is range and any(type(limit) is Number for limit in args):
            return make_range(context.memory, *args)
        if type(function) is Loop:  # a recursive loop
            raise NotCovered
        if function is not namespace:
            values = {name: plain(value) for name, value in options.items()}
            return sandboxed(context, function, *map(plain, args), **values)
        # The first two are Jinja's own.
        attributes = {name: value for name, value in options.items() if name not in ("_loop_vars", "_block_vars")}
        return context.memory.make_space(*args, **attributes)

    return call


_LOOKUPS = {"getattr": _make_getattr, "getitem": _make_getitem, "call": _make_call}


def is_coverable(tree: nodes.Template) -> bool:
    """Return whether the template has no state but variables and namespaces, and gives no macro's name twice."""
    unknown = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
    unknown += (nodes.EvalContextModifier, nodes.ScopedEvalContextModifier)
    # `attr` would look into our own objects.
    if any(tree.find_all(unknown)) or any(node.name in ("random", "attr") for node in tree.find_all(nodes.Filter)):
        return False
    names = list(tree.find_all(nodes.Name))
    macros = [node.name for node in tree.find_all(nodes.Macro)]
    if len(set(macros)) < len(macros) or any(name.ctx != "load" and name.name in macros for name in names):
        return False
    unknown_names = {"cycler", "joiner", "lipsum", "self"}
    return not any(name.name in unknown_names or name.name.startswith("accel_llm_") for name in names)


class Statement(NamedTuple):
    number: int
    code: Any  # the root function of a compiled template


class LoopPart(NamedTuple):
    number: int
    find_items: Statement  # assigns what the loop goes over
    whole: Statement  # the loop itself, for what is not a View
    body: Any  # the root function of a template for one iteration, or None
    reads_prompt: bool


class Branch(NamedTuple):
    choose: Statement  # assigns the number of the branch
    branches: "list[list[Part]]"


Part = Statement | LoopPart | Branch


class Program(NamedTuple):
    """A template in parts; `Memory` explains `assigned` and `hidden`."""

    parts: list[Part]
    environment: jinja2.Environment
    assigned: set[str]
    hidden: set[str]


@lru_cache
def compile_parts(source: str) -> Program | None:
    """Cut a template into parts. None if it has what cannot be cut."""
    try:
        environment = part_environment(source)
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError:  # the true render will say so
        return None
    if not is_coverable(tree):
        return None
    symbols = symbols_for_node(tree)
    hidden = {name for name in symbols.stores if symbols.loads[symbols.refs[name]][0] == VAR_LOAD_UNDEFINED}
    macros_read_prompt = any(_reads(macro, "add_generation_prompt") for macro in tree.find_all(nodes.Macro))
    parts = _Cutter(environment, symbols.stores, macros_read_prompt).cut(tree.body)
    return Program(parts, environment, symbols.stores, hidden)


class _Cutter:
    def __init__(self, environment: jinja2.Environment, assigned: set[str], macros_read_prompt: bool):
        self._environment, self._assigned, self._macros_read_prompt = environment, assigned, macros_read_prompt
        self._number = 0

    def cut(self, body: list[nodes.Node]) -> list[Part]:
        parts: list[Part] = []
        for node in body:
            if isinstance(node, nodes.For):
                parts.append(self._cut_loop(node))
            elif isinstance(node, nodes.If) and any(node.find_all((nodes.For, nodes.Macro))):
                parts.append(self._cut_branch(node))
            else:
                parts.append(self._statement(node))
        return parts

    def _code(self, *body: nodes.Node) -> Any:
        tree = nodes.Template(list(body), lineno=1)
        tree.set_environment(self._environment)
        return self._environment.from_string(tree).root_render_func

    def _statement(self, *body: nodes.Node) -> Statement:
        self._number += 1
        return Statement(self._number, self._code(*body))

    def _cut_loop(self, node: nodes.For) -> LoopPart:
        # A copy, because the names in it are changed.
        one = copy.deepcopy(node, {id(self._environment): self._environment})
        reads_loop = _rename_loop(one.body)
        one.iter = nodes.Name(ITEMS, "load", lineno=node.lineno)
        can_cut = not (node.recursive or node.else_ or (node.test and (reads_loop or _reads(node.test, "loop"))))
        find_items = self._statement(_assign(ITER, node.iter))
        reads_prompt = self._macros_read_prompt or _reads(node, "add_generation_prompt")
        stored = {name.name for name in one.find_all(nodes.Name) if name.ctx != "load"}
        stored |= {macro.name for macro in one.find_all(nodes.Macro)}
        _ReadLate(self._assigned - stored).visit(one)
        body = self._code(one) if can_cut and reads_loop is not None else None
        self._number += 1
        return LoopPart(self._number, find_items, self._statement(node), body, reads_prompt)

    def _cut_branch(self, node: nodes.If) -> Branch:
        tests = [node, *node.elif_]
        choices: list[nodes.If] = [
            nodes.If(test.test, [_assign(CHOICE, nodes.Const(k))], [], [], lineno=test.lineno)
            for k, test in enumerate(tests)
        ]
        choices[0].elif_ = choices[1:]
        choices[0].else_ = [_assign(CHOICE, nodes.Const(len(tests)))]
        bodies = [*(test.body for test in tests), node.else_]
        return Branch(self._statement(choices[0]), [self.cut(body) for body in bodies])


class _ReadLate(NodeTransformer):
    """Makes a loop's body read outer variables where it uses them. Jinja reads all of them first, used or not."""

    def __init__(self, names: set[str]):
        self._names = names

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name not in self._names:
            return node
        return nodes.Getattr(nodes.Name(VARIABLES, "load"), node.name, "load", lineno=node.lineno)


def _assign(name: str, value: nodes.Node) -> nodes.Assign:
    return nodes.Assign(nodes.Name(name, "store", lineno=1), value, lineno=1)


def _reads(node: nodes.Node, name: str) -> bool:
    return any(found.name == name for found in node.find_all(nodes.Name)) or getattr(node, "name", None) == name


def _rename_loop(body: list[nodes.Node]) -> bool | None:
    """Rename `loop` in a loop's body, but not where it means an inner loop. Return whether there was any.

    None if a macro in the body has a parameter of this name.
    """
    found: bool | None = False
    todo: list[nodes.Node] = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, nodes.Name) and node.name == "loop":
            if node.ctx != "load":
                return None
            node.name, found = LOOP, True
        exclude = ("body",) if isinstance(node, nodes.For) else ()
        todo += node.iter_child_nodes(exclude=exclude)
    return found
