"""Datasets that `save_to_disk` of `datasets` wrote, and the checks before one is read."""

import json
from pathlib import Path

from accel_llm.data.splits import TRAIN, missing_split, named_split


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether a folder holds one saved dataset (a dictionary of several has a `dataset_dict.json`)."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def saved_problem(label: str, folder: Path, split: str) -> str | None:
    """Return the problem of a saved dataset, or of one split of several, as a sentence without full stop, or None.

    Its JSON file lists the splits, so nothing else has to be read. The dataset is called `label`.
    """
    has_one_split = is_saved_dataset(folder)
    state = folder / ("state.json" if has_one_split else "dataset_dict.json")
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
        splits = [str(values["_split"] or TRAIN)] if has_one_split else list(map(str, values["splits"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{state} was not written by datasets ({type(error).__name__}: {error})"

    # With one split the default `train` means this split, unless its name says that it is for validation or a test.
    is_only_one = has_one_split and split == TRAIN and named_split(splits[0]) in (TRAIN, None)
    if split in splits or is_only_one:
        return _data_files_problem(folder if has_one_split else folder / split)
    return missing_split(label, split, splits)


def _data_files_problem(folder: Path) -> str | None:
    """Check that `state.json` names only files of its own folder; datasets 5.2 would read files anywhere."""
    state = folder / "state.json"
    try:
        names = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{state} was not written by datasets ({type(error).__name__}: {error})"
    outside = next((name for name in names if Path(str(name)).name != name), None)
    return f"{state} names {outside!r}; only files of its own folder are allowed" if outside is not None else None
