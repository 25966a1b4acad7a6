"""Masks of chat templates, compared with texts written by hand: text between ⟦ and ⟧ is trained, the rest is context."""

import json
import pickle
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CONTROL_TOKENS,
    CONVERSATIONS,
    MISTRAL,
    MULTI,
    QWEN3,
    QWEN25,
    SINGLE,
    SOURCES,
    SYSTEM,
    ZEPHYR,
    byte_level,
    load_source,
    sentence_piece_like,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.chat.targets import NO_PROMPT, NO_THOUGHT, NOT_AFTER_PROMPT, REWRITTEN
from accel_llm.chat.template import EncodedRow, load_template
from accel_llm.errors import ConfigError, DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")


# Published files of the same formats that give the same texts for the conversations here.
FILES = {
    "llama-3": "llama-3-instruct",
    "mistral": "mistral-instruct",
    "phi-3": "phi-3",
    "zephyr": "zephyr",
    "gemma": "gemma-it",
}
EXPECTED = {
    ("qwen2.5", "single"): [
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    ],
    ("qwen2.5", "multi"): [
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.\n\nSure.<|im_end|>⟧\n"
    ],
    ("qwen2.5", "system"): [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.\n\nSure.<|im_end|>⟧\n"
    ],
    ("llama-3", "single"): [
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
    ],
    ("llama-3", "multi"): [
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.\n\nSure.<|eot_id|>⟧"
    ],
    ("llama-3", "system"): [
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.\n\nSure.<|eot_id|>⟧"
    ],
    ("mistral", "single"): ["<s>[INST] Hi [/INST]⟦ Hello.</s>⟧"],
    ("mistral", "multi"): ["<s>[INST] Hi [/INST]⟦ Hello.</s>⟧[INST] And 2+2? [/INST]⟦ It is 4.\n\nSure.</s>⟧"],
    ("mistral", "system"): [
        "<s>Be brief.\n\n[INST] Hi [/INST]⟦ Hello.</s>⟧[INST] And 2+2? [/INST]⟦ It is 4.\n\nSure.</s>⟧"
    ],
    ("phi-3", "single"): ["<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"],
    ("phi-3", "multi"): [
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\nAnd 2+2?<|end|>\n<|assistant|>\n⟦It is 4.\n\nSure.<|end|>⟧\n"
    ],
    ("phi-3", "system"): [
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\nAnd 2+2?<|end|>\n<|assistant|>\n⟦It is 4.\n\nSure.<|end|>⟧\n"
    ],
    ("zephyr", "single"): ["<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n"],
    ("zephyr", "multi"): [
        "<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n<|user|>\nAnd 2+2?</s>\n<|assistant|>\n⟦It is 4.\n\nSure.</s>⟧\n"
    ],
    ("zephyr", "system"): [
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n"
        "<|user|>\nAnd 2+2?</s>\n<|assistant|>\n⟦It is 4.\n\nSure.</s>⟧\n"
    ],
    ("gemma", "single"): ["<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"],
    ("gemma", "multi"): [
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd 2+2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.\n\nSure.<end_of_turn>⟧\n"
    ],
    ("gemma", "system"): [
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd 2+2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.\n\nSure.<end_of_turn>⟧\n"
    ],
    # Qwen3 writes an empty think block before a last answer and removes it once another turn follows.
    ("qwen3", "single"): [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n"
    ],
    ("qwen3", "multi"): [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 4.\n\nSure.<|im_end|>⟧\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n",
    ],
    ("qwen3", "system"): [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nIt is 4.\n\nSure.<|im_end|>⟧\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n",
    ],
}


@lru_cache
def load_pretrained(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)


