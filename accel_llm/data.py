"""Rows from files, and encoded rows in flat arrays that live in a cache."""

import hashlib
import json
import os
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
    """One sentence for each file that is not there, before anything is read."""
    found = [] if options.train_files else ["train_files: is missing; name at least one .json, .jsonl or .txt file."]
    for field in ("train_files", "eval_files"):
        for name in getattr(options, field):
            if not Path(name).is_file():
                found.append(
                    f"{field}: {name} {'is a folder' if Path(name).is_dir() else 'does not exist'}; name a .json, .jsonl or .txt file."
                )
    return found


def read_rows(files: list[str], limit: int | None = None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (file, row number from 1, row) from .json (a list of objects), .jsonl and .txt (a document a line).

    Raises:
        DataError: a file that is empty, broken (with its line) or of another kind.
    """
    for name in files:
        path = Path(name)
        readers: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
            ".json": _read_json,
            ".jsonl": _read_jsonl,
            ".txt": _read_text,
        }
        if path.suffix not in readers:
            raise DataError(
                f"{name}: files of kind {path.suffix or '(none)'!r} are not read; allowed: {', '.join(readers)}."
            )
        count = 0
        for count, row in enumerate(readers[path.suffix](path), 1):
            if limit is not None and count > limit:
                break
            yield name, count, row
        if count == 0:
            raise DataError(f"{name}: the file has no rows.")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # Objects one a line under the name .json are common.
            yield from _read_jsonl(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; a list of objects, or one object a line, is needed.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: is a {type(row).__name__}, must be an object.")
        yield row


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error.msg}).") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: is a {type(row).__name__}, must be an object.")
                yield row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from None


def _read_text(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for line in lines:
                if line.strip():
                    yield {"text": line.rstrip("\n")}
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from None


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
            partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
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
