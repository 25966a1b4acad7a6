"""Encoded rows in flat arrays: written to a cache as they come, and read from it memory-mapped."""

import json
import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from accel_llm.chat.targets import IGNORED
from accel_llm.config.data_options import DataOptions
from accel_llm.system.folders import atomic_folder, write_problem
from accel_llm.system.launcher import process_rank

# The arrays of a part (train or eval), each a file of plain numbers, and their type as `array` and NumPy name it.
ARRAYS = {"input_ids": "i", "labels": "i", "weights": "f", "lengths": "i", "number": "q", "origin": "i", "digest": "Q"}
# Those of rows of preferences, empty for others: see `Rows`.
ARRAYS |= {"shared": "i", "label": "b", "margin": "f"}
# Those of texts with labels, empty for others.
ARRAYS |= {"targets": "f", "second_start": "i"}
_OPTIONAL = ("weights", "shared", "label", "margin", "targets", "second_start")


class Origin(NamedTuple):
    """Where rows were read from: the number of the training source (-1, -2, ...: of the evaluation source), and the file."""

    source: int
    file: str


@dataclass
class RowPart:
    """Encoded rows in memory, one after the other; row k has `lengths[k]` tokens."""

    input_ids: array = field(default_factory=lambda: array("i"))
    labels: array = field(default_factory=lambda: array("i"))
    weights: array = field(default_factory=lambda: array("f"))  # empty if every label counts 1
    lengths: array = field(default_factory=lambda: array("i"))
    number: array = field(default_factory=lambda: array("q"))  # the row's number in its file, from 1
    origin: array = field(default_factory=lambda: array("i"))  # number of an Origin
    digest: array = field(default_factory=lambda: array("Q"))  # hash of the ids before any cut, to find equal rows
    shared: array = field(default_factory=lambda: array("i"))
    label: array = field(default_factory=lambda: array("b"))
    margin: array = field(default_factory=lambda: array("f"))
    targets: array = field(default_factory=lambda: array("f"))  # the same number of them for each row
    second_start: array = field(default_factory=lambda: array("i"))

    def add(
        self,
        input_ids: array,
        labels: array,
        weights: list[float] | None,
        number: int,
        origin: int,
        digest: int,
    ) -> None:
        """Append one row. `labels` and `weights` have a value for each of `input_ids`; None: every label counts 1."""
        # The first row with weights adds a 1 for each label of the rows before it.
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
    """Append parts to the files of one folder, so that only one part is in memory at a time."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._tokens = 0  # written so far
        self._weighted_tokens = 0  # written so far to the file of weights

    def add(self, part: RowPart) -> None:
        """Write the rows of `part` after those of the parts before."""
        # The first part with weights adds a 1 for each label of the parts before it.
        weights = part.weights
        if weights and not self._weighted_tokens:
            np.ones(self._tokens, np.float32).tofile(self._files["weights"])
        if not weights and self._weighted_tokens:
            weights = array("f", [1.0]) * len(part.labels)
        self._weighted_tokens += len(weights)
        self._tokens += len(part.labels)
        for name, file in self._files.items():
            (weights if name == "weights" else getattr(part, name)).tofile(file)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        """Force everything to the disk, so that a cache that exists is complete."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


class StoredPacking(NamedTuple):
    """How the rows of a prepared corpus are packed: packed row b has the rows `bins[b]:bins[b + 1]`."""

    bins: np.ndarray  # int64 [packed rows + 1]
    order: np.ndarray  # int64 [rows], the rows in the order of the sources
    capacity: int  # tokens that a packed row may have
    seed: int | None  # with which it was packed; None: several corpora


