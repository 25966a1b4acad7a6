"""Read rows from sources: files of many kinds, folders, globs, saved datasets, hub datasets and standard input."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.data.arrow_values import plain_values
from accel_llm.data.corpus_shards import corpus_problem, corpus_rows, read_manifest
from accel_llm.data.file_lines import ReadingPlace, SourceFile, file_kind
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.hub import is_reader_name, load_hub_dataset
from accel_llm.data.readers import READERS, ROWS_PER_BATCH, NameColumns, is_readable, read_features, read_rows
from accel_llm.data.saved_datasets import is_saved_dataset, saved_problem
from accel_llm.data.source_places import PlaceKind, choose_split, matching_files, matching_names, place_kind
from accel_llm.data.splits import SplitChoice
from accel_llm.data.standard_input import spool_standard_input
from accel_llm.errors import DataError
from accel_llm.system.hub import is_hub_id, misspelt_path
from accel_llm.system.places import is_there, missing_reason

ALLOWED_SOURCES = (
    "a .json, .jsonl, .ndjson, .csv, .tsv, .txt (also as .gz or .zst) or .parquet file, a folder or glob of such files, "
    "a saved dataset, the id of a hub dataset, or - for JSON lines from standard input"
)

# Fields of a source that only these kinds have.
DATASET_FIELDS: dict[str, tuple[PlaceKind, ...]] = {
    "name": ("hub dataset",),
    "split": ("folder", "glob", "saved dataset", "hub dataset"),
    "revision": ("hub dataset",),
}


DATASET_FILE = "dataset"  # the kind of a `SourceFile` that stands for a saved or hub dataset


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
    return problems_of_sources("train_files", options.train_files) + problems_of_sources(
        "eval_files", options.eval_files
    )


def problems_of_sources(field: str, places: Sequence[str | Source]) -> list[str]:
    """Return one sentence for each source of the option `field` that cannot be read, as `source_problems` does."""
    if field == "train_files" and not places:
        return [f"train_files: is missing; name at least one source: {ALLOWED_SOURCES}."]
    return [f"{field}: {problem}." for problem in map(_find_problem, map(as_source, places)) if problem]


def read_source(source: Source, name_columns: NameColumns | None = None) -> Iterator[RawRow]:
    """Return an iterator over the rows of `source` in their order, at most `limit_rows`. Later files are not opened.

    For what a row holds, and for `name_columns`, see `read_rows`.

    Raises:
        DataError: the source cannot be read, or a file has no rows or is broken (the message names the line).
    """
    check_source(source)
    if place_kind(source) == "prepared corpus":
        return itertools.islice(map(RawRow._make, corpus_rows(Path(source.path))), source.limit_rows)
    if place_kind(source) in ("saved dataset", "hub dataset"):
        place = ReadingPlace()
        rows = (RawRow(source.label, place.row, fields) for fields in _dataset_rows(source, place))
    else:
        rows = _file_rows(source_files(source), name_columns)
    return itertools.islice(rows, source.limit_rows)


def files_to_read(source: Source) -> list[SourceFile]:
    """Return the files of `source` in the order in which they are read; a dataset is one, of kind DATASET_FILE.

    Raises:
        DataError: the source cannot be read.
    """
    check_source(source)
    if place_kind(source) == "prepared corpus":
        raise DataError(f"{source.label}: a prepared corpus is read from its shards as it is; remove streaming.")
    if place_kind(source) in ("saved dataset", "hub dataset"):
        return [SourceFile(Path(source.path), source.label, DATASET_FILE, "")]
    return source_files(source)


def read_file(source: Source, file: SourceFile, place: ReadingPlace) -> Iterator[RawRow]:
    """Return an iterator over the rows of one of `files_to_read` from `place` on, which moves behind each row.

    Raises:
        DataError: as `read_source`.
    """
    rows = _dataset_rows(source, place) if file.kind == DATASET_FILE else read_rows(file, None, place)
    return (RawRow(file.label, place.row, fields) for fields in rows)


def source_features(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Return (file, features by column) as `datasets` knows them, of a dataset or of each .parquet file of a source.

    Raises:
        DataError: the source cannot be read.
    """
    check_source(source)
    if place_kind(source) in ("saved dataset", "hub dataset"):
        return [(source.label, _load_dataset(source).features.to_dict())]
    return [(file.label, read_features(file)) for file in source_files(source) if file.kind == ".parquet"]


