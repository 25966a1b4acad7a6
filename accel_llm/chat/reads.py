"""Reads from a chat template's syntax tree what it takes from a row: variables, keys of messages and of content parts.

Each expression is followed to the data that it may stand for, written as a path: `messages[]` is any message,
`messages[].content[]` any part of a content list. A variable stands for everything that is ever assigned to it, in
whatever order, so the result may name too much, but leaves nothing out that an ordinary template reads.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGE, PART = "messages[]", "messages[].content[]"
# Names that every render sets, or that are functions.
_GIVEN = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "range", "dict"}
_GIVEN |= {"lipsum", "cycler", "joiner", "loop", "caller", "true", "false", "none"}
_WRITE_WHOLE = {"tojson", "string", "items", "dictsort", "pprint", "xmlattr", "urlencode"}  # filters
_BY_ATTRIBUTE = {"selectattr", "rejectattr", "groupby"}  # filters whose first argument is a key of the elements
_ELEMENT = {"first", "last", "random", "min", "max"}  # filters
_NO_DATA = {"length", "count", "wordcount", "sum"}  # filters
_WHOLE_METHODS = {"items", "values", "keys", "copy", "update"}
_MAX_PASSES = 10  # assignments are followed until nothing new is found; templates need two or three passes

Paths = frozenset[str]


class TemplateReads(NamedTuple):
    """What a chat template reads of a row.

    `variables` are names that it takes from outside, other than messages and tools (`documents`, `enable_thinking`).
    `message_keys` and `part_keys` are keys of messages and of the parts of a content list. `whole_messages` says that
    it writes messages whole (`tojson`), so that each of their keys is read; `tools` that it reads that variable.
    """

    variables: frozenset[str] = frozenset()
    message_keys: frozenset[str] = frozenset()
    part_keys: frozenset[str] = frozenset()
    whole_messages: bool = False
    tools: bool = False

    def union(self, other: "TemplateReads") -> "TemplateReads":
        """Return what at least one of two templates reads."""
        return TemplateReads(
            self.variables | other.variables,
            self.message_keys | other.message_keys,
            self.part_keys | other.part_keys,
            self.whole_messages or other.whole_messages,
            self.tools or other.tools,
        )


@lru_cache
def template_reads(source: str) -> TemplateReads:
    """Return what the template of this source reads of a row. `source` must be valid Jinja."""
    # transformers 5.23 has no public function for the environment with the tags and filters of chat templates.
    tree = _compile_jinja_template(source).environment.parse(source)
    finder = _ReadFinder()
    for _ in range(_MAX_PASSES):
        before = finder.size()
        finder.follow(tree)
        if finder.size() == before:
            break
    undeclared = meta.find_undeclared_variables(tree)
    # A name that only some branches set is not meant to be given, unless the template asks whether it is.
    set_here = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    asked = {_asked_variable(node) for node in tree.find_all((nodes.Test, nodes.Filter))}
    return TemplateReads(
        frozenset(undeclared - _GIVEN - (set_here - asked)),
        frozenset(finder.keys.get(MESSAGE, ())),
        frozenset(finder.keys.get(PART, ())),
        MESSAGE in finder.whole or "messages" in finder.whole,
        "tools" in undeclared,
    )


def _asked_variable(node: Any) -> str | None:
    """Return the variable that a test or filter asks for: `x is defined`, `x | default(...)`."""
    asks = node.name in ("defined", "undefined", "default", "d") and isinstance(node.node, nodes.Name)
    return node.node.name if asks else None


class _ReadFinder:
    """Walks a syntax tree and collects the keys that are read at each path, and the paths that are written whole."""

    def __init__(self) -> None:
        self.keys: dict[str, set[str]] = {}
        self.whole: set[str] = set()
        self._values: dict[str, set[str]] = {"messages": {"messages"}, "tools": {"tools"}}  # of variables
        self._macros: dict[str, list[str]] = {}  # name -> names of its parameters

    def size(self) -> int:
        """Return a number that grows with everything found."""
        found = [*self.keys.values(), *self._values.values()]
        return len(self.whole) + len(self._macros) + sum(map(len, found))

    def follow(self, node: nodes.Node) -> Paths:
        """Walk `node`, and return the paths that its value may have; none for a statement."""
        handler: Any = getattr(self, f"_follow_{type(node).__name__.lower()}", None)
        if handler is not None:
            return handler(node)
        children = [self.follow(child) for child in node.iter_child_nodes()]
        joins = isinstance(node, (nodes.CondExpr, nodes.And, nodes.Or, nodes.Add, nodes.Concat))
        return frozenset().union(*children) if joins else frozenset()

    def _follow_name(self, node: nodes.Name) -> Paths:
        return frozenset(self._values.get(node.name, ()))

    def _follow_output(self, node: nodes.Output) -> Paths:
        for child in node.nodes:
            self.whole |= self.follow(child)
        return frozenset()

    def _follow_getattr(self, node: nodes.Getattr) -> Paths:
        if isinstance(node.node, nodes.Name):
            # Attributes of namespaces, and the neighbors of a loop's element, are variables of their own.
            variable = f"{node.node.name}.{node.attr}"
            if variable in self._values:
                return frozenset(self._values[variable])
        return self._read(self.follow(node.node), node.attr)

    def _follow_getitem(self, node: nodes.Getitem) -> Paths:
        base = self.follow(node.node)
        if isinstance(node.arg, nodes.Slice):
            return base
        self.follow(node.arg)
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._read(base, node.arg.value)
        # A number picks an element of a list; a key that is computed may be any key of a message.
        if not isinstance(node.arg, (nodes.Const, nodes.Neg, nodes.Add, nodes.Sub)):
            self.whole |= base & {MESSAGE}
        return _elements(base)

    def _follow_compare(self, node: nodes.Compare) -> Paths:
        for child in node.iter_child_nodes():
            self.follow(child)
        for operand in node.ops:
            if (
                operand.op in ("in", "notin")
                and isinstance(node.expr, nodes.Const)
                and isinstance(node.expr.value, str)
            ):
                self._read(self.follow(operand.expr), node.expr.value)
        return frozenset()

    def _follow_filter(self, node: nodes.Filter) -> Paths:
        base = self.follow(node.node) if node.node else frozenset()
        for argument in (*node.args, *node.kwargs):
            self.follow(argument)
        if node.name in _WRITE_WHOLE:
            self.whole |= base
        named = node.args[0] if node.name in _BY_ATTRIBUTE and node.args else None
        named = named or next((pair.value for pair in node.kwargs if pair.key == "attribute"), None)
        if isinstance(named, nodes.Const):
            read = self._read(_elements(base), str(named.value).split(".")[0])
            return read if node.name == "map" else base
        if node.name in _NO_DATA:
            return frozenset()
        return _elements(base) if node.name in _ELEMENT else base

    def _follow_call(self, node: nodes.Call) -> Paths:
        arguments = [self.follow(argument) for argument in node.args]
        named = {pair.key: self.follow(pair.value) for pair in node.kwargs}
        if isinstance(node.node, nodes.Getattr):
            base, method = self.follow(node.node.node), node.node.attr
            if method in ("get", "pop") and node.args and isinstance(node.args[0], nodes.Const):
                return self._read(base, str(node.args[0].value))
            if method in _WHOLE_METHODS:
                self.whole |= base & {MESSAGE}
            return base
        name = node.node.name if isinstance(node.node, nodes.Name) else ""
        if name in self._macros:
            for parameter, paths in [*zip(self._macros[name], arguments, strict=False), *named.items()]:
                self._assign(parameter, paths)
            return frozenset()
        return frozenset().union(*arguments)  # dict(message, ...) is the message still

    def _follow_macro(self, node: nodes.Macro) -> Paths:
        self._macros[node.name] = [parameter.name for parameter in node.args]
        for child in (*node.defaults, *node.body):
            self.follow(child)
        return frozenset()

    def _follow_assign(self, node: nodes.Assign) -> Paths:
        value = node.node
        paths = self.follow(value)
        if isinstance(node.target, nodes.NSRef):
            self._assign(f"{node.target.name}.{node.target.attr}", paths)
        elif isinstance(node.target, nodes.Name):
            self._assign(node.target.name, paths)
            if isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name) and value.node.name == "namespace":
                for pair in value.kwargs:
                    self._assign(f"{node.target.name}.{pair.key}", self.follow(pair.value))
        return frozenset()

    def _follow_for(self, node: nodes.For) -> Paths:
        elements = _elements(self.follow(node.iter))
        if isinstance(node.target, nodes.Name):
            self._assign(node.target.name, elements)
        for neighbor in ("loop.previtem", "loop.nextitem"):
            self._assign(neighbor, elements)
        for child in (*([node.test] if node.test else []), *node.body, *node.else_):
            self.follow(child)
        return frozenset()

    def _follow_list(self, node: nodes.List) -> Paths:
        return frozenset(path.removesuffix("[]") for item in node.items for path in self.follow(item))

    def _assign(self, variable: str, paths: Paths) -> None:
        self._values.setdefault(variable, set()).update(paths)

    def _read(self, paths: Paths, key: str) -> Paths:
        for path in paths:
            self.keys.setdefault(path, set()).add(key)
        # Deeper paths are not needed, and a variable that is assigned to its own part would make ever longer ones.
        return frozenset(f"{path}.{key}" for path in paths if path.count(".") < 3)


def _elements(paths: Paths) -> Paths:
    return frozenset(f"{path}[]" for path in paths if not path.endswith("[][]"))