@dataclass(frozen=True)
class Rows:
    """Encoded rows in flat arrays, memory-mapped from the cache: row k has the tokens `offsets[k]:offsets[k + 1]`.

    `rows[k]` returns (ids, labels) of row k, each int32 [n]. Of preferences, rows 2k and 2k + 1 are the chosen and the
    rejected answer of pair k, with `shared` and `margin`; or each row is an answer with a `label`.

    Of texts with labels no token has a label. Each row has `targets`: one class number or number, or 0 or 1 for each
    class. `second_start` is there if the tokenizer has token types: 0 before that token of the row, 1 from it on.
    """

    input_ids: np.ndarray  # int32 [tokens]
    labels: np.ndarray | None  # int32 [tokens], unshifted, IGNORED where not trained; None: only first tokens are not
    offsets: np.ndarray  # int64 [rows + 1]
    number: np.ndarray  # int64 [rows], the row's number in its file (from 1), for messages
    origin: np.ndarray  # int32 [rows], index into `origins`
    digest: np.ndarray  # uint64 [rows], hash of the ids before any cut, to find equal rows
    weights: np.ndarray | None  # float32 [tokens], how much each label counts; None: every label counts 1
    origins: tuple[Origin, ...]
    shared: np.ndarray | None = None  # int32 [rows], tokens with which both rows of a pair begin, before any label
    margin: np.ndarray | None = None  # float32 [rows], how much better the chosen answer is; 0 if nothing says it
    label: np.ndarray | None = None  # int8 [rows], 1 for a desirable answer, 0 for an undesirable one
    targets: np.ndarray | None = None  # float32 [rows, targets of a row]
    second_start: np.ndarray | None = None  # int32 [rows], where the second text begins; the row's length without one
    problem_type: str | None = None  # what `targets` are: one of `labels.PROBLEM_TYPES`
    class_weights: np.ndarray | None = None  # float64 [classes], how much a text counts by its class; None: 1
    streamed: Any = None  # sources of which these are only the first rows: a `TextSources`, see prepare_stream.py
    reference: np.ndarray | None = None  # float64 [rows], the reference's log-probability of the labels of a row
    stored: "StoredPacking | None" = None  # of a prepared corpus, whose rows stand packed
    rows_per_unit: ClassVar[int] = 1  # rows that stay together in packing and batches

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(int(self.offsets[k]), int(self.offsets[k + 1]))
        if self.labels is not None:
            return self.input_ids[part], self.labels[part]
        labels = np.array(self.input_ids[part])
        labels[:1] = IGNORED
        return self.input_ids[part], labels

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @property
    def trained_tokens(self) -> int:
        """How many tokens have a label."""
        if self.labels is None:
            return int(self.offsets[-1]) - len(self)
        return int((np.asarray(self.labels) != IGNORED).sum())

    @property
    def source(self) -> np.ndarray:
        """The number of each row's training source (-1, -2, ...: evaluation sources), int64 [rows]."""
        return np.array([origin.source for origin in self.origins], np.int64)[self.origin]

    def label_weights(self, indices: list[int]) -> list[np.ndarray] | None:
        """Return for each row of `indices` how much its labels count, float32 [n]; None if every label counts 1."""
        if self.weights is None or not indices:
            return None
        return [self.weights[int(self.offsets[k]) : int(self.offsets[k + 1])] for k in indices]

    def name(self, k: int) -> str:
        """Return file and number of row k, as messages name it."""
        return f"{self.origins[self.origin[k]].file}, row {self.number[k]}"


def load_rows(folder: Path, origins: Iterable[tuple[int, str]]) -> Rows:
    """Load the rows that a `RowWriter` wrote to `folder`; `origins` are pairs (source, file)."""
    arrays = {name: _map_file(folder / f"{name}.bin", kind) for name, kind in ARRAYS.items()}
    return as_rows(arrays, origins)


def as_rows(arrays: dict[str, np.ndarray], origins: Iterable[tuple[int, str]]) -> Rows:
    """Return rows of the arrays of ARRAYS; the optional ones may be empty."""
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])
    columns: dict[str, Any] = {name: values for name, values in arrays.items() if name != "lengths"}
    columns |= {name: None for name in _OPTIONAL if not len(arrays[name])}
    if columns["targets"] is not None:
        columns["targets"] = columns["targets"].reshape(len(arrays["lengths"]), -1)
    return Rows(**columns, offsets=offsets, origins=tuple(Origin(source, file) for source, file in origins))


def _map_file(path: Path, kind: str) -> np.ndarray:
    # NumPy cannot map an empty file.
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)


def cache_folder(options: DataOptions) -> Path:
    """Return the folder that holds all caches: `cache_dir`, or `accel_llm` in the folder of Hugging Face."""
    return Path(options.cache_dir or Path(HF_HOME) / "accel_llm")


def cache_problems(options: DataOptions) -> list[str]:
    """Try to write in the folder of the caches; the main process does it for all. Return a sentence if that fails."""
    folder = cache_folder(options)
    if process_rank() or not (problem := write_problem(folder)):
        return []
    name = "cache_dir" if options.cache_dir else "HF_HOME"
    return [f"{name}: the folder for encoded rows, {folder}, {problem}; set cache_dir to another folder."]


def cached_rows(folder: Path, build: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Load the parts (train, eval) and the facts in `folder`; if it does not exist, `build` makes them first.

    `build` writes the parts into the folder that it gets, and returns the facts. The first process builds. The others
    wait on a file lock, not in a collective operation, which could time out. The folder appears by one rename, so a
    build that is killed leaves no broken cache.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with atomic_folder(folder) as new_folder:
                facts = build(new_folder)
                (new_folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    parts = {part.name: load_rows(part, facts["origins"]) for part in sorted(folder.iterdir()) if part.is_dir()}
    return parts, facts