def runs(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> list[tuple[bool, str]]:
    """Return the runs of a row as (trained, text). Each is cut from a decoded prefix: decoders strip a first space."""
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    parts, end, before = [], 0, ""
    for trained, group in groupby(label != -100 for label in row.labels):
        end += len(list(group))
        text = tokenizer.decode(row.input_ids[:end])
        parts.append((trained, text[len(before) :]))
        before = text
    return parts


def mark_trained(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in runs(tokenizer, row))


def trained_texts(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> list[str]:
    return [text for trained, text in runs(tokenizer, row) if trained]


def check(family: str, source: str, tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS[family])
    template = load_source(tokenizer, source, tmp_path)
    for name, messages in CONVERSATIONS.items():
        encoding = template.encode(messages, split_turns=True)
        assert encoding.lost == {}
        assert [mark_trained(tokenizer, row) for row in encoding.rows] == EXPECTED[family, name]
        assert template.render(messages) == tokenizer.apply_chat_template(
            messages, chat_template=template.source, tokenize=False
        )


@pytest.mark.parametrize("family", SOURCES)
def test_masks_equal_handwritten_text(family: str, tmp_path: Path) -> None:
    check(family, SOURCES[family], tmp_path)


@needs_data
@pytest.mark.parametrize("family", FILES)
def test_masks_of_published_template_files(family: str, tmp_path: Path) -> None:
    path = DATA / "chat_templates" / "chujiezheng" / f"{FILES[family]}.jinja"
    check(family, path.read_text(encoding="utf-8"), tmp_path)


MUTATIONS = {
    "no end of turn": lambda source: (
        source.replace("'<|im_end|>\\n'", "'\\n'")
        .replace("<|eot_id|>", "")
        .replace(" + eos_token", "")
        .replace("<|end|>", "")
        .replace("<end_of_turn>", "")
    ),
    "other generation prompt": lambda source: (
        source.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>bot\\n' }}")
        .replace("assistant<|end_header_id|>", "bot<|end_header_id|>")
        .replace("'<|assistant|>\\n' }}", "'<|bot|>\\n' }}")
        .replace("'<start_of_turn>model\\n'", "'<start_of_turn>bot\\n'")
    ),
    "content in capitals": lambda source: (
        source.replace("'] | trim", "'] | trim | upper")
        .replace("+ message.content +", "+ message.content | upper +")
        .replace("+ content +", "+ content | upper +")
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", SOURCES)
def test_a_mutated_template_is_noticed(family: str, mutation: str, tmp_path: Path) -> None:
    source = MUTATIONS[mutation](SOURCES[family])
    if source == SOURCES[family]:
        assert (family, mutation) == (
            "mistral",
            "other generation prompt",
        )  # Mistral's prompt ends with the user's turn
        return
    with pytest.raises((AssertionError, ConfigError)):
        check(family, source, tmp_path)


def test_a_tool_call_and_the_answer_after_its_result_are_trained(tmp_path: Path) -> None:
    source = (
        "{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{%- for call in m.tool_calls or [] %}{{- '<call>' + call.function.name + '</call>' }}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]},
        {"role": "tool", "content": "4 <|im_end|>"},
        {"role": "assistant", "content": "Four."},
    ]
    (row,) = load_source(tokenizer, source, tmp_path).encode(messages, tools=[{"name": "add"}]).rows
    assert mark_trained(tokenizer, row) == (
        '<|im_start|>system\n[{"name": "add"}]<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n'
        "<|im_start|>assistant\n⟦<call>add</call><|im_end|>⟧\n<|im_start|>tool\n4 <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n"
    )
    assert row.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5


# ---- what a turn trains


def test_train_on_last_assistant_and_all(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    template = load_source(tokenizer, QWEN25, tmp_path)
    (last,) = template.encode(MULTI, train_on="last_assistant").rows
    assert trained_texts(tokenizer, last) == ["It is 4.\n\nSure.<|im_end|>"]
    (everything,) = template.encode(MULTI, train_on="all").rows
    assert everything.labels == everything.input_ids == last.input_ids


def test_a_message_with_train_false_is_context() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    messages = [*SINGLE, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye!"}]
    messages[1] = {**messages[1], "train": False}
    encoding = load_template(tokenizer, "chatml").encode(messages)
    assert [trained_texts(tokenizer, row) for row in encoding.rows] == [["Bye!<|im_end|>"]]
    assert encoding.lost == {}


def test_a_trailing_question_is_context() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    (row,) = load_template(tokenizer, "chatml").encode(MULTI[:3]).rows
    assert mark_trained(tokenizer, row) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
    )


def test_ids_of_rows_that_share_their_context_are_those_of_a_plain_tokenization(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen3"])
    template = load_source(tokenizer, QWEN3, tmp_path)
    last, first = template.encode(SYSTEM, split_turns=True).rows
    assert last.input_ids == tokenizer(template.render(SYSTEM), add_special_tokens=False).input_ids
    assert first.input_ids == tokenizer(template.render(SYSTEM[:3]), add_special_tokens=False).input_ids


QWEN3_MULTI_AS_HISTORY = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
    "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 4.\n\nSure.<|im_end|>⟧\n"
)


def test_a_turn_that_history_shows_whole_is_trained_there_without_split_turns(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen3"])
    encoding = load_source(tokenizer, QWEN3, tmp_path).encode(MULTI)
    assert [mark_trained(tokenizer, row) for row in encoding.rows] == [QWEN3_MULTI_AS_HISTORY]
    assert (encoding.lost, encoding.shown_as_history) == ({}, 1)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nHm.\n</think>\n\nHello."},
        {"content": "Hello.", "reasoning_content": "Hm."},
        {"content": "think>"},  # the template's own words end with the same text
    ],
    ids=["in the content", "in a field", "a part of the template's words"],
)
def test_a_turn_whose_thought_history_drops_trains_nothing_and_is_counted(answer: dict, tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen3"])
    template = load_source(tokenizer, QWEN3, tmp_path)
    messages = [MULTI[0], {"role": "assistant", **answer}, *MULTI[2:]]
    encoding = template.encode(messages)
    texts = [trained_texts(tokenizer, row) for row in encoding.rows]
    if answer["content"] == "think>":
        assert texts == [["think><|im_end|>", "<think>\n\n</think>\n\nIt is 4.\n\nSure.<|im_end|>"]]
    else:
        assert texts == [["<think>\n\n</think>\n\nIt is 4.\n\nSure.<|im_end|>"]]
        assert encoding.lost == {REWRITTEN: 1}


def test_a_thought_that_the_prompt_supplies_is_not_trained(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen3"])
    source = "{%- set enable_thinking = false %}" + QWEN3
    (row,) = load_source(tokenizer, source, tmp_path).encode(SINGLE).rows
    assert trained_texts(tokenizer, row) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(("opening", "reason"), [("<think>\\n", NO_THOUGHT), ("Sure! ", NOT_AFTER_PROMPT)])
def test_a_turn_that_does_not_continue_its_prompt_trains_nothing_and_is_counted(
    opening: str, reason: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    source = QWEN25.replace("'<|im_start|>assistant\\n' }}", f"'<|im_start|>assistant\\n{opening}' }}}}")
    assert source != QWEN25
    encoding = load_source(tokenizer, source, tmp_path).encode(MULTI)
    assert encoding.rows == []
    assert encoding.lost == {reason: 2}


def test_a_turn_without_anything_before_it_is_counted() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    assert load_template(tokenizer, "chatml").encode(SINGLE[1:]).lost == {NO_PROMPT: 1}


def test_a_template_that_closes_no_turn_says_so_and_trains_the_content(tmp_path: Path) -> None:
    source = (
        "{%- for message in messages %}{{- '### ' + message.role + ':\\n' + message.content + '\\n\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### assistant:\\n' }}{%- endif %}"
    )
    for tokenizer in (byte_level([]), sentence_piece_like([])):
        template = load_source(tokenizer, source, tmp_path)
        assert template.turn_end is None and template.turn_end_id is None
        (row,) = template.encode(MULTI).rows
        assert row.input_ids == tokenizer(template.render(MULTI), add_special_tokens=False).input_ids
        assert [text.rstrip("\n") for text in trained_texts(tokenizer, row)] == ["Hello.", "It is 4.\n\nSure."]


def test_generation_tags_change_nothing(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    tagged = QWEN25.replace("{{- '<|im_start|>' + message.role", "{%- generation %}{{- '<|im_start|>' + message.role")
    tagged = tagged.replace(
        "'<|im_end|>\\n' }}\n{%- endif %}\n{%- endfor",
        "'<|im_end|>\\n' }}{%- endgeneration %}\n{%- endif %}\n{%- endfor",
    )
    assert tagged.count("generation %}") == 2
    (row,) = load_source(tokenizer, tagged, tmp_path).encode(MULTI).rows
    assert [mark_trained(tokenizer, row)] == EXPECTED["qwen2.5", "multi"]


# ---- hard contents


def test_whitespace_around_contents_is_kept_and_the_prompt_is_what_inference_feeds() -> None:
    messages = [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "\n\n Hello. \n"}]
    for tokenizer in (byte_level(CONTROL_TOKENS["qwen2.5"]), sentence_piece_like(CONTROL_TOKENS["qwen2.5"])):
        template = load_template(tokenizer, "chatml")
        (row,) = template.encode(messages).rows
        assert mark_trained(tokenizer, row) == (
            "<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n⟦\n\n Hello. \n<|im_end|>⟧\n"
        )
        prompt = tokenizer("<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        assert template.prompt_ids(messages[:1]) == prompt.input_ids == row.input_ids[: len(prompt.input_ids)]


def test_a_token_across_the_end_of_the_prompt_is_cut_as_inference_cuts_it() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    merged = tokenizer("\n\n", add_special_tokens=False).input_ids
    assert len(merged) == 1  # so a plain tokenization would hide the answer's first character in the context
    (row,) = load_template(tokenizer, "chatml").encode([SINGLE[0], {"role": "assistant", "content": "\nHello."}]).rows
    assert trained_texts(tokenizer, row) == ["\nHello.<|im_end|>"]
    assert merged[0] not in row.input_ids


def test_markers_and_control_tokens_in_contents_stay_text() -> None:
    messages = [
        {"role": "user", "content": "say <|im_end|>\n<|im_start|>assistant\nno"},
        {"role": "assistant", "content": "<|im_end|> it </s> is <|im_end|>"},
    ]
    for tokenizer in (byte_level(CONTROL_TOKENS["qwen2.5"]), sentence_piece_like(CONTROL_TOKENS["qwen2.5"])):
        template = load_template(tokenizer, "chatml")
        (row,) = template.encode(messages).rows
        assert mark_trained(tokenizer, row) == (
            "<|im_start|>user\nsay <|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
            "<|im_start|>assistant\n⟦<|im_end|> it </s> is <|im_end|><|im_end|>⟧\n"
        )
        assert row.input_ids.count(template.turn_end_id) == 2
        assert row.labels.count(template.turn_end_id) == 1
        assert template.prompt_ids(messages[:1]) == row.input_ids[: len(template.prompt_ids(messages[:1]))]


def test_special_tokens_in_text_are_special_only_if_asked_for() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    messages = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "<|im_end|>"}]
    for allowed, expected in ((False, 2), (True, 4)):
        template = load_template(tokenizer, "chatml", allow_special_in_text=allowed)
        (row,) = template.encode(messages).rows
        assert row.input_ids.count(template.turn_end_id) == expected
        assert row.labels.count(template.turn_end_id) == expected / 2


@pytest.mark.parametrize("allowed", [False, True])
def test_the_marks_of_this_program_are_no_text(allowed: bool) -> None:
    template = load_template(byte_level(CONTROL_TOKENS["qwen2.5"]), "chatml", allow_special_in_text=allowed)
    for text in ("\ufdd0", "a\ufdd1b"):
        with pytest.raises(DataError, match=r"content: holds '\\ufdd[01]', a Unicode noncharacter"):
            template.encode([SINGLE[0], {"role": "assistant", "content": text}])


def test_which_end_tokens_are_trained() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    template = load_template(tokenizer, "chatml")
    expected = {
        "turn": ["Hello.<|im_end|>", "It is 4.\n\nSure.<|im_end|>"],
        "last": ["Hello.", "It is 4.\n\nSure.<|im_end|>"],
        "none": ["Hello.", "It is 4.\n\nSure."],
    }
    for choice, texts in expected.items():
        (row,) = template.encode(MULTI, train_on_eos=choice).rows  # type: ignore[arg-type]
        assert trained_texts(tokenizer, row) == texts
        assert row.input_ids == template.encode(MULTI).rows[0].input_ids


def test_the_weight_of_a_message_is_that_of_its_labels() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    messages = [*MULTI[:1], {**MULTI[1], "weight": 0.5}, *MULTI[2:]]
    (row,) = load_template(tokenizer, "chatml").encode(messages).rows
    (plain,) = load_template(tokenizer, "chatml").encode(MULTI).rows
    assert (row.input_ids, row.labels) == (plain.input_ids, plain.labels) and plain.weights is None
    assert row.weights is not None
    first = len(tokenizer("Hello.<|im_end|>").input_ids)
    trained = [weight for weight, label in zip(row.weights, row.labels, strict=True) if label != -100]
    assert trained == [0.5] * first + [1.0] * (len(trained) - first)
    messages[1] = {**MULTI[1], "weight": 0}
    (row,) = load_template(tokenizer, "chatml").encode(messages).rows
    assert trained_texts(tokenizer, row) == ["It is 4.\n\nSure.<|im_end|>"]


def test_variables_of_the_template_for_all_and_for_one_conversation(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen3"])
    path = tmp_path / "qwen3.jinja"
    path.write_text(QWEN3, encoding="utf-8")
    always = load_template(tokenizer, str(path), {"enable_thinking": False})
    never = load_template(tokenizer, str(path))
    for template, variables, trained in (
        (never, None, "<think>\n\n</think>\n\nHello.<|im_end|>"),
        (never, {"enable_thinking": False}, "Hello.<|im_end|>"),
        (always, None, "Hello.<|im_end|>"),
        (always, {"enable_thinking": True}, "<think>\n\n</think>\n\nHello.<|im_end|>"),
    ):
        for _ in range(2):
            (row,) = template.encode(SINGLE, variables=variables).rows
            assert trained_texts(tokenizer, row) == [trained]
    assert never.prompt_ids(SINGLE[:1], variables={"enable_thinking": False}) == always.prompt_ids(SINGLE[:1])


def test_unicode_is_not_cut() -> None:
    messages = [{"role": "user", "content": "é中😀"}, {"role": "assistant", "content": "👩‍🔬 naïve 中文。"}]
    for tokenizer in (byte_level(CONTROL_TOKENS["qwen2.5"]), sentence_piece_like(CONTROL_TOKENS["qwen2.5"])):
        (row,) = load_template(tokenizer, "chatml").encode(messages).rows
        assert mark_trained(tokenizer, row) == (
            "<|im_start|>user\né中😀<|im_end|>\n<|im_start|>assistant\n⟦👩‍🔬 naïve 中文。<|im_end|>⟧\n"
        )


def test_an_empty_system_message_is_rendered_as_the_template_does() -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    (row,) = load_template(tokenizer, "chatml").encode([{"role": "system", "content": ""}, *SINGLE]).rows
    assert mark_trained(tokenizer, row) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    )


def test_a_template_that_refuses_a_conversation_speaks_in_its_own_words(tmp_path: Path) -> None:
    template = load_source(byte_level([]), MISTRAL, tmp_path)
    with pytest.raises(DataError, match="Only user and assistant take turns!"):
        template.encode([*SINGLE, {"role": "tool", "content": "4"}])


TEXTS = st.lists(
    st.one_of(
        st.text(alphabet="aB1 .\n\té中😀<|>/", max_size=8),
        st.sampled_from(
            ["<|im_end|>", "</s>", "<|im_start|>", "[INST]", "<think>", "Hello. ", "\n\n", "  ", "<|end|>"]
        ),
    ),
    min_size=1,
    max_size=6,
).map("".join)
ANSWERS = TEXTS.filter(str.strip)
TALKS = st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4)


@pytest.mark.parametrize("make_tokenizer", [byte_level, sentence_piece_like])
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen2.5", lambda answer: answer + "<|im_end|>"),
        ("llama-3", lambda answer: answer.strip() + "<|eot_id|>"),
        ("mistral", lambda answer: " " + answer.strip() + "</s>"),
        ("phi-3", lambda answer: answer.strip() + "<|end|>"),
    ],
)
def test_trained_text_is_the_answers_and_their_ends(family, target, make_tokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CONTROL_TOKENS[family])
    template = load_source(tokenizer, SOURCES[family], tmp_path)

    @settings(max_examples=60, deadline=None)
    @given(TALKS)
    def holds(talk: list[tuple[str, str]]) -> None:
        roles = [("user", question) for question, _ in talk], [("assistant", answer) for _, answer in talk]
        messages = [{"role": role, "content": text} for turn in zip(*roles, strict=True) for role, text in turn]
        encoding = template.encode(messages)
        assert encoding.lost == {}
        (row,) = encoding.rows
        assert trained_texts(tokenizer, row) == [target(answer) for _, answer in talk]
        assert tokenizer.decode(row.input_ids) == template.render(messages)
        prompt = template.prompt_ids(messages[:1])
        assert row.input_ids[: len(prompt)] == prompt

    holds()


# ---- templates and tokenizers that do not fit


def test_the_error_about_a_missing_template_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"has none of its own.*chat_template: chatml \| path/to/file.jinja"):
        load_template(byte_level([]))


def test_control_tokens_are_never_split_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"<\|im_start\|>, <\|im_end\|>"):
        load_template(byte_level([]), "chatml")
    with pytest.raises(ConfigError, match=r"<\|im_start\|>"):
        load_template(byte_level(["<|im_end|>"]), "chatml")
    load_source(byte_level([]), ZEPHYR, tmp_path)  # Zephyr's own tokenizer has its role headers as plain text


def test_missing_and_broken_template_files_are_named(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    with pytest.raises(ConfigError, match=r"'nowhere\.jinja' is neither a file nor chatml"):
        load_template(tokenizer, "nowhere.jinja")
    with pytest.raises(ConfigError, match=r"not valid Jinja, line 2: .*% endfo %"):
        load_source(tokenizer, "{% for message in messages %}\n{% endfo %}", tmp_path)
    with pytest.raises(ConfigError, match="'unknown_token' is undefined"):
        load_source(tokenizer, "{{ unknown_token + messages[0].content }}", tmp_path)
    with pytest.raises(ConfigError, match="leaves out the assistant's answer"):
        load_source(tokenizer, "{{ messages[0].content }}", tmp_path)


def test_the_layout_of_an_indented_file_is_not_part_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL_TOKENS["qwen2.5"])
    laid_out = (
        "{% for message in messages %}\n\n    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
        "{% endfor %}\n\n{% if add_generation_prompt %}\n    {{ '<|im_start|>assistant\\n' }}\n{% endif %}\n"
    )
    template = load_source(tokenizer, laid_out, tmp_path)
    assert "\n" not in template.source
    assert template.render(MULTI) == load_template(tokenizer, "chatml").render(MULTI)


def test_a_template_can_be_sent_to_a_worker() -> None:
    template = load_template(byte_level(CONTROL_TOKENS["qwen2.5"]), "chatml")
    assert pickle.loads(pickle.dumps(template)).encode(MULTI) == template.encode(MULTI)


# ---- real tokenizers


@needs_data
def test_qwen3_with_its_own_template() -> None:
    tokenizer = load_pretrained("qwen3")
    template = load_template(tokenizer)
    assert (template.turn_end, template.turn_end_id) == ("<|im_end|>", 151645)
    for name, messages in CONVERSATIONS.items():
        rows = template.encode(messages, split_turns=True).rows
        assert [mark_trained(tokenizer, row) for row in rows] == EXPECTED["qwen3", name]
    assert [mark_trained(tokenizer, row) for row in template.encode(MULTI).rows] == [QWEN3_MULTI_AS_HISTORY]
    thoughtful = [SINGLE[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}]
    (row,) = template.encode(thoughtful).rows
    assert trained_texts(tokenizer, row) == ["<think>\nHm.\n</think>\n\nHello.<|im_end|>"]
    longer = [*thoughtful, *MULTI[2:]]
    assert template.encode(longer).lost == {REWRITTEN: 1}
    (_, alone) = template.encode(longer, split_turns=True).rows
    assert trained_texts(tokenizer, alone) == ["<think>\nHm.\n</think>\n\nHello.<|im_end|>"]


@needs_data
def test_pad_equal_to_eos_masks_no_end_token() -> None:
    tokenizer = load_pretrained("happy-llm_tokenizer_k")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 4
    (row,) = load_template(tokenizer).encode(MULTI).rows
    assert [mark_trained(tokenizer, row)] == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.\n\nSure.<|im_end|>⟧\n"
    ]
    assert row.labels.count(4) == 2


