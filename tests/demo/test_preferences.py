"""The demo's preferences: its pairs, what is preferred, and where the scripts that train on them begin."""

import json
import re
from pathlib import Path

import pytest

from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.demo.files import parse_options_or_demo, resolve_demo
from accel_llm.demo.preferences import CHOICE_ROWS, FOOD, OTHER_THINGS, REMINDER_ROWS, demo_pairs, is_preferred
from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import THINGS
from accel_llm.errors import ConfigError


def things_asked_about(row: dict) -> list[str]:
    """The things of a question of choice in their order; none if it is another question."""
    question = row["prompt"][-1]["content"]
    words = question.replace(",", " ").rstrip(".?").split()
    return [word for word in words if word in THINGS] if question.startswith(("Say one:", "Which one is it:")) else []


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_choice_has_two_right_answers_and_one_of_them_is_food(split):
    rows = demo_pairs(split)
    choices = [row for row in rows if things_asked_about(row)]
    assert rows == demo_pairs(split) and len(choices) == CHOICE_ROWS[split] == len(
        {str(row["prompt"]) for row in choices}
    )
    for row in choices:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert is_preferred(chosen["content"]) and not is_preferred(rejected["content"])
        assert sorted(things_asked_about(row)) == sorted([chosen["content"], rejected["content"]])
    # Whoever always takes the first of the two is right half of the time.
    first = sum(is_preferred(things_asked_about(row)[0]) for row in choices)
    assert first / len(choices) == pytest.approx(0.5, abs=0.04)


def test_the_other_rows_prefer_the_right_answer_to_a_question_of_fine_tuning():
    assert len(demo_pairs("eval")) == CHOICE_ROWS["eval"]
    others = [row for row in demo_pairs("train") if not things_asked_about(row)]
    assert len(others) == REMINDER_ROWS
    for row in others:
        assert row["chosen"] != row["rejected"] and [turn["role"] for turn in row["prompt"]][-1] == "user"
    additions = [re.fullmatch(r"What is (\d+) \+ (\d+)\?", row["prompt"][-1]["content"]) for row in others]
    sums = [
        (row["chosen"][0]["content"], sum(map(int, found.groups())))
        for row, found in zip(others, additions, strict=True)
        if found
    ]
    assert len(sums) > 5 and all(answer == str(total) for answer, total in sums)
    held_out = {turn["content"] for row in demo_conversations("eval") for turn in row["messages"][-2:]}
    assert not held_out & {row["prompt"][-1]["content"] for row in others}


def test_no_two_things_are_in_both_splits_and_no_choice_is_in_fine_tuning():
    train, held_out = (
        {frozenset(things_asked_about(row)) for row in demo_pairs(split)} - {frozenset()} for split in ("train", "eval")
    )
    assert len(train) > 70 and len(held_out) > 20 and not train & held_out
    taught = {message["content"] for row in demo_conversations("train") for message in row["messages"]}
    assert not taught & {row["prompt"][-1]["content"] for row in demo_pairs("eval")}


def test_what_is_preferred():
    assert set(FOOD) < set(THINGS) and not set(FOOD) & set(OTHER_THINGS)
    assert [answer for answer in ("tea", " rice", "trains", "", "tea or rice") if is_preferred(answer)] == [
        "tea",
        " rice",
    ]


@pytest.mark.parametrize("options_class", [DpoOptions, KtoOptions, RewardOptions])
def test_scripts_for_preferences_get_pairs(options_class, tmp_path):
    options = resolve_demo(options_class(train_files=["demo"], eval_files=["demo"], cache_dir=str(tmp_path)))
    for split, (file,) in (("train", options.train_files), ("eval", options.eval_files)):
        rows = [json.loads(line) for line in Path(str(file)).read_text(encoding="utf-8").splitlines()]
        assert rows == demo_pairs(split)


def test_without_the_adapter_of_fine_tuning_the_demo_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        parse_options_or_demo(DpoOptions, "demo_dpo", [])
    assert str(refused.value) == (
        "adapter_name_or_path: the demo goes on with output/demo, which is not there; run launch/sft.py first, without "
        "options, or name a model and data of your own."
    )
    Path("output/demo").mkdir(parents=True)
    options = parse_options_or_demo(DpoOptions, "demo_dpo", ["--cache_dir", str(tmp_path)])
    assert (options.adapter_name_or_path, options.output_dir) == ("output/demo", "output/demo_dpo")