def source_identity(source: Source) -> list[tuple[str, str]]:
    """Identify the whole content of `source`: return (name, hash) of each of its files in order, or of the dataset.

    Raises:
        DataError: the source cannot be read.
    """
    check_source(source)
    if place_kind(source) == "prepared corpus":
        return [(source.label, read_manifest(Path(source.path))["fingerprint"])]
    if place_kind(source) == "hub dataset":
        return [(source.label, _load_dataset(source)._fingerprint)]
    return [(file.label, _file_identity(file)) for file in source_files(source)]


def _file_identity(file: SourceFile) -> str:
    return data_fingerprint(file.path, *([] if file.sample_by == "line" else [file.sample_by]))


def check_source(source: Source) -> None:
    """Check that a source can be read.

    Raises:
        DataError: it does not exist or is of an unknown kind.
    """
    problem = _find_problem(source)
    if problem:
        raise DataError(f"{problem}.")


def _find_problem(source: Source) -> str | None:
    """Return the problem of a source as a sentence without full stop, or None."""
    path, place = source.path, place_kind(source)
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
    if place == "prepared corpus":
        return corpus_problem(Path(path))
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
    names = matching_files(source)
    dangling = next((name for name in matching_names(source) if is_readable(name) and not is_there(name)), None)
    if dangling:
        return f"{source.path}: its file {dangling} {missing_reason(dangling)}; repair or remove it"
    if not any(map(is_readable, names)):
        verb = "matches" if place_kind(source) == "glob" else "is a folder and holds"
        return f"{source.path} {verb} no file that can be read; name {ALLOWED_SOURCES}"

    # The .json files of a saved dataset inside would be read as rows.
    saved = next(filter(is_saved_dataset, sorted({Path(name).parent for name in names})), None)
    if saved:
        return f"{source.path} holds the saved dataset {saved}; name each saved dataset by itself"
    choice = choose_split(source)
    return f"{source.path} {choice}" if isinstance(choice, str) else None


def source_files(source: Source) -> list[SourceFile]:
    """Return the files of a source in the order in which they are read; none of a hub dataset or a prepared corpus."""
    place, path = place_kind(source), Path(source.path)
    if place == "standard input":
        return [SourceFile(spool_standard_input(), place, ".jsonl", "")]
    if place == "file":
        return [_named_file(source, source.path)]
    if place == "saved dataset":
        folder = path if is_saved_dataset(path) else path / source.split
        return [SourceFile(file, str(file), "", "") for file in sorted(folder.iterdir()) if file.is_file()]
    if place in ("hub dataset", "prepared corpus"):
        return []
    choice = choose_split(source)
    assert isinstance(choice, SplitChoice)  # `check_source` has found a choice
    return [_named_file(source, name) for name in choice.files]


def _named_file(source: Source, name: str) -> SourceFile:
    file = SourceFile(Path(name), name, *file_kind(name))
    return file._replace(sample_by=source.sample_by or "line") if file.kind == ".txt" else file


def _file_rows(files: list[SourceFile], name_columns: NameColumns | None) -> Iterator[RawRow]:
    for file in files:
        for number, fields in enumerate(read_rows(file, name_columns), 1):
            yield RawRow(file.label, number, fields)


def _dataset_rows(source: Source, place: ReadingPlace) -> Iterator[dict[str, Any]]:
    dataset = _load_dataset(source).with_format("arrow")
    if not len(dataset):
        raise DataError(f"{source.label}: the dataset has no rows.")
    left = range(place.offset, len(dataset))
    for table in dataset.select(left).iter(ROWS_PER_BATCH) if left else ():
        for fields in plain_values(table):
            place.offset, place.row = place.offset + 1, place.row + 1
            yield fields


def _load_dataset(source: Source) -> Any:
    """Load a memory-mapped `datasets.Dataset`.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets import (
        load_from_disk,
    )  # imported here, because the import takes a second and plain files do not need it

    path, on_hub = Path(source.path), place_kind(source) == "hub dataset"
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