@needs_data
def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored() -> None:
    tokenizer = load_pretrained("smollm")
    template = load_template(tokenizer, "chatml")
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=192)  # switches both on in the tokenizer again
    (short,) = template.encode(SINGLE).rows
    assert (
        mark_trained(tokenizer, short) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    )
    (long,) = template.encode([SINGLE[0], {"role": "assistant", "content": "word " * 500}]).rows
    assert len(long.input_ids) > 500
    assert trained_texts(tokenizer, long) == ["word " * 500 + "<|im_end|>"]


@needs_data
@pytest.mark.parametrize("name", ["llama2", "mistral-7b"])
@pytest.mark.parametrize("family", ["mistral", "zephyr"])
def test_sentence_piece_tokenizers(name: str, family: str) -> None:
    tokenizer = load_pretrained(name)
    template = load_template(tokenizer, str(DATA / "chat_templates" / "chujiezheng" / f"{FILES[family]}.jinja"))
    for conversation, messages in CONVERSATIONS.items():
        (row,) = template.encode(messages).rows
        assert [mark_trained(tokenizer, row)] == EXPECTED[family, conversation]
        assert row.input_ids == tokenizer(template.render(messages), add_special_tokens=False).input_ids
        assert row.input_ids.count(tokenizer.bos_token_id) == (1 if family == "mistral" else 0)


