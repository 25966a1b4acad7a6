"""A pattern must give the same text as a render, for every conversation that it is used for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CONTROL_TOKENS, CONVERSATIONS, MULTI, SOURCES, SYSTEM, byte_level, load_source

from accel_llm.chat.stand_ins import (
    StandIn,
    Trace,
    Untraceable,
    compile_traceable,
    fill_stand_ins,
    format_string,
    replay,
)

CLOSED = "{%- macro unused() %}{%- endmacro %}"  # writes nothing, but a template with a macro is never traced
LOOP = "{%- for message in messages %}{{ message.role }}: {{ message.content }}</s>{%- endfor %}"
PROMPT = "{%- if add_generation_prompt %}assistant: {%- endif %}"
# A template that uses every operation on texts that can be traced.
CURIOUS = (
    "{%- for message in messages %}{%- set text = message.content %}"
    "{%- if text.startswith('Hi') or text == 'And 2+2?' %}{%- set text = text.upper() %}{%- endif %}"
    "{%- if '</think>' in text %}{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if not text %}{%- set text = '(empty)' %}{%- endif %}"
    "{%- if (message.role + ': ' + text) | length > 40 %}{%- set text = (text | trim).replace('a', 'bb') %}{%- endif %}"
    "{{- message.role + ': ' + (('<' + text) | trim) + '</s>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: <' }}{%- endif %}"
)


@pytest.mark.parametrize("family", SOURCES)
def test_patterns_give_what_a_render_for_each_turn_gives(family: str, tmp_path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS[family])
    assert compile_traceable(SOURCES[family]) is not None
    assert compile_traceable(SOURCES[family] + CLOSED) is None
    traced = load_source(tokenizer, SOURCES[family], tmp_path)
    rendered = load_source(tokenizer, SOURCES[family] + CLOSED, tmp_path)
    talks = [
        *CONVERSATIONS.values(),
        [*SYSTEM, *MULTI[:1]],
        [*SYSTEM[:2], {"role": "assistant", "content": "\ufdd3 0"}],
    ]
    for messages in talks:
        other = [{**message, "content": message["content"] + " more"} for message in messages]
        weighted = [{**message, "weight": 0.5} for message in messages]
        for talk in (messages, other, weighted):
            for options in ({}, {"split_turns": True}, {"train_on": "last_assistant"}, {"train_on": "all"}):
                once, again = traced.encode(talk, **options), traced.encode(talk, **options)
                assert once == again == rendered.encode(talk, **options)
    assert traced._plain.patterns._patterns and not rendered._plain.patterns._patterns


TEXTS = st.lists(
    st.sampled_from(
        [
            "Hi",
            "a",
            " ",
            "\n",
            "</think>",
            "<think>",
            "<|im_end|>",
            "</s>",
            "é😀",
            "And 2+2?",
            "Hello. ",
        ]
    ),
    max_size=6,
).map("".join)
TALKS = st.lists(st.tuples(TEXTS, TEXTS, st.one_of(st.none(), TEXTS)), min_size=1, max_size=3)


@pytest.mark.parametrize("source", [*(SOURCES[name] for name in ("qwen3", "llama-3", "gemma")), CURIOUS])
def test_any_conversation_comes_out_alike(source: str, tmp_path) -> None:
    tokenizer = byte_level([*CONTROL_TOKENS["qwen3"], *CONTROL_TOKENS["llama-3"], *CONTROL_TOKENS["gemma"]])
    traced, rendered = (load_source(tokenizer, text, tmp_path) for text in (source, source + CLOSED))
    assert compile_traceable(source) is not None

    @settings(max_examples=150, deadline=None)
    @given(TALKS, st.booleans())
    def holds(talk: list[tuple[str, str, str | None]], split_turns: bool) -> None:
        messages = []
        for question, answer, thought in talk:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
            if thought is not None:
                messages[-1]["reasoning_content"] = thought
        ours, truth = (template.encode(messages, split_turns=split_turns) for template in (traced, rendered))
        assert ours == truth

    holds()
    assert sum(map(len, traced._plain.patterns._patterns.values())) > 1


def test_a_pattern_is_left_where_an_answer_differs() -> None:
    trace = Trace(["  yes ", "no"])
    first, second = trace.stand_in(0), trace.stand_in(1)
    assert first and "yes" in first and not second.startswith("x") and len(second) == 2
    stripped = first.strip()
    assert isinstance(stripped, StandIn) and trace.texts == ["  yes ", "no", "yes"]
    assert second.strip() == "no" and trace.texts[3:] == []  # nothing to trim: the same text
    both = "<" + stripped + "|" + second + ">"
    assert fill_stand_ins(both, trace.texts) == "<yes|no>"
    assert format_string("100% " + str(both)) == ("100%% <%s|%s>", (2, 1))
    assert replay(trace.questions, [" yes", "no"]) == [" yes", "no", "yes"]
    for texts in (["yes", "no"], [" ye s", "no"], [" yes", "xo"], [" yes", "n o"], [" yes", "n "]):
        assert replay(trace.questions, texts) is None, texts


def test_parts_of_a_text_are_texts() -> None:
    trace = Trace(["a</think>b"])
    pieces = trace.stand_in(0).split("</think>")
    assert len(pieces) == 2 and fill_stand_ins(pieces[1] + "!", trace.texts) == "b!"
    assert replay(trace.questions, ["1</think>2"]) == ["1</think>2", "1", "2"]
    assert replay(trace.questions, ["1</think>2</think>3"]) is None


@pytest.mark.parametrize(
    "question",
    [
        lambda text: text[0],
        lambda text: "%s" % text,  # noqa: UP031
        lambda text: f"{text:>4}",
        lambda text: {text: 1},
        lambda text: list(text),
        lambda text: text * 2,
        lambda text: text < "b",
        lambda text: text.encode(),
        lambda text: text == text,
        lambda text: text.join("ab"),
    ],
)
def test_what_cannot_be_followed_is_refused(question) -> None:
    with pytest.raises(Untraceable):
        question(Trace(["a"]).stand_in(0))


BEHIND_ITS_BACK = {
    "a macro": "{% macro f(text) %}{{ text }}{% endmacro %}{{ f(messages[0].content) }}",
    "a joined list": "{{ ', '.join([messages[0].content]) }}",
    "a filter of C code": "{{ [messages[0].content] | join }}",
    "replaced by a filter": "{{ messages[0].content | replace('a', 'b') }}",
    "a text that is looked for": "{{ 'yes' if messages[0].content in 'some text' }}",
    "joined, then used": "{% set text = 'a' ~ messages[0].content %}{{ text | trim }}",
    "an argument": "{{ 'abc'.startswith(messages[0].content) }}",
    "a block that is set": "{% set text %}{{ messages[0].content }}{% endset %}{{ text }}",
    "a filtered block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "a loop over a part": "{{ messages | map(attribute='content') | list }}",
    "a function that is not known": "{{ dict(a=messages[0].content) }}",
}


@pytest.mark.parametrize("what", BEHIND_ITS_BACK)
def test_a_template_that_could_look_behind_a_stand_in_is_never_traced(what: str) -> None:
    assert compile_traceable(LOOP + PROMPT) is not None
    assert compile_traceable(BEHIND_ITS_BACK[what] + LOOP + PROMPT) is None


def test_a_text_that_is_written_as_json_is_not_traced(tmp_path) -> None:
    source = LOOP.replace("{{ message.content }}", "{{ message.content | tojson }}") + PROMPT
    assert compile_traceable(source) is not None  # tools are written in this way and hold no stand-in
    template = load_source(byte_level([]), source, tmp_path)
    rendered = load_source(byte_level([]), source + CLOSED, tmp_path)
    talk = [{"role": "user", "content": 'a "b"\n'}, {"role": "assistant", "content": "c\\"}]
    assert template.encode(talk) == rendered.encode(talk)
    assert not any(template._plain.patterns._patterns.values())


def test_generation_tags_are_followed() -> None:
    assert compile_traceable(
        LOOP.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")
    )
