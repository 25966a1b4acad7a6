"""Labels: the forms in which a column holds them, the problem type that they are, and the targets of each text."""

import csv
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_llm.chat.values import BAD_TARGET, NO_LABEL, UNKNOWN_LABEL
from accel_llm.data.labels import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    LabelCounts,
    LabelKind,
    Labels,
    Vocabulary,
    describe_targets,
    find_targets,
    find_vocabulary,
    name_targets,
    parse_label,
)
from accel_llm.errors import DataError

REAL = Path(__file__).parents[3] / "shared" / "data" / "seqcls"


def find(values: list[Any], problem_type: str | None = None, names: Any = None, named: Any = None) -> Vocabulary:
    counts = LabelCounts()
    for value in values:
        counts.add(parse_label(value, "label", problem_type == MULTI_LABEL))
    return find_vocabulary(counts, LabelKind(problem_type, names), named)


def targets_of(values: list[Any], problem_type: str | None = None, names: Any = None) -> list[list[float]]:
    vocabulary = find(values, problem_type, names)
    several = problem_type == MULTI_LABEL
    return [find_targets(parse_label(value, "label", several), vocabulary, "label") for value in values]


def refusal(call: Any) -> DataError:
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return error.value


@pytest.mark.parametrize(
    "forms, label",
    [
        (["0", 0, 0.0, "0.0", " 0 ", "-0", "0e0"], "0"),
        ([3, "3", 3.0, "+3", "3."], "3"),
        ([True], "true"),
        ([False], "false"),
        ([-1, "-1", -1.0], "-1"),
        ([0.5, "0.5", ".5", "5e-1"], "0.5"),
        (["007"], "007"),
        (["1_000"], "1_000"),  # a number to Python's float
        (["True", "true", True], "true"),
        (["positive", " positive\n"], "positive"),
        ([2**70, str(2**70)], str(2**70)),
        (["9" * 400], "9" * 400),
        (["[INST]"], "[INST]"),
        ([["a", 1], '["a", 1]', "['a', 1.0]"], ("a", "1")),
        ([[]], ()),
    ],
)
def test_a_label_has_one_form(forms: list[Any], label: Any) -> None:
    assert {parse_label(form, "label") for form in forms} == {label}


def test_a_text_with_commas_is_several_labels_where_they_are_asked_for() -> None:
    assert parse_label("a, b|c", "label", several=True) == ("a", "b", "c")
    assert parse_label("2,5", "label", several=True) == ("2", "5")
    assert parse_label(3, "label", several=True) == ("3",)
    assert parse_label("a, b", "label") == "a, b"


@pytest.mark.parametrize(
    "value, reason, found",
    [
        (math.nan, BAD_TARGET, "found nan; needs a finite number"),
        ("NaN", BAD_TARGET, "found NaN; needs a finite number"),
        (math.inf, BAD_TARGET, "found inf"),
        ("1e999", BAD_TARGET, "found inf"),
        (None, NO_LABEL, "found no label"),
        ("", NO_LABEL, "found no label"),
        (" ", NO_LABEL, "found no label"),
        ({}, NO_LABEL, "found no label"),
        ({"a": 1}, BAD_TARGET, 'found {"a": 1}; needs a name, a number or a list of them'),
        ([1, None], NO_LABEL, "found no label"),
        ([[1]], BAD_TARGET, "found [1]"),
    ],
)
def test_what_is_no_label_is_refused(value: Any, reason: str, found: str) -> None:
    error = refusal(lambda: parse_label(value, "stars"))
    assert str(error).startswith(f"stars: {found}") and error.reason == reason


@given(st.lists(st.sampled_from(["b", "a", "B", "10", "9", "-1", "é"]), min_size=2), st.randoms())
def test_classes_do_not_depend_on_the_order_of_rows(values: list[str], rng: random.Random) -> None:
    vocabulary = find(values)
    rng.shuffle(values)
    assert find(values) == vocabulary
    names = vocabulary.labels.names
    numbers = [int(name) for name in names if name.lstrip("-").isdecimal()]
    assert numbers == sorted(numbers)
    words = [name for name in names if not name.lstrip("-").isdecimal()]
    assert words == sorted(words) and set(names) == set(values)


@pytest.mark.parametrize("values", [["pos", "neg", "neutral", "neg"], [3, 1, 10, 2, 1], [-1.0, 1.0, 0.0]])
def test_classes_are_numbered_as_numpy_sorts_them(values: list[Any]) -> None:
    names, numbers = np.unique(np.array(values), return_inverse=True)
    assert find(values).labels == Labels(SINGLE_LABEL, tuple(parse_label(name.item(), "label") for name in names))
    assert np.array(targets_of(values))[:, 0].tolist() == numbers.tolist()


