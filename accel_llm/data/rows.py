"""Encoded rows in flat arrays that are written as they come and read from a cache, memory-mapped."""

import json
import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from accel_llm.config.options import DataOptions
from accel_llm.system.folders import whole_folder

# The arrays of a part (train, eval), each a file of plain numbers: their C type, as `array` and NumPy name it.
ARRAYS = {"input_ids": "i", "labels": "i", "weights": "f", "lengths": "i", "number": "q", "origin": "i", "digest": "Q"}


class Origin(NamedTuple):
    """Where a row was read: its file, and which of the run's sources that belongs to (-1: an evaluation source)."""

    source: int
    file: str


@dataclass
class RowPart:
    """Encoded rows, one after the other; row k has `lengths[k]` tokens. `weights` is empty where every label counts 1."""

    input_ids: array = field(default_factory=lambda: array("i"))
    labels: array = field(default_factory=lambda: array("i"))
    weights: array = field(default_factory=lambda: array("f"))
    lengths: array = field(default_factory=lambda: array("i"))
    number: array = field(default_factory=lambda: array("q"))  # of the row in its file, from 1
    origin: array = field(default_factory=lambda: array("i"))
    digest: array = field(default_factory=lambda: array("Q"))  # of the whole row's ids, to find rows that are shared

    def add(
        self,
        input_ids: array,
        labels: array,
        weights: list[float] | None,
        number: int,
        origin: int,
        digest: int,
    ) -> None:
        if weights is not None and not self.weights:
            self.weights.extend([1.0] * len(self.labels))
        if weights is not None or self.weights:
            self.weights.extend(weights or [1.0] * len(labels))
        self.input_ids.extend(input_ids)
        self.labels.extend(labels)
        self.lengths.append(len(input_ids))
        self.number.append(number)
        self.origin.append(origin)
        self.digest.append(digest)


class RowWriter:
    """Appends parts to the files of one folder, so that no more than a part is ever in memory."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._tokens = self._weighted = 0

    def add(self, part: RowPart) -> None:
        weights = part.weights
        if weights and not self._weighted:
            np.ones(self._tokens, np.float32).tofile(self._files["weights"])
        if not weights and self._weighted:
            weights = array("f", [1.0]) * len(part.labels)
        self._weighted += len(weights)
        self._tokens += len(part.labels)
        for name, file in self._files.items():
            (weights if name == "weights" else getattr(part, name)).tofile(file)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        """Everything is on the disk after this: a cache that is there is whole."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


@dataclass(frozen=True)
class Rows:
    """Encoded rows in flat arrays, memory-mapped from the cache: row k is tokens `offsets[k]:offsets[k + 1]`."""

    input_ids: np.ndarray  # int32 [tokens]
    labels: np.ndarray  # int32 [tokens], -100 where not trained, unshifted
    offsets: np.ndarray  # int64 [rows + 1]
    number: np.ndarray  # int64 [rows], the row's number in its file (from 1), for messages
    origin: np.ndarray  # int32 [rows], index of `origins`
    digest: np.ndarray  # uint64 [rows], equal where the ids of the rows are
    weights: np.ndarray | None  # float32 [tokens], how much each label counts; None where each counts 1
    origins: tuple[Origin, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(int(self.offsets[k]), int(self.offsets[k + 1]))
        return self.input_ids[part], self.labels[part]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def source(self) -> np.ndarray:
        """int64 [rows]: which of the run's sources each row came from."""
        return np.array([origin.source for origin in self.origins], np.int64)[self.origin]

    def weights_of(self, chosen: list[int]) -> list[np.ndarray] | None:
        """How much each label of the chosen rows counts, float32 [tokens] for each; None where each counts 1."""
        if self.weights is None or not chosen:
            return None
        return [self.weights[int(self.offsets[k]) : int(self.offsets[k + 1])] for k in chosen]

    def name(self, k: int) -> str:
        return f"{self.origins[self.origin[k]].file}, row {self.number[k]}"


def load_rows(folder: Path, origins: Iterable[tuple[int, str]]) -> Rows:
    """The rows that a `Writer` wrote in `folder`."""
    arrays = {name: _mapped(folder / f"{name}.bin", kind) for name, kind in ARRAYS.items()}
    offsets = np.concatenate([[0], np.cumsum(arrays.pop("lengths"), dtype=np.int64)])
    weights = arrays.pop("weights")
    named = tuple(Origin(source, file) for source, file in origins)
    return Rows(**arrays, offsets=offsets, weights=weights if len(weights) else None, origins=named)


def _mapped(path: Path, kind: str) -> np.ndarray:
    # NumPy cannot map an empty file.
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


def cache_folder(options: DataOptions) -> Path:
    return Path(options.cache_dir or Path(HF_HOME) / "accel_llm").expanduser()


def cached_rows(folder: Path, build: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Rows], dict[str, Any]]:
    """The parts (train, eval) that `build` writes into the folder it is given, and the facts that it returns.

    The first process to come builds; others wait on a file lock, never in a collective that could time out. The folder
    appears by one rename, so a killed build leaves no broken cache.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                facts = build(partial)
                (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    parts = {part.name: load_rows(part, facts["origins"]) for part in sorted(folder.iterdir()) if part.is_dir()}
    return parts, facts
