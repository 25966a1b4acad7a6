"""Rows from wherever people keep them: files of many kinds, folders, globs, datasets, standard input."""

import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import HFValidationError, validate_repo_id

from accel_llm.config.fields import Source
from accel_llm.config.options import DataOptions
from accel_llm.data.readers import READERS, ROWS_AT_ONCE, SourceFile, file_kind, is_readable, plain_values, read_rows
from accel_llm.errors import DataError
from accel_llm.system.disk import whole_file
from accel_llm.system.launcher import is_launched

ALLOWED_SOURCES = (
    "a .json, .jsonl, .csv, .tsv, .txt (also as .gz or .zst) or .parquet file, a folder or glob of such files, "
    "a saved dataset, the id of a hub dataset, or - for JSON lines from standard input"
)

PlaceKind = Literal["standard input", "address", "saved dataset", "file", "folder", "glob", "hub dataset", "nothing"]


class RawRow(NamedTuple):
    """One row of a source."""

    file: str  # as shown to a person: the file, the label of a dataset, or `standard input`
    number: int  # within that file, from 1
    fields: dict[str, Any]


def as_source(place: str | Source) -> Source:
    """A place that is named by its path alone is a source with the defaults for all else."""
    return Source.model_validate({"path": place}) if isinstance(place, str) else place


def source_problems(options: DataOptions) -> list[str]:
    """One sentence for each place that is not there or of an unknown kind, before anything is read or looked up."""
    found = [] if options.train_files else [f"train_files: is missing; name at least one source: {ALLOWED_SOURCES}."]
    for field in ("train_files", "eval_files"):
        for source in map(as_source, getattr(options, field)):
            wrong = _problem(source)
            if wrong:
                found.append(f"{field}: {wrong}.")
    return found


def read_source(source: Source) -> Iterator[RawRow]:
    """The rows of `source` in their order, at most `limit_rows`; files behind the last of these are not opened.

    Cells of .csv and .tsv are text, an empty one is None; a line of .txt is a row with one field `text`.

    Raises:
        DataError: a place that cannot be read, a file without rows, or a broken one (with its line).
    """
    wrong = _problem(source)
    if wrong:
        raise DataError(f"{wrong}.")
    rows = _dataset_rows(source) if _place(source) in ("saved dataset", "hub dataset") else _file_rows(_files(source))
    return itertools.islice(rows, source.limit_rows)


def source_identity(source: Source) -> list[tuple[str, str]]:
    """What stands for the content of `source`, all of it: (name, hash) of every file in order, or of the dataset.

    Raises:
        DataError: a place that cannot be read.
    """
    wrong = _problem(source)
    if wrong:
        raise DataError(f"{wrong}.")
    if _place(source) == "hub dataset":
        return [(source.label, _dataset(source)._fingerprint)]
    return [(file.shown, data_fingerprint(file.path)) for file in _files(source)]


