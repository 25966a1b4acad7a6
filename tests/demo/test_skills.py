"""The demo: determinism, disjoint splits, the tokenizer, and the size of the shipped base."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from accel_llm.config.options import SftOptions
from accel_llm.demo.files import DEMO_BASE, resolve_demo
from accel_llm.demo.skills import (
    CONVERSATIONS,
    FAMILIES,
    HELD_OUT_PERCENT,
    demo_conversations,
    demo_documents,
    is_held_out,
)
from accel_llm.demo.tokenizer import CAPITALS, THINGS, WORDS, build_demo_tokenizer, demo_base_config

TOKENIZER = build_demo_tokenizer()


def user_questions(rows: list[dict]) -> set[str]:
    return {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}


def test_conversations_depend_on_the_seed_alone():
    assert demo_conversations("train", 3) == demo_conversations("train", 3)
    assert demo_conversations("eval", 3) != demo_conversations("eval", 4)
    assert list(demo_documents(3, 20)) == list(demo_documents(3, 20))
    assert list(demo_documents(3, 20)) != list(demo_documents(4, 20))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_family_appears_equally_often_and_no_row_twice(split):
    rows = demo_conversations(split)
    families = Counter(row["family"] for row in rows)

    assert len(rows) == CONVERSATIONS[split]
    assert families == {family.__name__: len(rows) // len(FAMILIES) for family in FAMILIES}
    assert len({str(row["messages"]) for row in rows}) == len(rows)


def test_the_files_of_the_demo_have_no_column_that_nothing_reads(tmp_path):
    options = resolve_demo(SftOptions(train_files=["demo"], eval_files=["demo"], cache_dir=str(tmp_path)))
    for split, (file,) in (("train", options.train_files), ("eval", options.eval_files)):
        rows = [json.loads(line) for line in Path(str(file)).read_text(encoding="utf-8").splitlines()]
        assert rows == [{"messages": row["messages"]} for row in demo_conversations(split)]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_are_chats_that_end_with_a_short_answer(split):
    rows = demo_conversations(split)
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(TOKENIZER(row["messages"][-1]["content"])["input_ids"]) <= 12
    assert any(len(row["messages"]) > 3 for row in rows)
    assert any(row["messages"][0]["role"] == "system" for row in rows)


def worked_out(family: str, question: str, earlier: list[str]) -> str:
    """The right answer to the last question, from the messages alone."""
    words = re.findall(r"\w+", question)
    numbers = [int(word) for word in words if word.isdigit()]
    made_up = [word for word in words if word not in WORDS and not word.isdigit()]
    listed = [word for word in words if word in THINGS]
    match family:
        case "add":
            return str(sum(numbers))
        case "chain":
            return str(int(earlier[-1]) + numbers[0])
        case "step":
            return str(numbers[0] + (1 if "after" in words else -1))
        case "sort":
            return " ".join(map(str, sorted(numbers)))
        case "repeat":
            return made_up[0]
        case "reverse":
            return made_up[0][::-1]
        case "letter":
            return made_up[0][0 if "first" in words else -1]
        case "pick":
            return listed[0 if "first" in words else -1]
        case "capital":
            return next(CAPITALS[word] for word in words if word in CAPITALS)
        case "recall":
            return re.findall(rf"{made_up[0]} likes (\w+)", earlier[-2])[0]
    raise AssertionError(f"no rule for {family}")


def test_answers_are_right():
    for row in demo_conversations("train"):
        *earlier, question, answer = (message["content"] for message in row["messages"])
        assert answer == worked_out(row["family"], question, earlier), question


def test_no_user_question_is_in_both_splits_whatever_the_seeds():
    for seed in range(2):
        train, held_out = demo_conversations("train", seed), demo_conversations("eval", seed + 1)
        assert not user_questions(train) & user_questions(held_out)
    assert user_questions(demo_conversations("train", 0)) & user_questions(demo_conversations("train", 1))


def test_pretraining_documents_contain_nothing_held_out():
    words, additions, steps, lists = set(), set(), set(), set()
    for page in demo_documents(0, 600):
        words |= set(re.findall(r"[a-z]+", page.lower()))
        additions |= set(re.findall(r"(\d+) (?:\+|plus) (\d+)", page))
        steps |= set(re.findall(r"(?:after|before) (\d+)", page))
        lists |= set(re.findall(r"(?:first|last) of (\w+, \w+, \w+)", page))
    made_up = {word for q in user_questions(demo_conversations("eval")) for word in re.findall(r"[a-z]+", q.lower())}
    made_up = {word for word in made_up if is_held_out(word)} - {word.lower() for word in WORDS}

    assert len(made_up) > 50 and not made_up & words
    assert len(additions) > 500 and not any(is_held_out(f"add {a} {b}") for a, b in additions)
    assert len(steps) > 200 and not any(is_held_out(f"step {number}") for number in steps)
    assert len(lists) > 200 and not any(is_held_out(f"pick {things}") for things in lists)


def test_pretraining_documents_never_show_the_chat_form():
    pages = "\n".join(demo_documents(0, 600))
    assert "<|im_end|>" in pages  # as something to copy
    assert not re.search(r"<\|im_start\|>(system|user|assistant)", pages)


def test_the_share_of_held_out_items_is_as_stated():
    share = 100 * sum(is_held_out(f"step {number}") for number in range(10_000)) / 10_000
    assert share == pytest.approx(HELD_OUT_PERCENT, abs=1.5)


@given(st.text())
@settings(deadline=None)
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_special_tokens_are_single_ids_and_padding_is_not_the_end_of_turn():
    assert TOKENIZER("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == [0, 1, 2]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 0, 2)


def test_words_are_one_token_and_operands_are_spelled():
    pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER("What is 37 + 5 backwards, bako?")["input_ids"])
    assert pieces == ["What", "Ġis", "Ġ", *"37", "Ġ", "+", "Ġ", "5", "Ġbackwards", ",", "Ġ", *"bako", "?"]


def test_chat_template_is_chatml():
    chat = [{"role": "user", "content": "Say bako."}, {"role": "assistant", "content": "bako"}]
    text = "<|im_start|>user\nSay bako.<|im_end|>\n<|im_start|>assistant\nbako<|im_end|>\n"
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == text
    prompt = TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nSay bako.<|im_end|>\n<|im_start|>assistant\n"


def test_the_shipped_base_is_small_and_is_the_one_this_module_describes():
    shipped = AutoTokenizer.from_pretrained(DEMO_BASE)
    config = AutoConfig.from_pretrained(DEMO_BASE)

    assert (DEMO_BASE / "model.safetensors").stat().st_size <= 2_000_000
    assert shipped.get_vocab() == TOKENIZER.get_vocab()
    assert shipped.chat_template == TOKENIZER.chat_template
    assert shipped("Say bako 37.<|im_end|>")["input_ids"] == TOKENIZER("Say bako 37.<|im_end|>")["input_ids"]
    ignored = ("architectures", "transformers_version", "dtype", "_name_or_path")
    described = {k: v for k, v in demo_base_config().to_dict().items() if k not in ignored}
    assert {k: v for k, v in config.to_dict().items() if k not in ignored} == described
