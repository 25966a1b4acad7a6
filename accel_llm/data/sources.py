"""Read rows from sources: files of many kinds, folders, globs, saved datasets, hub datasets and standard input."""

import glob
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.data.hub import is_reader_name, load_hub_dataset
from accel_llm.data.readers import (
    READERS,
    ROWS_PER_BATCH,
    NameColumns,
    SourceFile,
    file_kind,
    is_readable,
    plain_values,
    read_features,
    read_rows,
)
from accel_llm.data.saved_datasets import is_saved_dataset, saved_problem
from accel_llm.data.splits import SplitChoice, choose_files, list_groups, list_splits
from accel_llm.data.standard_input import spool_standard_input
from accel_llm.errors import DataError
from accel_llm.system.hub import is_hub_id, misspelt_path
from accel_llm.system.places import is_there, missing_reason

ALLOWED_SOURCES = (
    "a .json, .jsonl, .ndjson, .csv, .tsv, .txt (also as .gz or .zst) or .parquet file, a folder or glob of such files, "
    "a saved dataset, the id of a hub dataset, or - for JSON lines from standard input"
)

PlaceKind = Literal["standard input", "address", "saved dataset", "file", "folder", "glob", "hub dataset", "nothing"]
# Fields of a source that only these kinds have.
DATASET_FIELDS: dict[str, tuple[PlaceKind, ...]] = {
    "name": ("hub dataset",),
    "split": ("folder", "glob", "saved dataset", "hub dataset"),
    "revision": ("hub dataset",),
}


_ABOUT_FILES = ("readme", "license", "licence")  # files that nobody takes for rows


class RawRow(NamedTuple):
    """One row of a source."""

    file: str  # for messages: the file, the label of a dataset, or `standard input`
    number: int  # its place in that file, from 1
    fields: dict[str, Any]


def as_source(place: str | Source) -> Source:
    """Return `place` as a Source; a path alone becomes a Source with defaults."""
    # Not validated, because pydantic refuses names of files that are not UTF-8.
    return Source.model_construct(path=place) if isinstance(place, str) else place


def source_problems(options: DataOptions) -> list[str]:
    """Return one sentence for each source that is missing or of an unknown kind. Nothing is read or downloaded."""
    problems = [] if options.train_files else [f"train_files: is missing; name at least one source: {ALLOWED_SOURCES}."]
    for field in ("train_files", "eval_files"):
        for source in map(as_source, getattr(options, field)):
            problem = _find_problem(source)
            if problem:
                problems.append(f"{field}: {problem}.")
    return problems


def read_source(source: Source, name_columns: NameColumns | None = None) -> Iterator[RawRow]:
    """Return an iterator over the rows of `source` in their order, at most `limit_rows`. Later files are not opened.

    For what a row holds, and for `name_columns`, see `read_rows`.

    Raises:
        DataError: the source cannot be read, or a file has no rows or is broken (the message names the line).
    """
    _check_source(source)
    is_dataset = _place_kind(source) in ("saved dataset", "hub dataset")
    rows = _dataset_rows(source) if is_dataset else _file_rows(source_files(source), name_columns)
    return itertools.islice(rows, source.limit_rows)


