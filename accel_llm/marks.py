"""Where each message ends in a rendered conversation, found in one render for templates that never look ahead."""

from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

MARK = "\ufdd2"  # a Unicode noncharacter
_BACKWARD_LOOKING = {"first", "index", "index0", "previtem"}


@lru_cache
def marked_template(source: str) -> jinja2.Template | None:
    """The template with `MARK` written after every message; None unless each message's text, and what the template
    writes before the first and after the last one, provably depends on no later message.

    That holds for a template of three parts: what reads at most `messages[0]` (and may take it off the list), one loop
    over the messages that never asks where it will end, and a closing part that reads no message. Branches for tool
    results are left out of the proof, so the template serves conversations of system, user and assistant only.
    """
    # transformers 5.23 has no public way to the environment with the tags and filters of chat templates.
    environment = _compile_jinja_template(source).environment
    body = environment.parse(source).body
    loops = [
        index for index, node in enumerate(body) if isinstance(node, nodes.For) and _is_name(node.iter, "messages")
    ]
    if len(loops) != 1:
        return None
    tree = environment.parse(source)
    loop = tree.body[loops[0]]
    assert isinstance(loop, nodes.For)
    before, after = _without_tool_branches(body[: loops[0]]), body[loops[0] + 1 :]
    inside = _without_tool_branches([body[loops[0]]])
    if not (
        _reads_only_first_message(before, inside) and _never_looks_ahead(inside, loop) and _closes_alone(after, tree)
    ):
        return None
    loop.body.append(nodes.Output([nodes.TemplateData(MARK)]))
    return environment.from_string(tree)


def _reads_only_first_message(before: list[nodes.Node], inside: list[nodes.Node]) -> bool:
    first = [
        node
        for node in _all(before + inside, nodes.Getitem)
        if _is_name(node.node, "messages") and isinstance(node.arg, nodes.Const) and node.arg.value == 0
    ]
    shortened = [node for node in _all(before, nodes.Assign) if _takes_off_the_first(node)]
    uses = _names(before + inside, "messages")
    allowed = len(first) + 2 * len(shortened) + 1  # an assignment both reads and writes, and the loop itself reads
    return len(uses) == allowed and not _names(before, "add_generation_prompt", "loop")


def _takes_off_the_first(node: nodes.Assign) -> bool:
    """`{% set messages = messages[1:] %}`"""
    value = node.node
    return (
        _is_name(node.target, "messages")
        and isinstance(value, nodes.Getitem)
        and _is_name(value.node, "messages")
        and isinstance(value.arg, nodes.Slice)
        and isinstance(value.arg.start, nodes.Const)
        and value.arg.start.value == 1
        and value.arg.stop is None
        and value.arg.step is None
    )


def _never_looks_ahead(inside: list[nodes.Node], loop: nodes.For) -> bool:
    if loop.test or loop.else_ or loop.recursive or not isinstance(loop.target, nodes.Name):
        return False
    if _all(inside, nodes.Break, nodes.Continue) or _names(inside, "add_generation_prompt"):
        return False
    backward = [
        node for node in _all(inside, nodes.Getattr) if _is_name(node.node, "loop") and node.attr in _BACKWARD_LOOKING
    ]
    return len(backward) == len(_names(inside, "loop"))


def _closes_alone(after: list[nodes.Node], tree: nodes.Template) -> bool:
    """The closing part may read nothing that an earlier part, the loop above all, has set."""
    if _all([tree], nodes.Macro, nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport):
        return False
    changed = {name.name for name in _all([tree], nodes.Name) if name.ctx == "store"}
    changed |= {reference.name for reference in _all([tree], nodes.NSRef)}
    return not _names(after, "messages", "loop", *changed)


def _without_tool_branches(body: list[Any]) -> list[nodes.Node]:
    """`body` less the branches that only a message of role tool can reach. Changes the nodes of `body` in place."""
    for branch in _all(body, nodes.If):
        if _asks_for_tool(branch.test):
            branch.body = []
    return body


def _asks_for_tool(test: nodes.Node) -> bool:
    """`message.role == 'tool'`, in either spelling of the field."""
    if not isinstance(test, nodes.Compare) or len(test.ops) != 1 or test.ops[0].op != "eq":
        return False
    asked, answer = test.expr, test.ops[0].expr
    field = asked.attr if isinstance(asked, nodes.Getattr) else getattr(getattr(asked, "arg", None), "value", None)
    return field == "role" and isinstance(answer, nodes.Const) and answer.value == "tool"


def _all(body: list[Any], *kinds: type[nodes.Node]) -> list[Any]:
    found: list[Any] = [node for node in body if isinstance(node, kinds)]
    for node in body:
        found += node.find_all(kinds)
    return found


def _names(body: list[Any], *names: str) -> list[nodes.Name]:
    return [node for node in _all(body, nodes.Name) if node.name in names]


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
