"""The text of every prefix must be that of transformers' own render, whatever a template reads and writes."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from accel_llm.chat import prefixes
from accel_llm.chat.loop_parts import compile_parts
from accel_llm.chat.prefixes import Prefixes

ROOT = Path(__file__).parents[2]
FILES = [*ROOT.glob("tests/templates/*.jinja"), *(ROOT.parent / "shared" / "data").rglob("*.jinja")]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string", "description": "x"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "f0", "description": "d", "parameters": PARAMETERS}}]
END = "{%- if add_generation_prompt %}<bot>{%- endif %}"

# What a template may ask about messages that a prefix does not have.
LOOKING_AHEAD = {
    "next": "{%- for m in messages %}{{ m.role }}>{{ loop.nextitem is defined }},"
    "{{ loop.nextitem.role if not loop.last }},{{ loop.previtem.role if loop.previtem }};{%- endfor %}",
    "last role": "{%- for m in messages %}{{ m.role }}{{ messages[-1].role == 'user' }};{%- endfor %}",
    "length": "{%- for m in messages %}{{ loop.index0 == messages | length - 1 }}{{ loop.length }};{%- endfor %}",
    "near the end": "{%- for m in messages %}{{ loop.revindex < 3 }}{{ 2 >= loop.revindex0 }};{%- endfor %}",
    "far from the end": "{%- for m in messages %}{{ '!' if loop.length - loop.index != 2 }}{{ m.role }}{%- endfor %}",
    "parity": "{%- for m in messages %}{{ (messages | length) % 2 }}{{ -loop.length }}{{ m.content }}{%- endfor %}",
    "a count": "{%- set ns = namespace(n=0) %}{%- for m in messages %}{%- set ns.n = ns.n + loop.index %}"
    "{{ m.role }}{{ ns.n }}{%- endfor %}{{ ns.n > 3 }}",
    "later ones": "{%- for m in messages %}{%- for later in messages[loop.index:] %}{{ later.role[0] }}"
    "{%- if later.role == 'user' %}{%- break %}{%- endif %}{%- endfor %};{%- endfor %}",
    "all but one": "{%- for m in messages[1:-1] %}{{ loop.last }}{{ m.role }}{%- else %}none{%- endfor %}",
    "left early": "{%- for m in messages %}{{ m.role }}{%- if loop.index == 4 %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}{%- continue %}{%- endif %}{{ loop.last }}{%- endfor %}",
    "a part": "{%- for m in messages[1:] %}{{ loop.first }}{{ m.content }}{{ messages[loop.index].role }}{%- endfor %}"
    "{%- for m in messages[:2] %}{{ m.role }}{%- endfor %}",
    "a macro": "{%- macro last() %}{{ messages | last | tojson }}{{ x }}{%- endmacro %}{%- set x = 1 %}"
    "{%- for m in messages %}{{ m.role }}{%- if loop.index0 % 3 == 2 %}{{ last() }}{%- endif %}{%- endfor %}"
    "{%- set x = 2 %}{{ last() }}",
    "loop given away": "{%- macro end(l) %}{{ l.last }}{{ l.index }}{%- endmacro %}"
    "{%- for m in messages %}{{ end(loop) }}{%- for c in m.tool_calls %}{{ end(loop) }}{%- endfor %}{%- endfor %}",
    "a cycle": "{%- for m in messages %}{{ loop.cycle('a', 'b') }}{{ m.role }}{%- endfor %}",
    "the last question": "{%- set ns = namespace(last=-1, n=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = ns.last + 1 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.n = ns.n + 1 %}{%- endif %}{{ m.role }}{{ ns.n == ns.last }}{{ ns.n > ns.last - 1 }};{%- endfor %}",
    "none or a number": "{%- set ns = namespace(a=none, b=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.a = loop.index0 %}{%- elif m.role == 'tool' %}{%- set ns.b = m.content %}{%- endif %}{%- endfor %}"
    "{%- set c = ns.a %}{%- for m in messages %}{{ ns.a is none }}{{ c is not none }}{{ ns.b is string }}"
    "{{ ns.b is number }}{{ ns.nothing is defined }}{{ m.role }}{%- endfor %}",
    "backward": "{%- set ns = namespace(last=messages | length - 1, on=true) %}{%- for m in messages[::-1] %}"
    "{%- set index = messages | length - 1 - loop.index0 %}{%- if ns.on and m.role == 'user' %}{%- set ns.on = false %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{ loop.index0 > ns.last }}{{ ns.last - loop.index0 == 1 }}{{ m.role }}{%- endfor %}",
    "backward, written": "{%- for m in messages[::-1] %}{{ m.role }}{{ loop.first }}{{ loop.last }}{{ loop.nextitem }}"
    "{{ loop.index }}{%- if m.role == 'system' %}{%- break %}{%- endif %}{%- endfor %}",
    "by number": "{%- set ns = namespace(u=0) %}{%- for i in range(messages | length) %}"
    "{%- if messages[i].role == 'user' %}{%- set ns.u = i %}{%- endif %}{%- endfor %}{{ ns.u }}"
    "{%- for i in range(messages | length - 1, -1, -1) %}{{ messages[i].role }}{{ i }}{%- endfor %}",
    "filters": "{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{%- for m in messages if m.role != 'system' %}{{ m.role }}{{ m == users[-1] }}{%- endfor %}{{ users | length }}",
    "another list": "{%- if messages[0].role == 'system' %}{%- set loop_messages = messages[1:] %}{%- else %}"
    "{%- set loop_messages = messages %}{%- endif %}{%- for m in loop_messages %}{{ loop.length }}{{ m.role }}"
    "{%- endfor %}{{ loop_messages[0].content }}{{ loop_messages | length > 2 }}",
    "same name": "{%- set messages = messages[1:] if messages[0].role == 'system' else messages %}"
    "{%- if messages and messages[-1].role == 'assistant' %}{%- set messages = messages[:-1] %}{%- endif %}"
    "{%- for m in messages %}{{ loop.last }}{{ m.role }}{%- endfor %}",
    "flag inside": "{%- macro f() %}{{ add_generation_prompt }}{%- endmacro %}{%- for m in messages %}{{ m.role }}"
    "{{ add_generation_prompt and loop.last }}{{ f() }}{%- endfor %}",
    "branches": "{%- if messages | length > 3 %}{%- set note %}long{%- endset %}{%- for m in messages %}{{ m.role }}"
    "{{ note }}{%- endfor %}{%- elif tools %}{{ tools | tojson }}{%- else %}{%- for m in messages %}{{ m.content }}"
    "{%- endfor %}{%- endif %}{{ note }}",
    "refusal": "{%- for m in messages %}{{ m.role }}{%- if loop.last and m.role == 'tool' or loop.length == 4 %}"
    "{{ raise_exception('No ' ~ loop.length ~ m.content) }}{%- endif %}{%- endfor %}",
    "error": "{%- for m in messages %}{{ m.content + m.reasoning_content.x.y }}{%- endfor %}",
    "strange sums": "{%- set n = messages | length %}{%- for m in messages %}{{ 10 - n }}{{ n / 2 }}{{ n * 'ab' }}"
    "{{ n ** 2 > 9 }}{{ n + 0.5 < loop.length }}{{ '%d' % loop.length }}{{ n is even }}{{ [n, loop.length] }}"
    "{{ {'n': n, 3: 4}[loop.length] }}{{ n in [2, 3] }}{{ loop.length or 1 }}{{ loop.revindex0 is number }}"
    "{{ 'x' * loop.revindex }}{{ [loop.revindex0] | tojson if false }}{{ loop.length ~ '' }}{%- endfor %}",
    "messages as a whole": "{{ messages }}{{ messages == [] }}{{ messages[0] in messages }}"
    "{{ (messages + [1]) | length }}{{ ([1] + messages) | length }}{{ messages is sequence }}{{ messages is iterable }}"
    "{{ messages | tojson }}{{ messages[-2:] | length }}{{ messages[1::2] | length }}{{ messages[:1] }}{{ messages[3] }}",
    "namespaces": "{%- set a = namespace(x=1, y={'z': []}) %}{%- set b = a %}{%- for m in messages %}"
    "{%- set own = namespace(t='') %}{%- for c in m.content %}{%- set own.t = c ~ own.t %}{%- endfor %}"
    "{%- set b.x = a.x + 1 %}{%- set a.seen = own.t %}{{ a['x'] }}{{ own.t }}{{ b.none is defined }}{%- endfor %}"
    "{{ a.x }}{{ b.seen }}{{ a.y }}",
    "set late": "{{ x is defined }}{{ y is defined }}{%- for m in messages %}{{ x }}{{ bos_token }}{%- set x = m.role %}"
    "{{ x }}{%- endfor %}{{ x }}{%- set x = 5 %}{%- set bos_token = 'b' %}{%- if messages | length > 2 %}"
    "{%- set y = 1 %}{%- set eos_token = 'e' %}{%- endif %}{{ x }}{{ y }}{{ bos_token }}{{ eos_token }}",
    "a call": "{%- macro box(role) %}[{{ role }}{{ caller(messages | length) }}]{%- endmacro %}{%- for m in messages %}"
    "{%- call(n) box(m.role) %}{{ n < 3 }}{{ loop.last }}{%- endcall %}{%- endfor %}"
    "{%- filter upper %}{%- for m in messages %}{{ m.role }}{%- endfor %}{%- endfilter %}"
    "{%- with k = messages | length %}{{ k }}{%- endwith %}",
    "recursive": "{%- for m in messages recursive %}{{ m.role }}{%- if m.tool_calls %}{{ loop(m.tool_calls) }}"
    "{%- endif %}{%- endfor %}",
    "trained parts": "{%- for m in messages %}{%- generation %}{{ m.role }}{{ loop.last }}{%- endgeneration %}"
    "{%- endfor %}",
}
# State that cannot be noted: these are rendered anew.
NOT_COVERED = {
    "cycler": "{%- set c = cycler('a', 'b') %}{%- for m in messages %}{{ c.next() }}{{ m.role }}{%- endfor %}",
    "changed": "{%- for m in messages %}{{ loop.changed(m.role) }}{%- endfor %}",
    "an iterator": "{%- set rest = messages | map(attribute='role') %}{%- for m in messages %}"
    "{{ rest | first }}{{ loop.last }}{%- endfor %}",
    "loop kept": "{%- set ns = namespace(l={}) %}{%- for m in messages %}{{ ns.l.index }}{%- set ns.l = loop %}{%- endfor %}",
    "attr": "{%- set ns = namespace(number=7) %}{%- for m in messages %}{{ ns | attr('number') }}{%- endfor %}",
    "block": "{%- block b %}{%- for m in messages %}{{ m.role }}{%- endfor %}{%- endblock %}",
}

TEXTS = st.sampled_from(["", "Hi", " a ", " \n", "</think>", "<think>x</think>y", 'it\'s "q"', "é😀", "long " * 3])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw an ordinary conversation, or roles in any order."""
    if draw(st.integers(0, 3)) == 0:
        roles = draw(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=6))
        return [{"role": role, "content": draw(TEXTS)} for role in roles]
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        for calls in (*draw(st.lists(st.integers(1, 2), max_size=2)), 0):
            answer = {"role": "assistant", "content": draw(TEXTS)}
            if draw(st.booleans()):
                answer["reasoning_content"] = draw(TEXTS)
            names = [f"f{k}" for k in range(calls)]
            if calls:
                functions = [{"name": name, "arguments": {"a": draw(TEXTS)}} for name in names]
                answer["tool_calls"] = [
                    {"type": "function", "id": f["name"] * 4 + "x", "function": f} for f in functions
                ]
            results = [{"role": "tool", "name": n, "tool_call_id": n * 4 + "x", "content": draw(TEXTS)} for n in names]
            messages += [answer, *results]
    return messages


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(prefixes, "BLOCK", 3)


