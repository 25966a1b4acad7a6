"""Datasets of the hub: which may be read, with which split, and from which files."""

import re
from functools import cache
from typing import Any

from accel_llm.data.splits import missing_split
from accel_llm.errors import DataError
from accel_llm.system.hub import ask_hub


def is_reader_name(path: str) -> bool:
    """Tell whether `datasets` takes the id of a hub dataset for one of its readers, such as `json`.

    Some readers of datasets 5.2 then read every file of the working folder.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return "/" not in path and path in _PACKAGED_DATASETS_MODULES


# Cached, so that identity and rows come from the same revision, even if the dataset on the hub changes in between.
@cache
def load_hub_dataset(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """Download a dataset if needed, and return one split of it as a memory-mapped `datasets.Dataset`.

    Raises:
        DataError: the dataset has no such split.
        ValueError: the revision or a file of it cannot be trusted. `datasets` raises errors of many other kinds.
    """
    ask_hub()  # before the import: datasets reads there whether the hub may be asked
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache

    builder = load_dataset_builder(path, name, revision=revision)

    # Without the hub, datasets 5.2 takes the newest revision in its cache, whatever `revision` says.
    if revision and isinstance(builder, Cache) and builder.hash != revision:
        raise ValueError(
            f"only {builder.hash} is in the cache, and without the hub nobody knows whether it is {revision!r}"
        )

    # The README of a dataset names the files to read. datasets 5.2 would also read files outside the repository, such
    # as private files on this computer.
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    if outside := file_outside_hub(files):
        raise ValueError(f"its README names {outside}, which is not a file of a hub dataset")

    # Usually the splits are known before anything is downloaded.
    label = f"{path}:{name}" if name else path
    _check_split(label, split, [*(builder.info.splits or builder.config.data_files or ())])
    builder.download_and_prepare()
    _check_split(label, split, [*(builder.info.splits or ())])
    return builder.as_dataset(split=split)


def _check_split(label: str, split: str, splits: list[str]) -> None:
    """Check that a dataset with `splits` has the split, which may be a part or a sum, as in `train[:10%]+test`.

    Raises:
        DataError: it has not; the message lists its splits.
    """
    names = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    if splits and any(name not in (*splits, "all") for name in names):
        raise DataError(missing_split(label, split, splits) + ".")


def file_outside_hub(files: list[str]) -> str | None:
    """Return the first of a dataset's `files` that is not on the hub, or None."""
    # The address of a file in an archive ends with the address of the archive, after a `::`.
    return next((file for file in files if not file.rpartition("::")[2].startswith("hf://datasets/")), None)
