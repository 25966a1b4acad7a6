"""Encoded rows are read as they were written; the cache is built once, whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_llm.config.data_options import DataOptions
from accel_llm.data.rows import ARRAYS, Origin, RowPart, RowWriter, cache_folder, cached_rows, load_rows
from accel_llm.errors import DataError

Row = tuple[int, list[int], list[int]]
ENCODED: list[Row] = [(1, [5, 6, 7], [-100, 6, 7]), (4, [8], [-100]), (9, [2, 3], [-100, 3])]


# The arrays that all rows have.
NEEDED = [
    name
    for name in ARRAYS
    if name not in ("weights", "lengths", "shared", "label", "margin", "targets", "second_start")
]


def make_part(encoded: list[Row], weights: list[float] | None = None) -> RowPart:
    part = RowPart()
    for number, ids, labels in encoded:
        part.add(array("i", ids), array("i", labels), weights and weights[: len(ids)], number, number % 2, 100 + number)
    return part


def write_parts(folder: Path, *parts: RowPart) -> Path:
    with RowWriter(folder) as writer:
        for some in parts:
            writer.add(some)
    return folder


def test_rows_lie_flat_and_come_back_one_by_one(tmp_path):
    rows = load_rows(write_parts(tmp_path / "a", make_part(ENCODED[:2]), make_part(ENCODED[2:])), [(0, "a"), (3, "b")])
    assert len(rows) == 3 and rows.weights is None and rows.label_weights([0]) is None
    assert rows.input_ids.tolist() == [5, 6, 7, 8, 2, 3] and rows.labels.tolist() == [-100, 6, 7, -100, -100, 3]
    assert rows.offsets.tolist() == [0, 3, 4, 6] and rows.lengths.tolist() == [3, 1, 2]
    assert rows.number.tolist() == [1, 4, 9] and rows.digest.tolist() == [101, 104, 109]
    assert rows.origins == (Origin(0, "a"), Origin(3, "b")) and rows.source.tolist() == [3, 0, 3]
    assert rows.name(1) == "a, row 4" and rows.name(2) == "b, row 9"
    assert [[part.tolist() for part in rows[k]] for k in range(3)] == [[ids, labels] for _, ids, labels in ENCODED]
    assert isinstance(rows.input_ids, np.memmap) and not rows.input_ids.flags.writeable
    assert {name: str(getattr(rows, name).dtype) for name in NEEDED} == {
        "input_ids": "int32", "labels": "int32", "number": "int64", "origin": "int32", "digest": "uint64",
    }  # fmt: skip


@pytest.mark.parametrize("order", ["first", "middle", "last"])
def test_missing_weights_are_one(tmp_path, order):
    weighted, plain = make_part(ENCODED[2:], [0.5, 0.25]), make_part(ENCODED[:2])
    parts = {"first": [weighted, plain], "middle": [plain, weighted, plain], "last": [plain, weighted]}[order]
    rows = load_rows(write_parts(tmp_path / order, *parts), [(0, "a"), (1, "b")])
    assert rows.weights is not None and rows.weights.dtype == np.float32
    expected = [0.5, 0.25] if order == "first" else [1.0] * 4 + [0.5, 0.25]
    assert rows.weights.tolist() == expected + [1.0] * (len(rows.labels) - len(expected))
    (weights,) = rows.label_weights([0 if order == "first" else 2]) or []
    assert weights.tolist() == [0.5, 0.25]


def test_a_part_may_hold_rows_with_and_without_weights(tmp_path):
    part = make_part(ENCODED[:1])
    part.add(array("i", [4, 4]), array("i", [-100, 4]), [2.0, 3.0], 2, 0, 0)
    part.add(array("i", [5]), array("i", [-100]), None, 3, 0, 0)
    assert part.weights.tolist() == [1.0, 1.0, 1.0, 2.0, 3.0, 1.0]


class Builder:
    """Counts how often it builds."""

    def __init__(self, encoded: list[Row], seconds: float = 0):
        self.encoded, self.seconds, self.calls = encoded, seconds, 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        time.sleep(self.seconds)
        write_parts(folder / "train", make_part(self.encoded))
        write_parts(folder / "eval", make_part(self.encoded[:1]))
        return {"rows": len(self.encoded), "origins": [[0, "a"], [1, "b"]]}


def test_the_cache_is_built_once(tmp_path):
    build = Builder(ENCODED)
    for _ in range(2):
        parts, facts = cached_rows(tmp_path / "c" / "key", build)
        assert facts["rows"] == 3 and parts.keys() == {"train", "eval"}
        assert parts["train"].input_ids.tolist() == [5, 6, 7, 8, 2, 3] and parts["eval"].number.tolist() == [1]
    assert build.calls == 1


def test_another_key_has_a_cache_of_its_own(tmp_path):
    first, second = Builder(ENCODED), Builder(ENCODED[:2])
    assert cached_rows(tmp_path / "a", first)[1]["rows"] == 3
    assert cached_rows(tmp_path / "b", second)[1]["rows"] == 2
    assert cached_rows(tmp_path / "a", second)[1]["rows"] == 3
    assert (first.calls, second.calls) == (1, 1)


def test_parts_without_rows_survive(tmp_path):
    parts, _ = cached_rows(tmp_path / "a", Builder([]))
    assert len(parts["train"]) == 0 and parts["train"].lengths.tolist() == [] and parts["train"].source.tolist() == []


@pytest.mark.parametrize("error", [DataError("broken row"), KeyboardInterrupt()])
def test_a_failed_build_leaves_no_cache(tmp_path, error):
    def build(folder: Path) -> dict[str, Any]:
        write_parts(folder / "train", make_part(ENCODED))
        raise error

    with pytest.raises(type(error)):
        cached_rows(tmp_path / "key", build)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert cached_rows(tmp_path / "key", Builder(ENCODED))[1]["rows"] == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from accel_llm.data.rows import RowWriter, cached_rows
def build(folder):
    RowWriter(folder / "train")
    os.kill(os.getpid(), signal.SIGKILL)
cached_rows(Path(sys.argv[1]), build)
"""


def test_a_build_that_is_killed_is_built_again(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "key")], env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL
    left = tmp_path / ".key.partial"
    assert not (tmp_path / "key").exists() and (left / "train" / "labels.bin").is_file()
    parts, facts = cached_rows(tmp_path / "key", Builder(ENCODED))
    assert facts["rows"] == 3 and parts.keys() == {"train", "eval"} and not left.exists()


def test_threads_that_start_together_build_once(tmp_path):
    build, results = Builder(ENCODED, seconds=0.2), []
    threads = [threading.Thread(target=lambda: results.append(cached_rows(tmp_path / "key", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    assert [parts["train"].input_ids.tolist() for parts, _ in results] == [[5, 6, 7, 8, 2, 3]] * 4


def test_cache_folder_follows_cache_dir(tmp_path):
    assert cache_folder(DataOptions(cache_dir=str(tmp_path))) == tmp_path
    assert cache_folder(DataOptions(cache_dir="~/c")) == Path.home() / "c"
    assert cache_folder(DataOptions()).name == "accel_llm"