def outcome(render) -> str | tuple[str, str]:
    try:
        return render()
    except Exception as error:
        return type(error).__name__, str(error)


def check(source: str, examples: int) -> None:
    """Compare all prefixes of drawn conversations, asked for in any order, with transformers' renders."""

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(conversations(), st.booleans(), st.sampled_from([{}, {"enable_thinking": False}]), st.randoms())
    def holds(messages, with_tools, more, random) -> None:
        tools, variables = TOOLS if with_tools else None, {**VARIABLES, **more}
        rendered = Prefixes(source, variables, messages, tools)
        asked = [(count, prompt) for count in range(len(messages) + 1) for prompt in (False, True)]
        asked.insert(0, asked[-2])
        if random.random() < 0.3:
            random.shuffle(asked)
        for count, prompt in asked:
            options = {**variables, "tools": tools, "add_generation_prompt": prompt}
            truth = outcome(lambda: render_jinja_template([messages[:count]], chat_template=source, **options)[0][0])  # noqa: B023
            assert outcome(lambda: rendered.render(count, prompt)) == truth, (count, prompt)  # noqa: B023

    holds()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_prefix_is_what_transformers_renders(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert compile_parts(source) is not None
    check(source, 3)


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_templates_that_look_ahead(name: str) -> None:
    source = LOOKING_AHEAD[name] + END
    assert compile_parts(source) is not None
    check(source, 8)


@pytest.mark.parametrize("name", NOT_COVERED)
def test_templates_that_cannot_be_noted(name: str) -> None:
    check(NOT_COVERED[name] + END, 6)


def test_a_content_that_is_none_stays_none() -> None:
    """DeepSeek-R1's template writes the calls of a message only if its content is None."""
    source = (ROOT / "tests" / "templates" / "deepseek-r1-distill.jinja").read_text(encoding="utf-8")
    messages = [message | {"content": None} if "tool_calls" in message else message for message in talk(2, True)]
    rendered = Prefixes(source, VARIABLES, messages, None)
    for count in range(1, len(messages) + 1):
        truth = render_jinja_template([messages[:count]], chat_template=source, **VARIABLES)[0][0]
        assert rendered.render(count, False) == truth
        assert truth.count("tool▁call▁begin") == count // 2


def talk(turns: int, calls: bool) -> list[dict[str, Any]]:
    """Return turns of one tool call each after one question, or questions and answers."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f0", "arguments": {"a": "b"}}}
    result = {"role": "tool", "name": "f0", "tool_call_id": "abcdefghi", "content": "It rains."}
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I look."}
    return [question, *[answer | {"tool_calls": [call]}, result] * turns] if calls else [question, answer] * turns


def count_runs(monkeypatch, source: str, messages: list[dict[str, Any]]) -> int:
    """Return how often a part of the template runs when all prefixes are rendered, after the whole conversation."""
    runs = 0
    true_run = Prefixes._run

    def run(self, code):
        nonlocal runs
        runs += 1
        return true_run(self, code)

    monkeypatch.setattr(Prefixes, "_run", run)
    monkeypatch.setattr(prefixes.chat_template_utils, "render_jinja_template", None)  # never needed
    rendered = Prefixes(source, VARIABLES, messages, TOOLS)
    rendered.render(len(messages), False)
    for count in range(1, len(messages)):
        rendered.render(count, True)
        rendered.render(count, False)
    monkeypatch.undo()
    return runs


# These read the whole conversation for each message (for the call of a result, for the message after the results).
WHOLE = {"command-r7b", "gemma-4"}


@pytest.mark.parametrize("file", [file for file in FILES if file.stem not in WHOLE], ids=lambda file: file.stem)
@pytest.mark.parametrize("calls", [True, False], ids=["calls", "answers"])
def test_the_work_grows_with_the_conversation(file: Path, calls: bool, monkeypatch) -> None:
    source = file.read_text(encoding="utf-8")
    try:
        Prefixes(source, VARIABLES, talk(4, calls), TOOLS).render(8, False)
    except Exception:
        pytest.skip("the template refuses such a conversation")
    short, long = (count_runs(monkeypatch, source, talk(turns, calls)) for turns in (6, 24))
    assert long < 5 * short


def test_a_template_that_does_not_look_ahead_runs_once(monkeypatch) -> None:
    source = "{{ tools | tojson }}{%- for m in messages %}{{ m.role }}{{ m.content }}{%- endfor %}" + END
    messages = talk(20, True)
    # One run for each message, and for: the tools, what to loop over, the end with and without a prompt.
    assert count_runs(monkeypatch, source, messages) == len(messages) + 4


def test_an_invalid_template_or_option_is_left_to_transformers() -> None:
    messages = [{"role": "user", "content": None}]
    with pytest.raises(jinja2.TemplateSyntaxError):
        Prefixes("{% for %}", {}, messages, None).render(1, True)
    rendered = Prefixes("{{ documents }}{{ messages }}", {"documents": [{"a": 1}]}, messages, None)
    assert rendered.render(1, False) == "[{'a': 1}][{'role': 'user', 'content': None}]"
    with pytest.raises(ValueError, match="JSON schema"):
        Prefixes("{{ tools }}", {}, messages, [1]).render(1, False)