@pytest.mark.parametrize("values", [[["b", "a"], [], ["c"], ["a", "a"]], [[10, 2], [9], [2]], [[0, 1], [2]]])
def test_lists_are_several_labels(values: list[list[Any]]) -> None:
    names = np.unique(np.concatenate([row for row in values if row])).tolist()
    vocabulary = find(values)
    assert vocabulary.labels == Labels(MULTI_LABEL, tuple(map(str, names))) and not vocabulary.one_hot
    assert targets_of(values) == [[float(name in row) for name in names] for row in values]


@pytest.mark.parametrize("values", [[[0, 1, 1], [0, 0, 0]], [[0.0, 1.0, 1.0], [0, 0, 0]], [[False, True, True]] * 2])
def test_lists_of_0_and_1_of_one_length_hold_a_place_for_each_class(values: list[list[Any]]) -> None:
    assert find(values).labels == Labels(MULTI_LABEL, ("0", "1", "2"))
    assert targets_of(values) == [[float(item) for item in row] for row in values]
    # With a list of another length the lists hold the names of classes.
    assert not find([*values, values[0][:1]]).one_hot


def test_lists_with_another_number_hold_the_numbers_of_classes() -> None:
    assert targets_of([[0, 1, 1], [0, 2, 1]]) == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    "values, problem_type",
    [
        ([1.5, 2, 3], REGRESSION),
        (["1.5", "2", "x"], REGRESSION),  # a bad row
        ([1.0, 2.0, 5.0], SINGLE_LABEL),
        (["v1.5", "2.5", "x"], SINGLE_LABEL),  # more names than numbers
        ([[1.0], [2.0]], MULTI_LABEL),
        (list(range(150)), SINGLE_LABEL),  # without gaps, but see below
    ],
)
def test_the_problem_type_is_found(values: list[Any], problem_type: str) -> None:
    assert find(values * 2).labels.problem_type == problem_type


def test_the_problem_type_may_be_given() -> None:
    stars = [1, 5, 3, 5]
    assert targets_of(stars) == [[0], [2], [1], [2]]
    assert targets_of(stars, REGRESSION) == [[1], [5], [3], [5]]
    assert targets_of(stars, MULTI_LABEL) == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert find([0.5, 1.5], SINGLE_LABEL).labels == Labels(SINGLE_LABEL, ("0.5", "1.5"))
    assert targets_of([[2.5], 3], REGRESSION) == [[2.5], [3]]


def test_a_score_is_not_taken_for_classes() -> None:
    rng = random.Random(0)
    scores = [rng.randrange(1000) for _ in range(200)]
    sentence = str(refusal(lambda: find(scores)))
    assert "different numbers from" in sentence and "set problem_type: regression" in sentence
    assert find(scores, REGRESSION).labels.names == ("score",)
    assert len(find(scores, SINGLE_LABEL).labels.names) == len(set(scores))
    # Fractions are no classes, even where classes are asked for.
    fractions = [score / 7 for score in scores]
    assert find(fractions).labels.problem_type == REGRESSION
    assert str(refusal(lambda: find(fractions, SINGLE_LABEL))).endswith(
        "look like a score; set problem_type: regression."
    )
    # Many classes are no score, whatever their number, if they have no gaps and rows enough.
    assert len(find([*range(151)] * 3).labels.names) == 151
    assert refusal(lambda: find([*range(25)])) is not None


def test_what_differs_from_row_to_row_is_no_label() -> None:
    texts = [f"a text of its own {k}" for k in range(30)]
    sentence = str(refusal(lambda: find(texts)))
    assert "30 of 30 labels are those of a single row" in sentence and "problem_type" in sentence
    assert len(find(texts, SINGLE_LABEL).labels.names) == 30
    assert len(find(texts[:19]).labels.names) == 19
    assert len(find([*texts, *(["a", "b"] * 9), *[f"class {k}" for k in range(40)] * 2]).labels.names) == 72


def test_truth_values_beside_numbers_are_refused() -> None:
    assert "truth values beside numbers (0, 1, false, true)" in str(refusal(lambda: find([True, False, 1, 0])))
    assert find([True, False, "unknown"]).labels.names == ("false", "true", "unknown")


def test_lists_of_fractions_are_refused() -> None:
    sentence = str(refusal(lambda: find([[0.5, 1], [0.25, 0]])))
    assert sentence.startswith("label: found lists with 0.25, 0.5; needs the names or numbers of classes")


