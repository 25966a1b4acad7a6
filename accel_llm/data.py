"""Rows from files, and encoded rows in flat arrays that live in a cache."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from accel_llm.errors import DataError
from accel_llm.options import DataOptions


def problems(options: DataOptions) -> list[str]:
    """One sentence for each file that is not there or of another kind, before anything is read."""
    found = [] if options.train_files else ["train_files: is missing; name at least one .json, .jsonl or .txt file."]
    for field in ("train_files", "eval_files"):
        for name in getattr(options, field):
            path = Path(name)
            if not path.is_file():
                wrong = "is a folder" if path.is_dir() else "does not exist"
            elif path.suffix not in READERS:
                wrong = f"is of kind {path.suffix or '(none)'!r}"
            else:
                continue
            found.append(f"{field}: {name} {wrong}; name a .json, .jsonl or .txt file.")
    return found


def read_rows(files: list[str], limit: int | None = None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (file, row number from 1, row) from .json (a list of objects), .jsonl and .txt (a document a line).

    `limit` is the number of rows from all files together; files behind the last of them are not opened.

    Raises:
        DataError: a file that is empty, broken (with its line) or of another kind.
    """
    left = limit
    for name in files:
        path = Path(name)
        if path.suffix not in READERS:
            raise DataError(
                f"{name}: files of kind {path.suffix or '(none)'!r} are not read; allowed: {', '.join(READERS)}."
            )
        count = 0
        for count, row in enumerate(itertools.islice(READERS[path.suffix](path), left), 1):
            yield name, count, row
        if count == 0:
            raise DataError(f"{name}: the file has no rows.")
        if left is not None:
            left -= count
            if left == 0:
                return


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(Line number from 1, line) of every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {number}: not UTF-8 text.") from None
            if text.strip():
                yield number, text.rstrip("\r\n")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text.") from None
    if not text or text.isspace():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[0] == "{":
            # Objects one a line under the name .json are common.
            yield from _read_jsonl(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    # One object is a file of one line.
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; a list of objects, or one object a line, is needed.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: is a {type(row).__name__}, must be an object.")
        yield row


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}).") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: is a {type(row).__name__}, must be an object.")
        yield row


def _read_text(path: Path) -> Iterator[dict[str, Any]]:
    for _, line in _lines(path):
        yield {"text": line}


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
}


@dataclass(frozen=True)
class Rows:
    """Encoded rows in flat arrays, memory-mapped from the cache: row k is tokens `offsets[k]:offsets[k + 1]`."""

    input_ids: np.ndarray  # int32 [tokens]
    labels: np.ndarray  # int32 [tokens], -100 where not trained, unshifted
    offsets: np.ndarray  # int64 [rows + 1]
    source: np.ndarray  # int64 [rows], the row number in its file (from 1), for messages

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(int(self.offsets[k]), int(self.offsets[k + 1]))
        return self.input_ids[part], self.labels[part]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


ARRAYS = ("input_ids", "labels", "offsets", "source")


def build_rows(encoded: Iterator[tuple[int, list[int], list[int]]]) -> Rows:
    """Collect (row number, input ids, labels) into flat arrays."""
    ids, labels, lengths, source = [], [], [0], []
    for number, row_ids, row_labels in encoded:
        ids.append(np.asarray(row_ids, dtype=np.int32))
        labels.append(np.asarray(row_labels, dtype=np.int32))
        lengths.append(len(row_ids))
        source.append(number)
    empty = [np.zeros(0, np.int32)]
    return Rows(
        np.concatenate(ids or empty),
        np.concatenate(labels or empty),
        np.cumsum(lengths, dtype=np.int64),
        np.asarray(source, dtype=np.int64),
    )


def cache_folder(options: DataOptions) -> Path:
    return Path(options.cache_dir or Path(HF_HOME) / "accel_llm").expanduser()


def cached(
    folder: Path, build: Callable[[], tuple[dict[str, Rows], dict[str, Any]]]
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """The parts (train, eval) and facts that `build` makes, kept in `folder`.

    The first process to come builds; others wait on a file lock, never in a collective that could time out. The folder
    appears by one rename, so a killed build leaves no broken cache.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            parts, facts = build()
            partial = folder.with_name(f"{folder.name}.partial")
            # What a killed build left; the lock is ours, so nobody is writing there.
            shutil.rmtree(partial, ignore_errors=True)
            for name, rows in parts.items():
                (partial / name).mkdir(parents=True)
                for array in ARRAYS:
                    np.save(partial / name / f"{array}.npy", getattr(rows, array))
            (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            partial.rename(folder)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    parts = {
        part.name: Rows(*(np.load(part / f"{array}.npy", mmap_mode="r") for array in ARRAYS))
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    return parts, facts


def fingerprint(*parts: object) -> str:
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
