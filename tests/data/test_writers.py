"""Rows that are written are the rows that pandas' and pyarrow's own readers, and ours, read."""

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from accel_llm.config.fields import Source
from accel_llm.data.sources import read_source
from accel_llm.data.writers import write_rows

ROWS: list[dict[str, Any]] = [
    {"id": 1, "text": 'a "quoted", long\nline', "turns": [{"role": "user", "content": "é 日本"}]},
    {"id": 2, "text": "", "turns": [], "score": 0.5},
    {"id": 3, "text": None, "turns": [{"role": "user", "content": "x"}], "more": True},
]
COLUMNS = ["id", "text", "turns", "score", "more"]


def written(path: Path, rows: list[dict[str, Any]] = ROWS, columns: list[str] = COLUMNS) -> Path:
    write_rows(path, lambda: iter(rows), columns)
    assert [place.name for place in path.parent.iterdir()] == [path.name]
    return path


def test_jsonl_holds_each_row_as_it_is(tmp_path):
    path = written(tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == ROWS
    assert [list(row.fields) for row in read_source(Source(path=str(path)))] == [list(row) for row in ROWS]


def test_csv_has_all_columns_and_other_values_as_json(tmp_path):
    path = written(tmp_path / "rows.csv")
    with path.open(encoding="utf-8", newline="") as file:
        header, *cells = csv.reader(file)
    assert header == COLUMNS
    assert cells[0] == ["1", ROWS[0]["text"], json.dumps(ROWS[0]["turns"], ensure_ascii=False), "", ""]
    assert cells[2][2:] == ['[{"role": "user", "content": "x"}]', "", "true"]
    read = [row.fields for row in read_source(Source(path=str(path)))]
    assert [row["text"] for row in read] == [ROWS[0]["text"], None, None]


def test_parquet_keeps_types(tmp_path):
    path = written(tmp_path / "rows.parquet")
    assert pq.read_table(path).to_pylist() == [{name: row.get(name) for name in COLUMNS} for row in ROWS]
    assert [str(kind) for kind in pq.read_schema(path).types][0::3] == ["int64", "double"]


def test_parquet_of_more_than_one_group_and_of_mixed_values(tmp_path):
    rows: list[dict[str, Any]] = [{"n": k, "mixed": k, "empty": {}} for k in range(2000)]
    rows += [{"n": 0.5, "mixed": "text", "when": datetime.date(2026, 1, 2), "half": "\ud83d"}]
    table = pq.read_table(written(tmp_path / "rows.parquet", rows, ["n", "mixed", "empty", "when", "half"])).to_pylist()
    assert [row["n"] for row in table] == [row["n"] for row in rows]
    assert table[7]["mixed"] == "7" and table[-1]["mixed"] == "text" and table[0]["empty"] == "{}"
    assert table[-1]["when"] == datetime.date(2026, 1, 2) and table[-1]["half"] == "\\ud83d"


def test_what_json_has_no_type_for_is_text(tmp_path):
    row = {"when": datetime.datetime(2026, 1, 2, 3), "bytes": b"\x00\xff", "half": "\ud83d"}
    path = written(tmp_path / "rows.jsonl", [row], [*row])
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "when": "2026-01-02T03:00:00",
        "bytes": "AP8=",
        "half": "\ud83d",
    }


def test_a_failure_leaves_nothing_behind(tmp_path):
    def rows():
        yield ROWS[0]
        raise RuntimeError

    for kind in ("jsonl", "csv", "parquet"):
        with pytest.raises(RuntimeError):
            write_rows(tmp_path / f"rows.{kind}", rows, COLUMNS)
    assert list(tmp_path.iterdir()) == []