def data_fingerprint(*parts: object) -> str:
    """A short name for data and everything that shapes its encoding; paths stand for the content of their files."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _place(source: Source) -> PlaceKind:
    """What the path names. What looks like a file is one, there or not, and is never looked up on the hub."""
    path = _local(source)
    if source.path == "-":
        return "standard input"
    if re.match(r"[A-Za-z][\w+.-]+://", source.path):
        return "address"
    if (path / "dataset_dict.json").is_file() or _is_saved(path):
        return "saved dataset"
    if path.exists():
        return "folder" if path.is_dir() else "file"
    if glob.has_magic(source.path):
        return "glob"
    if source.path.startswith((".", "/", "~")) or file_kind(source.path)[0] in READERS:
        return "nothing"
    try:
        validate_repo_id(source.path)
    except HFValidationError:
        return "nothing"
    return "hub dataset"


def _problem(source: Source) -> str | None:
    """What is wrong with the place, as a sentence without its full stop."""
    path, place = source.path, _place(source)
    if place == "nothing":
        return f"{path} does not exist; name {ALLOWED_SOURCES}"
    if place == "address":
        return f"{path} is an address, and those are not read; download it and name the file"
    for name, field in Source.model_fields.items():
        owners = {"name": "a hub", "revision": "a hub", "split": "a saved or hub"}.get(name)
        if owners and getattr(source, name) != field.default and place.split()[0] not in owners.split():
            return f"{path} takes no {name}, found {getattr(source, name)!r}; only {owners} dataset has one"
    if place == "standard input":
        piped = sys.stdin is not None and not sys.stdin.isatty()
        return None if piped else "- is standard input, and nothing is piped into it; give it JSON lines or name a file"
    if place == "hub dataset":
        return _no_dataset(path)
    if place == "saved dataset":
        return _no_split(source)
    return _no_file(path) if place == "file" else _no_files(source)


def _no_file(path: str) -> str | None:
    kind, packing = file_kind(path)
    if kind == ".parquet" and packing:
        return f"{path} is a packed .parquet file; unpack it, .parquet is compressed by itself"
    return None if kind in READERS else f"{path} is of kind {kind + packing or '(none)'!r}; name {ALLOWED_SOURCES}"


def _no_files(source: Source) -> str | None:
    names = _matches(source)
    if not any(map(is_readable, names)):
        found = "matches" if _place(source) == "glob" else "is a folder and holds"
        return f"{source.path} {found} no file that can be read; name {ALLOWED_SOURCES}"
    # Their .json files would be taken for rows.
    saved = next(filter(_is_saved, sorted({Path(name).parent for name in names})), None)
    return f"{source.path} holds the saved dataset {saved}; name each saved dataset by itself" if saved else None


def _no_dataset(path: str) -> str | None:
    if "/" in path:
        return None
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    # datasets 5.2 takes such a name for a reader, and some readers then read every file of the working folder.
    return (
        f"{path} is a kind of file and no dataset; name {ALLOWED_SOURCES}"
        if path in _PACKAGED_DATASETS_MODULES
        else None
    )


def _no_split(source: Source) -> str | None:
    """Saved datasets name their splits, so a wrong one is found before anything is read."""
    folder = _local(source)
    alone = _is_saved(folder)
    named = folder / ("state.json" if alone else "dataset_dict.json")
    try:
        found = json.loads(named.read_text(encoding="utf-8"))
        splits = [found["_split"] or "train"] if alone else found["splits"]
    except (OSError, ValueError, KeyError) as error:
        return f"{named} is not what datasets saves ({type(error).__name__}: {error})"
    # A dataset saved alone is all there is, so its split need not be named.
    if source.split in splits or (alone and source.split == "train"):
        return _no_own_files(folder if alone else folder / source.split)
    return f"{source.path} has no split {source.split!r}; it has {', '.join(splits)}"


def _no_own_files(folder: Path) -> str | None:
    """The files of a saved dataset are named in one of them; datasets 5.2 would read them wherever they are."""
    state = folder / "state.json"
    try:
        named = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{state} is not what datasets saves ({type(error).__name__}: {error})"
    outside = next((name for name in named if Path(str(name)).name != name), None)
    return f"{state} names {outside!r}; files of its own folder are allowed" if outside is not None else None


def _local(source: Source) -> Path:
    try:
        return Path(source.path).expanduser()
    except RuntimeError:  # `~name` of nobody here
        return Path(source.path)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _matches(source: Source) -> list[str]:
    """All files, of any kind, below a folder or of a glob, sorted by name; none that is hidden."""
    path = str(_local(source))
    pattern = path if _place(source) == "glob" else str(Path(glob.escape(path), "**", "*"))
    # Path.glob takes hidden files too, and before Python 3.13 no files for a `**` at the end.
    names = sorted(set(glob.glob(pattern, recursive=True)))  # noqa: PTH207
    return [name for name in names if Path(name).is_file()]


def _files(source: Source) -> list[SourceFile]:
    """The files of a source, in the order in which they are read."""
    place, path = _place(source), _local(source)
    if place == "standard input":
        return [SourceFile(_spooled(), place, ".jsonl", "")]
    if place == "file":
        return [SourceFile(path, source.path, *file_kind(source.path))]
    if place == "saved dataset":
        folder = path if _is_saved(path) else path / source.split
        return [SourceFile(file, str(file), "", "") for file in sorted(folder.iterdir()) if file.is_file()]
    return [SourceFile(Path(name), name, *file_kind(name)) for name in _matches(source) if is_readable(name)]


def _spooled() -> Path:
    """Standard input as a file.

    All processes of a launch inherit one pipe: the first to come reads it whole into a file named by their launcher,
    the others read the file. A run alone is its own launcher.
    """
    launcher = psutil.Process(os.getppid() if is_launched() else os.getpid())
    folder = Path(HF_HOME) / "accel_llm" / "stdin" / socket.gethostname()
    folder.mkdir(parents=True, exist_ok=True)
    # Process ids come again; the hash is also of the time at which the process began.
    spool = folder / f"{launcher.pid}-{hash(launcher)}.jsonl"
    with FileLock(f"{spool}.lock"):
        if not spool.exists():
            for old in folder.iterdir():
                if not psutil.pid_exists(int(old.name.lstrip(".").split("-")[0])):
                    old.unlink(missing_ok=True)
            with whole_file(spool) as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
    return spool


def _file_rows(files: list[SourceFile]) -> Iterator[RawRow]:
    for file in files:
        for number, fields in enumerate(read_rows(file), 1):
            yield RawRow(file.shown, number, fields)


def _dataset_rows(source: Source) -> Iterator[RawRow]:
    number = 0
    for table in _dataset(source).with_format("arrow").iter(ROWS_AT_ONCE):
        for fields in plain_values(table):
            number += 1
            yield RawRow(source.label, number, fields)
    if number == 0:
        raise DataError(f"{source.label}: the dataset has no rows.")


def _dataset(source: Source) -> Any:
    """A datasets.Dataset, memory-mapped."""
    from datasets import load_from_disk  # takes a second to import, which files need not wait for

    path, on_hub = _local(source), _place(source) == "hub dataset"
    try:
        if on_hub:
            return _hub_dataset(source.path, source.name, source.split, source.revision)
        return load_from_disk(path if _is_saved(path) else path / source.split)
    except Exception as error:  # of datasets, huggingface_hub, httpx, fsspec or pyarrow: none of it is ours
        tried = "no file or folder has this name, and the hub gives no such dataset" if on_hub else "cannot be read"
        raise DataError(f"{source.label}: {tried} ({_flat(error)}).") from error


# Kept, so that the identity and the rows of a dataset are of one revision whatever happens on the hub meanwhile.
@cache
def _hub_dataset(path: str, name: str | None, split: str, revision: str | None) -> Any:
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache

    builder = load_dataset_builder(path, name, revision=revision)
    # Without the hub, datasets 5.2 takes the newest revision in its cache, whichever was asked for.
    if revision and isinstance(builder, Cache) and builder.hash != revision:
        raise ValueError(f"only {builder.hash} is at hand, and without the hub nobody knows whether it is {revision!r}")
    # Its README says which files are read, and datasets 5.2 follows it out of the repository, to the person's own files.
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    if outside := file_outside_hub(files):
        raise ValueError(f"its README names {outside}, which is no file of a hub dataset")
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def file_outside_hub(files: list[str]) -> str | None:
    """The first of a dataset's `files` that lies elsewhere; what lies in an archive has that archive's place at its end."""
    return next((file for file in files if not file.rpartition("::")[2].startswith("hf://datasets/")), None)


def _flat(error: Exception) -> str:
    """The text of a library's error on one line; what is available is named in it."""
    return " ".join(str(error).split("Example of usage")[0].split()).rstrip(".")
