"""The questions that the demo's classifier learns: a question tells its skill, and no question is in both splits."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.demo.files import parse_options_or_demo
from accel_llm.demo.questions import LABELLED_TEXTS, demo_questions
from accel_llm.demo.skills import FAMILIES, demo_conversations

# What a person would look at; each question has exactly one of these.
SIGNS = {
    "chain": r"What is \d+ \+ \d\? (Now add|And plus)",
    "add": r"(What is \d+ \+ \d\?|Add \d to \d+\.|How much is .*)$",
    "step": r".* number (comes )?(after|before) \d+",
    "sort": r"(Sort|Write) \d",
    "repeat": r"(Repeat the word|Say) \w+\.$",
    "reverse": r"(Spell|Reverse the word|What is \w+ spelled)",
    "letter": r".* (first|last) letter of",
    "pick": r"(Which comes|Name the) (first|last)",
    "capital": r".* capital of",
    "recall": r"My friend",
}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_question_tells_its_skill(split):
    rows = demo_questions(split)
    assert rows == demo_questions(split) != demo_questions(split, seed=1)
    assert len({row["text"] for row in rows}) == len(rows) == LABELLED_TEXTS[split]
    for row in rows:
        assert [name for name, sign in SIGNS.items() if re.match(sign, row["text"])] == [row["label"]]
    counts = Counter(row["label"] for row in rows)
    assert counts.keys() == {family.__name__ for family in FAMILIES} and min(counts.values()) > 0.04 * len(rows)


def test_no_question_is_in_both_splits_nor_held_out_of_fine_tuning():
    train = {row["text"] for seed in range(3) for row in demo_questions("train", seed)}
    assert not train & {row["text"] for seed in range(3) for row in demo_questions("eval", seed)}
    assert not train & {row["messages"][-2]["content"] for row in demo_conversations("eval")}


def test_without_options_the_recipe_and_its_files_are_used(tmp_path):
    options = parse_options_or_demo(ClassifyOptions, "demo_classify", ["--cache_dir", str(tmp_path)])
    for files, split in ((options.train_files, "train"), (options.eval_files, "eval")):
        lines = Path(files[0]).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == demo_questions(split)
    assert options.method == "lora" and Path(str(options.model_name_or_path)).name == "demo_base"
