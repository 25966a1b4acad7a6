"""What a template reads of a row, found in its syntax tree."""

from pathlib import Path

import pytest

from accel_llm.chat.reads import TemplateReads, template_reads

TEMPLATES = Path(__file__).parents[1] / "templates"
LOOP = "{% for message in messages %}{{ message.role }}{{ message['content'] }}{% endfor %}"
ROLE = {"role"}
CASES = {
    "attribute and key": (LOOP, {"role", "content"}, set()),
    "get": ("{% for m in messages %}{{ m.get('mood', '') }}{% endfor %}", {"mood"}, set()),
    "in": ("{% for m in messages %}{% if 'tools' in m %}x{% endif %}{% endfor %}", {"tools"}, set()),
    "is defined": ("{% for m in messages %}{% if m.name is defined %}x{% endif %}{% endfor %}", {"name"}, set()),
    "by number": ("{{ messages[0]['role'] }}{{ messages[-1].mood }}", {"role", "mood"}, set()),
    "slice": ("{% set rest = messages[1:] %}{% for m in rest %}{{ m.role }}{% endfor %}", ROLE, set()),
    "other name": ("{% set last = messages | last %}{{ last.mood }}", {"mood"}, set()),
    "namespace": (
        "{% set ns = namespace(m=messages[0]) %}{% set ns.m = messages[1] %}{{ ns.m.mood }}",
        {"mood"},
        set(),
    ),
    "macro": (
        "{% macro show(m) %}{{ m.mood }}{% endmacro %}{% for x in messages %}{{ show(x) }}{% endfor %}",
        {"mood"},
        set(),
    ),
    "filter by key": ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", ROLE, set()),
    "map": ("{{ messages | map(attribute='content') | join }}", {"content"}, set()),
    "neighbors": ("{% for m in messages %}{{ loop.previtem.role if not loop.first }}{% endfor %}", ROLE, set()),
    "parts": (
        "{% for m in messages %}{% for part in m.content %}{{ part.type }}{{ part['text'] }}{% endfor %}{% endfor %}",
        {"content"},
        {"type", "text"},
    ),
    "not of a message": (
        "{% for tool in tools %}{{ tool.name }}{% endfor %}{% for m in messages %}{{ m.role }}{{ loop.index }}"
        "{% for call in m.tool_calls %}{{ call.id }}{% endfor %}{% endfor %}",
        {"role", "tool_calls"},
        set(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_keys_of_messages_and_parts(case: str) -> None:
    source, keys, parts = CASES[case]
    reads = template_reads(source)
    assert (set(reads.message_keys), set(reads.part_keys), reads.whole_messages) == (keys, parts, False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{% for m in messages %}{{ m | tojson }}{% endfor %}",
        "{% for m in messages %}{% for key, value in m.items() %}{{ key }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m }}{% endfor %}",
        "{% for m in messages %}{% for key in ('a', 'b') %}{{ m[key] }}{% endfor %}{% endfor %}",
    ],
)
def test_messages_that_are_written_whole(source: str) -> None:
    assert template_reads(source).whole_messages
    assert not template_reads(LOOP).whole_messages


def test_variables_are_what_the_template_takes_from_outside() -> None:
    source = (
        "{% if not date is defined %}{% set date = 'today' %}{% endif %}{% if documents %}{{ documents }}{% endif %}"
        "{% if tools %}{% set text = 'a' %}{% else %}{% set text = 'b' %}{% endif %}{{ text }}{{ date }}"
        "{% set thinking = thinking | default(false) %}{% for m in messages %}{% set x = m.content %}{{ x }}{% endfor %}"
        "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    )
    reads = template_reads(source)
    assert set(reads.variables) == {"date", "documents", "thinking"} and reads.tools
    assert not template_reads(LOOP).tools


@pytest.mark.parametrize(
    ("name", "keys", "variables"),
    [
        ("qwen3", {"role", "content", "reasoning_content", "tool_calls"}, {"enable_thinking"}),
        ("mistral-v7", {"role", "content", "tool_call_id", "tool_calls"}, set()),
        ("gemma-3", {"role", "content"}, set()),
        ("command-r7b", {"role", "content", "tool_calls", "tool_plan"}, set()),
    ],
)
def test_held_templates(name: str, keys: set[str], variables: set[str]) -> None:
    reads = template_reads((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    assert keys <= reads.message_keys <= keys | {"tool_call_id", "name"}
    assert variables == {name for name in reads.variables if not name.endswith("_token")}


def test_the_union_of_two_templates() -> None:
    one, other = TemplateReads(frozenset("a"), frozenset("b")), TemplateReads(frozenset("c"), tools=True)
    assert one.union(other) == TemplateReads(frozenset("ac"), frozenset("b"), frozenset(), False, True)
