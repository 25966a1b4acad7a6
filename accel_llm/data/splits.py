"""Which split each file of a folder belongs to, by its name, and which of the files a source reads.

The names are those of Hugging Face's `datasets` (its module `data_files`): a keyword in the name of a file or folder,
between characters that are no letters, such as `train.jsonl`, `test/part.jsonl` or `my-data_val_2.csv`. Beyond these,
a capital begins a word (`myTestSet.jsonl`), and common compounds count (`valset.jsonl`, `holdout.jsonl`).
"""

import re
from pathlib import PurePath
from typing import NamedTuple

TRAIN = "train"
# Split -> the keywords that name it.
SPLIT_KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {keyword: split for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
# Words that people write without a separator: testset, valdata, trainsplit.
_NOUNS = ("set", "sets", "data", "dataset", "split", "file", "files")
_SPLITS |= {keyword + noun: split for keyword, split in list(_SPLITS.items()) for noun in _NOUNS}
_SPLITS |= dict.fromkeys(("holdout", "heldout", "hold_out", "held_out", "hold-out", "held-out"), "test")
# `datasets` knows only lower case and the separators `-._ 0-9`; here `TEST(1).jsonl` is a test split as well.
_KEYWORD = rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])"
_FIND_KEYWORDS = re.compile(_KEYWORD, re.IGNORECASE).findall
# Where the next word of a name such as myTestSet or TESTData begins.
_WORD_BEGINS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# A file of several, as `datasets` writes them: train-00000-of-00002.parquet, or train_sft-00000-of-00002.parquet.
_MATCH_SHARD = re.compile(rf"({_KEYWORD}[\w.]*)-\d{{5}}-of-\d{{5}}.*", re.IGNORECASE).fullmatch
_NAMED_FILES = 3  # of each split in a message


class SplitChoice(NamedTuple):
    """The files of a folder or glob that a source reads, and those that it leaves out, each by its split."""

    files: list[str]
    left_out: dict[str | None, list[str]]


def named_split(name: str) -> str | None:
    """Return the split that a name says: `train`, `validation`, `test`, or None if it says no split.

    A name that says two, such as `train_test.jsonl`, is taken for the one that is not `train`.
    """
    splits = [_SPLITS[keyword.lower()] for keyword in _FIND_KEYWORDS(_WORD_BEGINS.sub("_", name))]
    return next((split for split in splits if split != TRAIN), splits[0] if splits else None)


def file_split(path: str) -> str | None:
    """Return the split of a file, from its path below the folder that a person named; None if no name says a split.

    If the names of file and folders disagree, as in `training_data/test.jsonl`, the file is taken for no training file,
    so that a test split is never trained by mistake.
    """
    *folders, name = PurePath(path).parts
    found = [split for part in (name, *reversed(folders)) if (split := named_split(part))]
    split = next((split for split in found if split != TRAIN), found[0] if found else None)
    shard = _MATCH_SHARD(name)
    if shard and named_split(name) == split:
        return _SPLITS.get(shard[1].lower(), shard[1])
    return split


def choose_files(files: list[str], base: PurePath, split: str, is_glob: bool) -> SplitChoice | str:
    """Choose the files of `split` from those of a folder or glob; if none fits, return the end of a sentence on why.

    All `files` lie below `base`, a folder that a person named; its own name says nothing. All files are read if no name
    says a split, and if a glob matches the files of one split only.
    """
    splits: dict[str | None, list[str]] = {}
    for file in files:
        splits.setdefault(file_split(str(PurePath(file).relative_to(base))), []).append(file)
    wanted = _SPLITS.get(split.lower(), split)
    if wanted in splits:
        return SplitChoice(splits.pop(wanted), splits)
    if wanted == TRAIN and len(splits) == 1 and (is_glob or None in splits):
        return SplitChoice(files, {})
    if splits.keys() == {None}:
        return f"has no split {split!r}; the names of its files say no split; name the files to read"
    return f"has no split {split!r}; it has {list_splits(splits, base)}; name the files to read, or set split"


def list_splits(splits: dict[str | None, list[str]], base: PurePath) -> str:
    """Return the splits and their first files in one line, such as `test (test.jsonl)`; files are named below `base`."""
    order = sorted(splits, key=lambda split: (split is None, split or ""))
    return list_groups({split or "files of no split": splits[split] for split in order}, base)


def list_groups(groups: dict[str, list[str]], base: PurePath) -> str:
    """Return groups of files and the first files of each in one line, such as `.bz2 (a.bz2, b.bz2)`."""
    parts = []
    for group, files in groups.items():
        names = [str(PurePath(file).relative_to(base)) for file in files]
        more = [f"{len(names) - _NAMED_FILES:,} more"] if len(names) > _NAMED_FILES else []
        parts.append(f"{group} ({', '.join([*names[:_NAMED_FILES], *more])})")
    return ", ".join(parts)


def missing_split(label: str, split: str, splits: list[str]) -> str:
    """Return the sentence, without full stop, on a dataset with `splits` that has not the split that is asked for."""
    return f"{label} has no split {split!r}; it has {', '.join(splits)}; set split to one of them"