def test_the_names_of_a_trained_model_stand() -> None:
    names = ("neutral", "negative", "positive")
    assert targets_of(["positive", "negative"], names=names) == [[2], [1]]
    # The class numbers, too, unless the names are numbers themselves.
    assert targets_of([2, "1", 0.0], names=names) == [[2], [1], [0]]
    assert targets_of(["1", "5"], names=("5", "1")) == [[1], [0]]
    error = refusal(lambda: targets_of(["good"], names=names))
    assert error.reason == UNKNOWN_LABEL
    found = 'label: found "good", which is unknown; known are neutral, negative, positive'
    assert str(error) == f"{found}, for which the model's head was trained"
    assert refusal(lambda: targets_of([3], names=names)).reason == UNKNOWN_LABEL
    # Names that the data was found to have are no numbers.
    vocabulary = find(["b", "a"])
    assert refusal(lambda: find_targets("0", vocabulary, "label")).reason == UNKNOWN_LABEL


def test_names_of_the_data_keep_their_order() -> None:
    vocabulary = find(["world", "sports"], named=("world", "sports", "business"))
    assert vocabulary.labels == Labels(SINGLE_LABEL, ("world", "sports", "business"))


@pytest.mark.parametrize(
    "values, odd, sentence",
    [
        ([["a"], ["b"]], "a", 'label: found "a"; needs a list, as in other rows'),
        ([[0, 1, 1], [0, 0, 0]], [0, 1], 'label: found ["0", "1"]; needs 0 or 1 for each of 3 classes'),
        ([0.5, 1], "x", 'label: found "x"; regression needs a number'),
        ([0.5, 1], 1e39, 'label: found "1e+39"; regression needs a number'),
        (["a", "b"], ["a", "b"], 'label: found the list ["a", "b"]; single_label_classification has one label'),
        (["a", "b"], "c", 'label: found "c", which is unknown; known are a, b'),
    ],
)
def test_a_label_of_another_kind_is_refused(values: list[Any], odd: Any, sentence: str) -> None:
    vocabulary = find(values)
    assert str(refusal(lambda: find_targets(parse_label(odd, "label"), vocabulary, "label"))) == sentence


def describe(values: list[Any], problem_type: str | None = None, names: Any = None) -> str:
    vocabulary = find(values, problem_type, names)
    targets = [find_targets(parse_label(value, "label"), vocabulary, "label") for value in values]
    return describe_targets(np.array(targets, np.float32), vocabulary.labels)


def test_the_ledger_says_what_was_found() -> None:
    begin = "Labels to train on (single_label_classification), by rows: "
    assert describe(["b", "a", "b"]) == f"{begin}a (1), b (2)."
    assert describe(["b", "a"], names=("a", "b", "c")) == f"{begin}a (1), b (1), c (0); no row teaches c."
    assert describe([["b"], [], ["a", "b"]]) == (
        "Labels to train on (multi_label_classification), by rows: a (1), b (2); 1 rows without a label."
    )
    assert describe([0.5, 1.5, 4]) == (
        "Labels to train on (regression): numbers from 0.5 to 4, mean 2, standard deviation 1.47196."
    )
    many = describe([k for k in range(25) for _ in range(k + 2)])
    assert many.startswith(f"{begin}24 (26), 23 (25), ") and many.endswith("5 (7), 5 more, each with at most 7.")


@pytest.mark.parametrize(
    "values, sentence",
    [
        (["a", "a"], "train_files: the label of all 2 rows is a; a classifier needs rows of two labels or more."),
        ([[], []], "train_files: none of the 2 rows has a label."),
        ([0.5, 0.5], "train_files: the label of all 2 rows is 0.5; needs different ones."),
    ],
)
def test_labels_that_are_all_the_same_are_refused(values: list[Any], sentence: str) -> None:
    assert str(refusal(lambda: describe(values))) == sentence


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the shared data")
def test_published_labels_are_counted_as_the_csv_module_counts_them() -> None:
    with (REAL / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig", newline="") as file:
        values = [row["label"] for row in csv.DictReader(file)]
    counts = Counter(values)
    assert describe(values).endswith(f"by rows: 0 ({counts['0']:,}), 1 ({counts['1']:,}).")


def test_the_label_of_a_text_in_words():
    names = ("bad", "good", "odd")
    assert name_targets(np.array([1.0]), Labels(SINGLE_LABEL, names)) == "good"
    assert name_targets(np.array([1.0, 0.0, 1.0]), Labels(MULTI_LABEL, names)) == "bad, odd"
    assert name_targets(np.zeros(3), Labels(MULTI_LABEL, names)) == "no label"
    assert name_targets(np.array([-0.25]), Labels(REGRESSION, ("score",))) == "-0.25"
