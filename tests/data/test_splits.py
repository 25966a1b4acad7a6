"""Folders and globs whose names say splits: the train split, or a sentence that lists the splits."""

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

import pytest
from datasets.data_files import DEFAULT_PATTERNS_SPLIT_IN_FILENAME
from hypothesis import example, given
from hypothesis import strategies as st

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.data.source_notes import left_out_note
from accel_llm.data.sources import read_source, source_identity, source_problems
from accel_llm.data.splits import SplitChoice, choose_files, file_split, named_split
from accel_llm.errors import DataError


def make_folder(root: Path, *names: str) -> Path:
    """Write files whose only row is their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name + "\n", encoding="utf-8")
    return root


def files_read(place: object, **about: Any) -> list[str]:
    return [row.fields["text"] for row in read_source(Source(path=str(place), **about))]


def problem(place: object, **about: Any) -> str:
    """Return the sentence on a source, which is the same wherever it is looked at."""
    source = Source(path=str(place), **about)
    sentences = set()
    for look in (read_source, source_identity, left_out_note):
        with pytest.raises(DataError) as error:
            look(source)
        sentences.add(str(error.value))
    (sentence,) = sentences
    assert source_problems(DataOptions(train_files=[source])) == [f"train_files: {sentence}"]
    return sentence


@pytest.mark.parametrize(
    "path, split",
    [
        ("train.txt", "train"),
        ("training.txt", "train"),
        ("my-train_2.txt", "train"),
        ("train2020.txt", "train"),
        ("a train b.txt", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("default/train/0000.parquet", "train"),
        ("training_data/a.txt", "train"),
        ("dev.txt", "validation"),
        ("val_1.txt", "validation"),
        ("valid.txt", "validation"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("test.txt", "test"),
        ("TEST(1).txt", "test"),
        ("数据test集.txt", "test"),
        ("testing/part.txt", "test"),
        ("a/eval/b/part.txt", "test"),
        ("chat-evaluation.txt", "test"),
        # The split of a shard may have a name of its own.
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("data/test_gen-00000-of-00003.parquet", "test_gen"),
        ("data/alpaca_train-00000-of-00003.parquet", "train"),
        ("data/Train-00000-of-00003.parquet", "train"),
        ("train_sft.txt", "train"),
        # Names that disagree are of no training file.
        ("train_test.txt", "test"),
        ("training_data/test.txt", "test"),
        ("train/val_1.txt", "validation"),
        ("test/train.txt", "test"),
        ("test/train-00000-of-00001.txt", "test"),
        ("test/train_sft-00000-of-00001.txt", "test"),
        # A capital begins a word, and some words are often written together.
        ("trainData.txt", "train"),
        ("testData.txt", "test"),
        ("myTestSet.txt", "test"),
        ("TESTData.txt", "test"),
        ("testset.txt", "test"),
        ("TRAINSET.txt", "train"),
        ("my_valset_2.txt", "validation"),
        ("devdata.txt", "validation"),
        ("holdout.txt", "test"),
        ("held_out/a.txt", "test"),
        ("trainTest.txt", "test"),
        # No split.
        ("latest.txt", None),
        ("contest.txt", None),
        ("evaluate_me.txt", None),
        ("trained.txt", None),
        ("validity.txt", None),
        ("developers.txt", None),
        ("household.txt", None),
        ("fastest_dataset.txt", None),
        ("a.txt", None),
        ("data/part-00000-of-00002.parquet", None),
        ("constraint.txt", None),
        ("latest/contest.txt", None),
        ("device.txt", None),
        ("values.txt", None),
        ("trained.txt", None),
    ],
)
def test_the_split_of_a_file(path, split):
    assert file_split(path) == split


KEYWORDS = ["train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"]


@given(st.lists(st.sampled_from([*KEYWORDS, "a", "x", "-", ".", "_", " ", "0", "7"]), min_size=1, max_size=6))
@example(["train", "-", "test"])
def test_names_that_datasets_takes_for_a_split_are_taken_for_it_here(parts):
    name = "".join(parts) + ".csv"
    theirs = {
        str(split)
        for split, patterns in DEFAULT_PATTERNS_SPLIT_IN_FILENAME.items()
        if any(fnmatchcase(name, re.sub(r"^\*\*/", "", pattern)) for pattern in patterns)
    }
    # They let a file be of several splits; here it is then not of `train`.
    assert named_split(name) in (theirs - {"train"} or theirs or {None})


@pytest.mark.parametrize(
    "names, read, note",
    [
        (["train.txt", "test.txt"], ["train.txt"], "test (test.txt)"),
        (["train.txt", "a.txt"], ["train.txt"], "files of no split (a.txt)"),
        (["train/b.txt", "train/a.txt", "test/a.txt"], ["train/a.txt", "train/b.txt"], "test (test/a.txt)"),
        (
            ["data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt", "data/test-00000-of-00001.txt"],
            ["data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt"],
            "test (data/test-00000-of-00001.txt)",
        ),
        (
            ["training_set.txt", "b.txt", *(f"dev{n}.txt" for n in range(5)), "my_test.txt"],
            ["training_set.txt"],
            "test (my_test.txt), validation (dev0.txt, dev1.txt, dev2.txt, 2 more), files of no split (b.txt)",
        ),
        (["train-a.txt", "train-b.txt"], ["train-a.txt", "train-b.txt"], None),
        (["a.txt", "deep/b.txt"], ["a.txt", "deep/b.txt"], None),
        (["a.txt", "README.md", "LICENSE"], ["a.txt"], None),
    ],
)
def test_the_train_split_of_a_folder_is_read_and_the_ledger_says_what_is_not(tmp_path, names, read, note):
    make_folder(tmp_path, *names)
    sentence = f"{tmp_path}: only the files of its split train are read; left out: {note}."
    assert files_read(tmp_path) == read and left_out_note(Source(path=str(tmp_path))) == (sentence if note else None)
    labels = [name for name, _ in source_identity(Source(path=str(tmp_path)))]
    assert labels == [str(tmp_path / name) for name in read]
    assert files_read(f"{tmp_path}/**") == read and files_read(f"{tmp_path}/", split="train") == read


@pytest.mark.parametrize(
    "names, splits",
    [
        (["test.txt"], "test (test.txt)"),
        (["dev/a.txt", "test/a.txt"], "test (test/a.txt), validation (dev/a.txt)"),
        (["a.txt", "test.txt"], "test (test.txt), files of no split (a.txt)"),
        (["a.txt", "b.txt", "c.txt", "d.txt", "eval/a.txt"], "test (eval/a.txt), files of no split (a.txt, b.txt, c.txt, 1 more)"),
        (["data/test_sft-00000-of-00001.txt", "data/train_sft-00000-of-00001.txt"],
         "test_sft (data/test_sft-00000-of-00001.txt), train_sft (data/train_sft-00000-of-00001.txt)"),
    ],
)  # fmt: skip
def test_a_folder_without_a_train_split_gives_a_sentence_that_lists_the_splits(tmp_path, names, splits):
    make_folder(tmp_path, *names)
    sentence = f"{tmp_path} has no split 'train'; it has {splits}; name the files to read, or set split."
    assert problem(tmp_path) == sentence


def test_split_chooses_a_split_of_a_folder_by_any_of_its_names(tmp_path):
    make_folder(tmp_path, "train.txt", "dev.txt", "test/a.txt", "test/b.txt")
    assert files_read(tmp_path, split="test") == files_read(tmp_path, split="Eval") == ["test/a.txt", "test/b.txt"]
    for split in ("validation", "dev", "val"):
        assert files_read(tmp_path, split=split) == files_read(f"{tmp_path}/*.txt", split=split) == ["dev.txt"]
    source = Source(path=str(tmp_path), split="test")
    assert left_out_note(source) == (
        f"{tmp_path}: only the files of its split test are read; left out: train (train.txt), validation (dev.txt)."
    )
    identities = [source_identity(Source(path=str(tmp_path), split=split)) for split in ("train", "dev", "test")]
    assert [len(identity) for identity in identities] == [1, 1, 2]
    listed = "test (test/a.txt, test/b.txt), train (train.txt), validation (dev.txt)"
    assert problem(tmp_path, split="test_sft") == (
        f"{tmp_path} has no split 'test_sft'; it has {listed}; name the files to read, or set split."
    )
    sft = make_folder(tmp_path / "sft", "data/train_sft-00000-of-00001.txt", "data/test_sft-00000-of-00001.txt")
    assert files_read(sft, split="train_sft") == ["data/train_sft-00000-of-00001.txt"]


def test_a_folder_whose_names_say_no_split_has_none_to_choose(tmp_path):
    make_folder(tmp_path / "plain", "a.txt")
    assert problem(tmp_path / "plain", split="test") == (
        f"{tmp_path}/plain has no split 'test'; the names of its files say no split; name the files to read."
    )


def test_what_a_person_names_says_no_split(tmp_path):
    root = make_folder(tmp_path / "test", "a.txt", "train/x.txt") and tmp_path / "test"
    assert files_read(root / "train") == ["train/x.txt"]  # the folder `test` was named, and no name below it says test
    (root / "train" / "x.txt").unlink()
    assert files_read(root) == ["a.txt"] and files_read(f"{root}/*.txt") == ["a.txt"]
    make_folder(tmp_path, "test.txt")
    assert files_read(tmp_path / "test.txt") == ["test.txt"]


def test_a_glob_that_matches_files_of_one_split_reads_them(tmp_path):
    make_folder(tmp_path, "test-a.txt", "test-b.txt", "dev.txt", "a.txt", "train.txt")
    assert files_read(f"{tmp_path}/test-*.txt") == ["test-a.txt", "test-b.txt"]
    assert files_read(f"{tmp_path}/d*.txt") == ["dev.txt"] and files_read(f"{tmp_path}/?.txt") == ["a.txt"]
    assert files_read(f"{tmp_path}/*.txt") == ["train.txt"]
    assert problem(f"{tmp_path}/[dt]e*.txt") == (
        f"{tmp_path}/[dt]e*.txt has no split 'train'; it has test (test-a.txt, test-b.txt), validation (dev.txt); "
        "name the files to read, or set split."
    )
    assert problem(f"{tmp_path}/*a.txt") == (
        f"{tmp_path}/*a.txt has no split 'train'; it has test (test-a.txt), files of no split (a.txt); "
        "name the files to read, or set split."
    )
    make_folder(tmp_path, "train/x.txt", "test/x.txt")
    assert files_read(f"{tmp_path}/*/x.txt") == ["train/x.txt"] and files_read(f"{tmp_path}/test/*") == ["test/x.txt"]


def test_the_identity_follows_the_files_that_are_read(tmp_path):
    make_folder(tmp_path, "train.txt", "test.txt")
    before = source_identity(Source(path=str(tmp_path)))
    (tmp_path / "test.txt").write_text("another test", encoding="utf-8")
    assert source_identity(Source(path=str(tmp_path))) == before
    (tmp_path / "train.txt").write_text("another", encoding="utf-8")
    assert source_identity(Source(path=str(tmp_path))) != before


@given(
    st.lists(
        st.sampled_from(["a.txt", "b.txt", "train.txt", "train/x.txt", "dev.txt", "test.txt", "test/x.txt"]), min_size=1
    )
)
def test_each_file_is_read_or_left_out_and_no_test_file_is_read_as_train(names):
    files = sorted(set(names))
    choice = choose_files(files, PurePath(), "train", is_glob=False)
    others = {"dev.txt", "test.txt", "test/x.txt"} & set(files)
    if isinstance(choice, SplitChoice):
        assert sorted([*choice.files, *(file for left in choice.left_out.values() for file in left)]) == files
        assert not others & set(choice.files)
    else:
        assert others and not {"train.txt", "train/x.txt"} & set(files)


def test_a_test_split_without_a_separator_is_not_trained(tmp_path) -> None:
    make_folder(tmp_path, "trainData.txt", "testData.txt", "myTestSet.txt", "holdout.txt")
    assert files_read(tmp_path) == ["trainData.txt"]
    note = left_out_note(Source(path=str(tmp_path)))
    assert note and note.endswith("left out: test (holdout.txt, myTestSet.txt, testData.txt).")


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    make_folder(
        tmp_path,
        "a.txt",
        "b.jsonl.bz2",
        "c.txt.xz",
        "d.arrow",
        "e.parquet.gz",
        "f.md",
        "g",
        *map("{}.bz2".format, range(4)),
    )
    kinds = ".bz2 (0.bz2, 1.bz2, 2.bz2, 2 more), .xz (c.txt.xz), .arrow (d.arrow), .gz (e.parquet.gz), .md (f.md), no suffix (g)"
    note = f"files of kinds that cannot be read are left out: {kinds}."
    assert left_out_note(Source(path=str(tmp_path))) == f"{tmp_path}: {note}"
    assert files_read(tmp_path) == ["a.txt"]
    place = f"{tmp_path}/[a-d].*"
    kinds = ".bz2 (b.jsonl.bz2), .xz (c.txt.xz), .arrow (d.arrow)"
    assert left_out_note(Source(path=place)) == f"{place}: files of kinds that cannot be read are left out: {kinds}."
    make_folder(tmp_path, "train.txt", "test.txt")
    note = left_out_note(Source(path=str(tmp_path)))
    assert note and "left out: test (test.txt), files of no split (a.txt); files of kinds that" in note
