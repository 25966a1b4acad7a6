"""What run.json tells of the rows: lengths against numpy's own counts, and the text of a row by trained and context."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import character_tokenizer, make_rows

from accel_llm.data.labels import SINGLE_LABEL, Labels
from accel_llm.report.row_facts import HISTOGRAM_BINS, MAX_RUN_LETTERS, MAX_RUNS, mark_text, row_facts

TOKENIZER = character_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_every_row_is_in_one_bin_of_equal_width(lengths):
    rows = make_rows((k, [9] * n, [-100] * n) for k, n in enumerate(lengths))
    facts = row_facts(TOKENIZER, rows)
    told = facts["lengths"]
    edges = told["edges"]
    assert sum(told["counts"]) == len(lengths) == facts["count"] and len(told["counts"]) <= HISTOGRAM_BINS + 1
    assert len(set(np.diff(edges))) == 1 and edges[0] == min(lengths) and edges[-1] > max(lengths)
    expected = [sum(a <= n < b for n in lengths) for a, b in pairwise(edges)]
    assert told["counts"] == expected
    assert (told["shortest"], told["longest"]) == (min(lengths), max(lengths)) and facts["unit"] == "row"
    assert json.dumps(facts)


def test_a_row_is_its_text_in_trained_and_context_parts():
    ids = encode("Say hi!Hello.Bye")
    labels = [-100] * 7 + ids[7:13] + [-100] * 3
    rows = make_rows([(4, ids, labels)])
    (shown,) = row_facts(TOKENIZER, rows)["shown"]
    assert shown == {
        "name": "rows, row 4: 16 tokens",
        "texts": {"": [(False, "Say hi!"), (True, "Hello."), (False, "Bye")]},
    }


def test_long_texts_are_cut_in_their_middle_and_say_so():
    ids = np.array(encode("a" * 5000 + "b" * 5000))
    ((trained, text),) = mark_text(TOKENIZER, ids, ids)
    assert trained and text.startswith("aaa") and text.endswith("bbb") and len(text) < MAX_RUN_LETTERS + 40
    assert f"[… {10_000 - MAX_RUN_LETTERS:,} letters …]" in text
    ids = np.array(encode("xy" * 200))
    parts = mark_text(TOKENIZER, ids, np.where(np.arange(400) % 2, ids, -100))
    assert len(parts) == MAX_RUNS + 1 and parts[-1] == (False, f" [… {400 - MAX_RUNS} more parts …]")


@pytest.mark.parametrize("kind", ["pairs", "verdicts", "classes"])
def test_pairs_verdicts_and_classes_have_their_titles(kind):
    prompt, good, bad = encode("Q?"), encode("yes"), encode("nope")
    rows = make_rows([(1, prompt + good, [-100] * 2 + good), (1, prompt + bad, [-100] * 2 + bad)])
    if kind == "pairs":
        pairs = replace(rows, shared=np.array([2, 2], np.int32), margin=np.zeros(2, np.float32))
        facts = row_facts(TOKENIZER, pairs)
        assert (facts["unit"], facts["count"], facts["lengths"]["longest"]) == ("pair", 1, 9)
        (shown,) = facts["shown"]
        assert shown["texts"] == {"prompt": [(False, "Q?")], "chosen": [(True, "yes")], "rejected": [(True, "nope")]}
    elif kind == "classes":
        labels = Labels(SINGLE_LABEL, ("bad", "good"))
        facts = row_facts(TOKENIZER, replace(rows, targets=np.array([[1], [0]], np.float32)), labels)
        assert [list(shown["texts"]) for shown in facts["shown"]] == [["label good"], ["label bad"]]
        assert facts["unit"] == "text"
    else:
        facts = row_facts(TOKENIZER, replace(rows, label=np.array([1, 0], np.int8)))
        assert [list(shown["texts"]) for shown in facts["shown"]] == [["desirable"], ["undesirable"]]
        assert facts["unit"] == "row"
