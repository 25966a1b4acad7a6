"""The number of rows that a bar counts to is the number that is read, or unknown."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accel_llm.data.row_counts import expected_rows
from accel_llm.data.sources import as_source, read_source

LINES = [json.dumps({"text": f"row {k}\nof two lines"}) for k in range(7)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES), encoding="utf-8")  # the last line has no line break
    (tmp_path / "b.txt").write_text("one\r\ntwo\r\n", encoding="utf-8", newline="")
    pq.write_table(pa.table({"text": ["x"] * 5}), tmp_path / "c.parquet")
    return tmp_path


@pytest.mark.parametrize("name, rows", [("a.jsonl", 7), ("b.txt", 2), ("c.parquet", 5), ("", 14)])
def test_the_rows_of_files_and_folders(folder, name, rows):
    source = as_source(str(folder / name))
    assert expected_rows([source]) == rows == sum(1 for _ in read_source(source))
    assert expected_rows([source, source.model_copy(update={"limit_rows": 1})]) == rows + 1


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz"])
def test_what_must_be_parsed_to_be_counted_is_unknown(folder, name):
    content = {"a.json": json.dumps([{"text": "x"}]), "a.csv": "text\nx\n", "a.jsonl.gz": "\n".join(LINES)}[name]
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(content.encode()))
    else:
        (folder / name).write_text(content, encoding="utf-8")
    assert expected_rows([as_source(str(folder / name))]) is None
    assert expected_rows([as_source(str(folder / "a.jsonl")), as_source(str(folder / name))]) is None


def test_a_broken_file_is_left_to_its_reader(folder):
    (folder / "c.parquet").write_bytes(b"no parquet")
    assert expected_rows([as_source(str(folder / "c.parquet"))]) is None