def source_features(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Return (file, features by column) as `datasets` knows them, of a dataset or of each .parquet file of a source.

    Raises:
        DataError: the source cannot be read.
    """
    _check_source(source)
    if _place_kind(source) in ("saved dataset", "hub dataset"):
        return [(source.label, _load_dataset(source).features.to_dict())]
    return [(file.label, read_features(file)) for file in source_files(source) if file.kind == ".parquet"]


def source_identity(source: Source) -> list[tuple[str, str]]:
    """Identify the whole content of `source`: return (name, hash) of each of its files in order, or of the dataset.

    Raises:
        DataError: the source cannot be read.
    """
    _check_source(source)
    if _place_kind(source) == "hub dataset":
        return [(source.label, _load_dataset(source)._fingerprint)]
    return [(file.label, data_fingerprint(file.path)) for file in source_files(source)]


def left_out_note(source: Source) -> str | None:
    """Return a sentence for the ledger on the files of a folder or glob that are not read; None if all are.

    They are of other splits, or of kinds that cannot be read.

    Raises:
        DataError: the source cannot be read.
    """
    _check_source(source)
    choice = _choose_files(source) if _place_kind(source) in ("folder", "glob") else None
    if not isinstance(choice, SplitChoice):
        return None
    facts, base = [], _named_folder(source)
    if choice.left_out:
        left_out = list_splits(choice.left_out, base)
        facts.append(f"only the files of its split {source.split} are read; left out: {left_out}")
    unreadable: dict[str, list[str]] = {}
    for name in itertools.filterfalse(is_readable, _matching_files(source)):
        if not PurePath(name).name.lower().startswith(_ABOUT_FILES):
            unreadable.setdefault("".join(PurePath(name).suffixes[-1:]) or "no suffix", []).append(name)
    if unreadable:
        facts.append(f"files of kinds that cannot be read are left out: {list_groups(unreadable, base)}")
    return f"{source.path}: {'; '.join(facts)}." if facts else None


def data_fingerprint(*parts: object) -> str:
    """Hash `parts` to a name of 24 characters. A Path counts as the content of its file, other parts as their repr."""
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


def _place_kind(source: Source) -> PlaceKind:
    """Tell what the path of a source names.

    A path that looks like a file is never looked up on the hub, even if the file does not exist.
    """
    path = Path(source.path)
    if source.path == "-":
        return "standard input"
    if re.match(r"[A-Za-z][\w+.-]+://", source.path):
        return "address"
    if is_there(path):
        if (path / "dataset_dict.json").is_file() or is_saved_dataset(path):
            return "saved dataset"
        return "folder" if path.is_dir() else "file"
    if glob.has_magic(source.path):
        return "glob"
    looks_local = source.path.startswith((".", "/", "~")) or file_kind(source.path)[0] in READERS
    return "nothing" if looks_local or not is_hub_id(source.path) or misspelt_path(source.path) else "hub dataset"


def _check_source(source: Source) -> None:
    """Check that a source can be read.

    Raises:
        DataError: it does not exist or is of an unknown kind.
    """
    problem = _find_problem(source)
    if problem:
        raise DataError(f"{problem}.")


def _find_problem(source: Source) -> str | None:
    """Return the problem of a source as a sentence without full stop, or None."""
    path, place = source.path, _place_kind(source)
    if not path:
        return f"'' is no path; name {ALLOWED_SOURCES}"
    if place == "nothing":
        reason = (is_hub_id(path) and misspelt_path(path)) or missing_reason(path)
        return f"{path} {reason}; name {ALLOWED_SOURCES}"
    if place == "address":
        return f"{path} is an address, and addresses cannot be read; download the file and name it"

    # Some fields of a source only apply to datasets.
    for name, kinds in DATASET_FIELDS.items():
        value = getattr(source, name)
        if place not in kinds and value != Source.model_fields[name].default:
            return f"{path} takes no {name}, found {value!r}; only a {' or '.join(kinds)} has one"

    # The checks of each kind of place.
    if place == "standard input":
        piped = sys.stdin is not None and not sys.stdin.isatty()
        return None if piped else "- is standard input, and nothing is piped into it; give it JSON lines or name a file"
    if place == "hub dataset":
        is_kind = is_reader_name(path)
        return f"{path} is a kind of file, not a dataset; name {ALLOWED_SOURCES}" if is_kind else None
    if place == "saved dataset":
        return saved_problem(path, Path(path), source.split)
    return _file_problem(path) if place == "file" else _folder_problem(source)


def _file_problem(path: str) -> str | None:
    kind, compression = file_kind(path)
    if kind == ".parquet" and compression:
        return f"{path} is a compressed .parquet file; decompress it, .parquet is compressed by itself"
    if kind not in READERS:
        return f"{path} is of kind {kind + compression or '(none)'!r}; name {ALLOWED_SOURCES}"
    return None


def _folder_problem(source: Source) -> str | None:
    """Return the problem of a folder or glob, or None."""
    names = _matching_files(source)
    dangling = next((name for name in _matching_names(source) if is_readable(name) and not is_there(name)), None)
    if dangling:
        return f"{source.path}: its file {dangling} {missing_reason(dangling)}; repair or remove it"
    if not any(map(is_readable, names)):
        verb = "matches" if _place_kind(source) == "glob" else "is a folder and holds"
        return f"{source.path} {verb} no file that can be read; name {ALLOWED_SOURCES}"

    # The .json files of a saved dataset inside would be read as rows.
    saved = next(filter(is_saved_dataset, sorted({Path(name).parent for name in names})), None)
    if saved:
        return f"{source.path} holds the saved dataset {saved}; name each saved dataset by itself"
    choice = _choose_files(source)
    return f"{source.path} {choice}" if isinstance(choice, str) else None


def _matching_files(source: Source) -> list[str]:
    """Return all files below a folder or of a glob, of any kind, sorted by name; hidden files are left out."""
    return [name for name in _matching_names(source) if Path(name).is_file()]


def _matching_names(source: Source) -> list[str]:
    """Return the names below a folder or of a glob, sorted: of files, of folders, and of links that lead nowhere."""
    base = _named_folder(source)
    if _place_kind(source) == "folder":
        return sorted(_names_below(base, base))
    rest = Path(source.path).parts[len(base.parts) :]
    # Not Path.glob: it also returns hidden files, and before Python 3.13 no files for a `**` at the end.
    names = sorted(set(glob.glob(str(Path(glob.escape(str(base)), *rest)), recursive=True)))  # noqa: PTH207
    folders = {folder for name in names for folder in Path(name).parents if base in folder.parents}
    circles = {folder for folder in folders if _leads_back(folder, base)}
    return [name for name in names if circles.isdisjoint(Path(name).parents)]


def _names_below(folder: Path, base: Path) -> Iterator[str]:
    """Yield the names below `folder`, but for hidden ones; `base` is the folder where the search began."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield str(path)
            if path.is_dir() and not _leads_back(path, base):
                yield from _names_below(path, base)


def _leads_back(folder: Path, base: Path) -> bool:
    """Tell whether a folder is a link to one above it, from `base` on: each file in it would be read again and again."""
    if not folder.is_symlink():
        return False
    place = folder.resolve()
    return any(
        above.resolve().is_relative_to(place) for above in folder.parents if above == base or base in above.parents
    )


def _named_folder(source: Source) -> Path:
    """Return the folder of a folder or glob below which names say splits: for a glob, the part that exists as it is."""
    path = Path(source.path)
    return path if is_there(path) else next(filter(is_there, path.parents))


def _choose_files(source: Source) -> SplitChoice | str:
    """Choose the files that are read of a folder or glob, or return the end of a sentence on why none fits."""
    files = list(filter(is_readable, _matching_files(source)))
    return choose_files(files, _named_folder(source), source.split, _place_kind(source) == "glob")


def source_files(source: Source) -> list[SourceFile]:
    """Return the files of a source in the order in which they are read; none of a hub dataset."""
    place, path = _place_kind(source), Path(source.path)
    if place == "standard input":
        return [SourceFile(spool_standard_input(), place, ".jsonl", "")]
    if place == "file":
        return [SourceFile(path, source.path, *file_kind(source.path))]
    if place == "saved dataset":
        folder = path if is_saved_dataset(path) else path / source.split
        return [SourceFile(file, str(file), "", "") for file in sorted(folder.iterdir()) if file.is_file()]
    if place == "hub dataset":
        return []
    choice = _choose_files(source)
    assert isinstance(choice, SplitChoice)  # `_check_source` has found a choice
    return [SourceFile(Path(name), name, *file_kind(name)) for name in choice.files]


def _file_rows(files: list[SourceFile], name_columns: NameColumns | None) -> Iterator[RawRow]:
    for file in files:
        for number, fields in enumerate(read_rows(file, name_columns), 1):
            yield RawRow(file.label, number, fields)


def _dataset_rows(source: Source) -> Iterator[RawRow]:
    number = 0
    for table in _load_dataset(source).with_format("arrow").iter(ROWS_PER_BATCH):
        for fields in plain_values(table):
            number += 1
            yield RawRow(source.label, number, fields)
    if number == 0:
        raise DataError(f"{source.label}: the dataset has no rows.")


def _load_dataset(source: Source) -> Any:
    """Load a memory-mapped `datasets.Dataset`.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets import (
        load_from_disk,
    )  # imported here, because the import takes a second and plain files do not need it

    path, on_hub = Path(source.path), _place_kind(source) == "hub dataset"
    try:
        if on_hub:
            return load_hub_dataset(source.path, source.name, source.split, source.revision)
        return load_from_disk(path if is_saved_dataset(path) else path / source.split)
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, httpx, fsspec and pyarrow each raise errors of their own
        problem = "no file or folder has this name, and the hub gives no such dataset" if on_hub else "cannot be read"
        raise DataError(f"{source.label}: {problem} ({_one_line(error)}).") from error


def _one_line(error: Exception) -> str:
    """Return the text of a library's error as one line, without its example code."""
    return " ".join(str(error).split("Example of usage")[0].split()).rstrip(".")
