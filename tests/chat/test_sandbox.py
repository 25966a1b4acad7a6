"""Limits of chat templates: one that hangs, grows or leaves the sandbox is refused in one sentence; others work."""

import gc
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_llm.chat import sandbox
from accel_llm.chat.sandbox import run_bounded
from accel_llm.chat.stand_ins import StandIn
from accel_llm.chat.template import load_template
from accel_llm.config.data_options import DataOptions
from accel_llm.data.prepare import encode_conversations
from accel_llm.errors import ConfigError, DataError

TAIL = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(70) %%}{%% set ns.x = %s %%}{%% endfor %%}"
NEST = GROW % ("[1]", "[ns.x, ns.x]")
MEGABYTE = "{% set x = 'a' * 1000000 %}"

TIME = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "list of lists": NEST + "{{ ns.x }}",
    "list of lists as JSON": NEST + "{{ ns.x | tojson }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "words": "{{ lipsum(n=10 ** 7) }}",
}
COMPARED = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(70) %}{% set ns.x = [ns.x, ns.x] %}"
COMPARED += "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
MEMORY = {
    "product": "{{ 'a' * 10 ** 11 }}",
    "product of what is not known before": "{{ 'a' * (10 ** 11 * messages | length) }}",
    "sum": GROW % ("'aaaaaaaa'", "ns.x + ns.x"),
    "join": GROW % ("'aaaaaaaa'", "ns.x ~ ns.x"),
    "list": GROW % ("[1]", "ns.x * 2"),
    "center": "{{ 'a' | center(10 ** 11) }}",
    "format": "{{ '%99999999999d' | format(1) }}",
    "format method": "{{ '{:>99999999999}'.format(1) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "replace": MEGABYTE + "{{ x.replace('a', x) }}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(10 ** 6) }}",
    "bytes": "{{ (1).to_bytes(10 ** 11, 'big') }}",
    "separator": MEGABYTE + "{{ range(99999) | list | join(x) }}",
    "output": MEGABYTE + "{% for i in range(99999) %}{{ x }}{% endfor %}",
    "ranges": "{% set ns = namespace(x=[]) %}{% for a in range(9999) %}"
    "{% set ns.x = ns.x + [(range(99) | list) * 1000] %}{% endfor %}",
}
# Templates that fail in other ways, with a part of the error.
FAULTY = {
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "range": ("{{ range(10 ** 9) | list }}", "Range too big"),
    "loops in loops": ("{% for a in messages %}" * 40 + "{% endfor %}" * 40, "too many statically nested blocks"),
    "parentheses": ("{{ " + "(" * 50000 + " }}", "maximum recursion depth exceeded"),
    "long word": ("{{ raise_exception('x' * 10 ** 6) }}", "xxx"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "access to attribute '__init__'"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "access to attribute '__class__'"),
    "stand-in": ("{{ messages[0].content._trace.texts }}", "'str object' has no attribute '_trace'"),
    "include": ("{% include '/etc/passwd' %}", "no loader for this environment"),
    "import": ("{% import 'os' as os %}{{ os.system('touch x') }}", "no loader for this environment"),
}


