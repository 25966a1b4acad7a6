"""A sealed corpus: token ids in shards that are memory-mapped, and the arrays that say where its rows are."""

import bisect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel_llm.data.rows import Origin, Rows, StoredPacking
from accel_llm.errors import DataError

CORPUS_MANIFEST, SHARD_FILES = "corpus.json", "shards"  # in the folder of a sealed corpus
PART_LISTS, PIECE_FILES = "parts", "pieces"  # folders in it that sealing reads
CORPUS_FORMAT = 1
# Arrays with a value for each row, as `Rows` has them, and their types. `order` lists the rows in the order of the
# sources; `bins` [packed rows + 1] says where each packed row begins.
INDEX_ARRAYS = {"offsets": "int64", "number": "int64", "origin": "int32", "digest": "uint64", "order": "int64"}
INDEX_ARRAYS |= {"bins": "int64"}


class TokenShards:
    """Token ids of several memory-mapped files as one array, int32 [tokens]; a slice reads no more than it needs."""

    dtype = np.dtype(np.int32)

    def __init__(self, shards: Sequence[np.ndarray], largest: int):
        self.shards, self._largest = [shard for shard in shards if len(shard)], largest
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + len(shard))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        if start >= stop:
            return np.zeros(0, np.int32)
        first = bisect.bisect_right(self._starts, start) - 1
        if stop <= self._starts[first + 1]:  # the usual case: no row crosses a border
            return self.shards[first][start - self._starts[first] : stop - self._starts[first] : step]
        return np.asarray(self)[part]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.shards) if self.shards else np.zeros(0, np.int32)
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def max(self) -> int:
        """Return the largest id, which is known without reading them all."""
        return self._largest


def is_prepared_corpus(folder: Path) -> bool:
    """Tell whether a folder is a corpus of `prepare.py corpus`, sealed or not."""
    return (folder / CORPUS_MANIFEST).is_file() or all((folder / name).is_dir() for name in (PART_LISTS, PIECE_FILES))


def corpus_problem(folder: Path) -> str | None:
    """Return the problem of a prepared corpus as a sentence without full stop, or None."""
    if (folder / CORPUS_MANIFEST).is_file():
        return None
    return f"{folder} holds parts of a corpus that is not sealed yet; run python launch/prepare.py seal {folder}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what is known of a sealed corpus.

    Raises:
        DataError: it is not sealed, or its corpus.json is of another format, or damaged.
    """
    path = folder / CORPUS_MANIFEST
    if problem := corpus_problem(folder):
        raise DataError(f"{problem}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != CORPUS_FORMAT:
            raise DataError(f"{path}: is of format {manifest['format']}; prepare the corpus again.")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the corpus again.") from None


def open_corpus(folder: Path, source: int = 0) -> Rows:
    """Open the rows of a sealed corpus, memory-mapped; `source` is the number of the source in their origins.

    Raises:
        DataError: a file is missing or has another size than it was written with.
    """
    manifest = read_manifest(folder)
    settings = manifest["settings"]
    shards = [_map_array(folder, shard, np.dtype(np.int32)) for shard in manifest["shards"]]
    index: dict[str, Any] = {
        name: _map_array(folder, manifest["index"][name], np.dtype(kind)) for name, kind in INDEX_ARRAYS.items()
    }
    return Rows(
        input_ids=TokenShards(shards, manifest["largest_id"]),  # type: ignore[arg-type]
        labels=None,
        weights=None,
        origins=tuple(Origin(source, file) for file in manifest["files"]),
        stored=StoredPacking(index.pop("bins"), index.pop("order"), settings["max_length"], settings["seed"]),
        **index,
    )


def corpus_rows(folder: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield file, number and fields of each row of a sealed corpus in the order of its sources, as token ids."""
    rows = open_corpus(folder)
    assert rows.stored is not None
    for k in rows.stored.order:
        yield rows.origins[rows.origin[k]].file, int(rows.number[k]), {"input_ids": rows[k][0].tolist()}


def _map_array(folder: Path, entry: dict[str, Any], kind: np.dtype) -> np.ndarray:
    path = folder / SHARD_FILES / entry["name"]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); prepare the corpus again.") from None
    if size != entry["length"] * kind.itemsize:
        raise DataError(
            f"{path}: has {size:,} bytes, must have {entry['length'] * kind.itemsize:,}; copy the corpus again, or "
            "prepare it again."
        )
    return np.memmap(path, kind, "r") if size else np.zeros(0, kind)