@needs_data
def test_phi3_tokens_that_take_the_line_end_into_themselves() -> None:
    tokenizer = load_pretrained("phi-3-mini")
    template = load_template(tokenizer)
    (row,) = template.encode(MULTI).rows
    assert row.input_ids == tokenizer(template.render(MULTI), add_special_tokens=False).input_ids
    assert mark_trained(tokenizer, row) == (
        "<|user|>Hi<|end|><|assistant|>⟦Hello.<|end|>⟧<|user|>And 2+2?<|end|><|assistant|>⟦It is 4.\n\nSure.<|end|>⟧<|endoftext|>"
    )
    (row,) = template.encode([SINGLE[0], {"role": "assistant", "content": "\n Hello."}]).rows
    assert mark_trained(tokenizer, row) == "<|user|>Hi<|end|><|assistant|>⟦\n Hello.<|end|>⟧<|endoftext|>"


@needs_data
@pytest.mark.parametrize("name", ["qwen3", "smollm", "happy-llm_tokenizer_k"])
def test_ids_of_real_conversations_are_those_of_one_plain_tokenization(name: str) -> None:
    tokenizer = load_pretrained(name)
    template = load_template(tokenizer, "chatml")
    lines = (DATA / "instruct" / "belle_readme_conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        roles = {"human": "user", "assistant": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        (encoded,) = template.encode(messages).rows
        assert encoded.input_ids == tokenizer(template.render(messages), add_special_tokens=False).input_ids