@pytest.fixture
def small(monkeypatch) -> Iterator[None]:
    """Small limits, so that the tests are quick."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "MAX_MEMORY", 96 << 20)
    monkeypatch.setattr(sandbox, "_memory_limits", None)
    # Some templates make millions of lists. Without freeze the garbage collector would scan the objects of other tests
    # again and again meanwhile.
    gc.freeze()
    yield
    gc.unfreeze()


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def refusal(tokenizer: Any, source: str) -> str:
    tokenizer.chat_template = source + TAIL
    with pytest.raises(ConfigError) as error:
        load_template(tokenizer)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert resource.getrlimit(resource.RLIMIT_DATA) == USUAL and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    return str(error.value)


USUAL = resource.getrlimit(resource.RLIMIT_DATA)


@pytest.mark.parametrize("how", TIME)
def test_a_template_that_goes_on_for_ever_is_stopped(tokenizer, small, how):
    began = time.process_time()
    assert refusal(tokenizer, TIME[how]).startswith(
        "chat_template: it was stopped because it took more than 0.2 seconds, which"
    )
    assert 0.1 < time.process_time() - began < 3


@pytest.mark.parametrize("how", MEMORY)
def test_a_template_that_grows_without_end_is_stopped(tokenizer, small, monkeypatch, how):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 20)
    monkeypatch.setattr(sandbox, "STUCK_SECONDS", 60)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before, began = resident("VmRSS"), os.times().user
    assert refusal(tokenizer, MEMORY[how]).startswith(
        "chat_template: it was stopped because it took more than 96 MiB of memory,"
    )
    assert resident("VmHWM") - before < 128 << 20
    # User time only: at the limit Python asks the kernel for memory in vain for each small object.
    assert os.times().user - began < 5


@pytest.mark.parametrize("how", FAULTY)
def test_a_template_that_fails_is_refused(tokenizer, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    source, reason = FAULTY[how]
    assert f"the chat template refuses this conversation: {reason}" in refusal(tokenizer, source)
    assert list(tmp_path.iterdir()) == []


def test_a_source_out_of_all_proportion_is_not_compiled(tokenizer, tmp_path):
    source = "{{ messages[0].content }}" * 6000
    assert refusal(tokenizer, source).startswith("chat_template: its source is more than 131,072 characters long, but")
    file = tmp_path / "long.jinja"
    file.write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match="more than 131,072 characters"):
        load_template(tokenizer, str(file))


def test_the_true_limits_stop_a_template_in_seconds(tokenizer):
    began = time.process_time()
    assert "more than 3 seconds" in refusal(tokenizer, TIME["loops"])
    assert 2.5 < time.process_time() - began < 6  # the timer counts user time only, in coarse ticks
    assert "more than 1024 MiB of memory" in refusal(tokenizer, MEMORY["product"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 says so wherever there are threads
def test_a_template_that_is_stuck_in_c_ends_its_process(tokenizer, small, monkeypatch, capfd):
    monkeypatch.setattr(sandbox, "STUCK_SECONDS", 1)
    tokenizer.chat_template = COMPARED + TAIL
    child = multiprocessing.get_context("fork").Process(target=load_template, args=(tokenizer,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGPROF
    assert 'File "<template>", line ' in capfd.readouterr().err


def test_a_stand_in_shows_a_template_nothing_of_its_own(tokenizer):
    """Templates are rendered with stand-ins while a pattern is learnt; these must show no more than a text does."""
    names = sorted(set(dir(StandIn)) - set(dir(str)))
    assert names and all(name.startswith("_") for name in names)


def chat(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


def test_a_template_may_behave_until_it_sees_a_conversation(tokenizer, small):
    tokenizer.chat_template = "{% if 'boom' in messages[0].content %}" + TIME["loops"] + "{% endif %}" + TAIL
    template = load_template(tokenizer)
    assert template.encode(chat("hi", "ho")).rows and template.encode(chat("hey", "ho")).rows
    for act in (template.encode, template.prompt_ids, template.render):
        with pytest.raises(ConfigError, match=r"more than 0\.2 seconds"):
            act(chat("boom", "ho"))


def test_texts_are_in_proportion_to_what_people_wrote(tokenizer, monkeypatch):
    tokenizer.chat_template = TAIL.replace("message.content", "message.content * 40")
    rendered = load_template(tokenizer)
    tokenizer.chat_template = TAIL.replace("message.content", "('' " + "~ message.content" * 40 + ")")
    joined = load_template(tokenizer)
    for template in (rendered, joined):
        assert len(template.render(chat("a" * 1000, "b"))) > 40_000
        for act in (template.encode, template.render):
            with pytest.raises(
                ConfigError, match=r"^chat_template: it wrote 4,000,\d+ characters for a conversation of 100,"
            ):
                act(chat("a" * 100_000, "b"))
    tokenizer.chat_template = TAIL
    plain = load_template(tokenizer)
    assert len(plain.render(chat("a" * 3_000_000, "b"))) > 3_000_000
    # Patterns are filled in without limits, so a template that repeats a text or makes it grow must not become one.
    tokenizer.chat_template = TAIL.replace("message.content", "message.content.replace('e', '" + "x" * 100 + "') + ''")
    growing = load_template(tokenizer)
    growing.encode(chat("here", "there"))
    plain.encode(chat("here", "there"))
    assert plain._plain.patterns._patterns and not any(growing._plain.patterns._patterns.values())


def test_a_long_conversation_is_no_template_that_hangs(tokenizer, small):
    # With `random` each beginning of the conversation is rendered anew.
    tokenizer.chat_template = "{% set x = ['a'] | random %}" + TAIL
    template, began = load_template(tokenizer), time.process_time()
    assert template.encode(chat(*["word"] * 800)).rows
    assert time.process_time() - began > 3 * 0.2


def test_what_comes_out_comes_out_unchanged(small):
    def refuse() -> None:
        raise DataError("no")

    with pytest.raises(DataError, match=r"^no$"):
        run_bounded(refuse)
    assert run_bounded(lambda: run_bounded(max, 3, 4)) == 4
    assert resource.getrlimit(resource.RLIMIT_DATA) == USUAL and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    results = []
    thread = threading.Thread(target=lambda: results.append(run_bounded(max, 3, 4)))
    thread.start()
    thread.join()
    assert results == [4]


@pytest.mark.long
def test_a_worker_is_bounded_and_ends_the_run_with_the_sentence(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    conversations = [{"messages": chat("boom" if k > 550 else f"{k}", "b")} for k in range(600)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations), encoding="utf-8")
    tokenizer.chat_template = "{% if 'boom' in messages[0].content %}" + TIME["loops"] + "{% endif %}" + TAIL
    options = DataOptions(
        train_files=[str(rows)], cache_dir=str(tmp_path / "cache"), preprocessing_num_workers=2, on_bad_row="drop"
    )
    with pytest.raises(ConfigError, match=r"^chat_template: it was stopped because it took more than 3 seconds, which"):
        encode_conversations(options, 0, tokenizer, load_template(tokenizer))
