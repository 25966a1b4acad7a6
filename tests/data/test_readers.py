"""Rows of each kind of file, the lines that errors name, and the memory that reading takes."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accel_llm.data import readers
from accel_llm.data.file_lines import SourceFile, file_kind
from accel_llm.data.readers import READERS, read_rows
from accel_llm.errors import DataError

A, B, C = {"text": "é"}, {"text": "b", "n": 1}, {"text": "\u2028c"}
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in (A, B, C))


def write_file(folder: Path, name: str, content: str | bytes) -> SourceFile:
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return SourceFile(path, name, *file_kind(name))


def rows_in(folder: Path, name: str, content: str | bytes) -> list[dict[str, Any]]:
    return list(read_rows(write_file(folder, name, content)))


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("list.json", json.dumps([A, B, C])),
        ("pretty.json", json.dumps([A, B, C], indent=2)),
        ("lines.json", LINES),
        ("lines.jsonl", LINES),
        ("lines.ndjson", LINES),
        ("capitals.JSONL", LINES),
        ("ends.jsonl", LINES + "\n"),
        ("blank.jsonl", "\n  \n" + LINES.replace("\n", "\n\n \t\n") + "\n\n"),
        ("blank.json", "\n" + LINES.replace("\n", "\n\n")),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps([A, B, C]).encode()),
        ("bom_lines.json", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("windows.jsonl", LINES.replace("\n", "\r\n")),
    ],
)
def test_every_kind_of_json_gives_the_same_rows(tmp_path, name, content, packing):
    assert rows_in(tmp_path, name + packing, content) == [A, B, C]


@pytest.mark.parametrize("name", ["one.json", "one.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_object_is_a_file_of_one_row(tmp_path, name, indent):
    file = write_file(tmp_path, name, json.dumps(B, indent=indent))
    if name == "one.jsonl" and indent:
        with pytest.raises(DataError, match=r"^one\.jsonl, line 1: not JSON"):
            list(read_rows(file))
    else:
        assert list(read_rows(file)) == [B]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_each_line_of_a_text_file_is_a_document(tmp_path, packing):
    content = b"\xef\xbb\xbf first \r\n\n\t\nsecond\xe2\x80\xa8still second\nlast"
    assert rows_in(tmp_path, "a.txt" + packing, content) == [
        {"text": " first "},
        {"text": "second\u2028still second"},
        {"text": "last"},
    ]


TABLE = [
    {"system": None, "query": '说 "hi", ok', "response": "3.3"},
    {"system": "00000", "query": "two\nlines\r\nand three", "response": " 1e5 "},
    {"system": None, "query": None, "response": None},
    {"system": "NaN", "query": "null", "response": "\u2028a\tb"},
]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name, delimiter", [("t.csv", ","), ("t.tsv", "\t")])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_of_a_table_are_text_and_empty_cells_are_none(tmp_path, name, delimiter, start, end, packing):
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter, lineterminator=end)
    table.writerow(["system", " query", "response "])
    table.writerows([row.values() for row in TABLE])
    assert rows_in(tmp_path, name + packing, start + text.getvalue() + end) == TABLE


def test_one_column_keeps_its_empty_cells_but_not_its_blank_lines(tmp_path):
    assert rows_in(tmp_path, "a.csv", 'text\nx\n\n""\n  \ny') == [{"text": "x"}, {"text": None}, {"text": "y"}]


def test_a_column_without_a_name_is_an_index(tmp_path):
    assert rows_in(tmp_path, "a.csv", ",text\n0,x\n") == [{"": "0", "text": "x"}]


def test_a_cell_may_be_large(tmp_path):
    large = "x" * 200_000  # csv's own limit is 131,072
    assert rows_in(tmp_path, "a.csv", f"text\n{large}\n") == [{"text": large}]


PARQUET = [
    {"text": "é", "n": 1, "m": [{"role": "user", "content": None}]},
    {"text": None, "n": None, "m": []},
    {"text": "", "n": -3, "m": None},
]


def test_parquet_gives_python_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS_PER_BATCH", 2)
    pq.write_table(pa.Table.from_pylist(PARQUET), tmp_path / "a.parquet")
    assert list(read_rows(SourceFile(tmp_path / "a.parquet", "a", ".parquet", ""))) == PARQUET


MIXED = [
    {"arguments": {"q": 1}, "calls": [{"name": "f", "with": {"x": 1}}, {"name": "g", "with": [2]}]},
    {"arguments": [1, "é"], "calls": []},
    {"arguments": None, "calls": None},
    {"arguments": "text", "calls": [{"name": "h", "with": None}, None]},
]


def test_columns_of_mixed_types_come_back_as_they_were(tmp_path):
    call = {"name": datasets.Value("string"), "with": datasets.Json()}
    features = datasets.Features({"arguments": datasets.Json(), "calls": datasets.List(call)})
    table = datasets.Dataset.from_list(MIXED, features=features).with_format("arrow")[:]
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read_rows(SourceFile(tmp_path / "a.parquet", "a", ".parquet", ""))) == MIXED
    assert table.to_pylist()[0]["arguments"] == '{"q":1}'  # without the conversion


FAR = b'{"text": "a line among many"}\n' * 1000  # more than the buffer of a reader


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": ', ", line 3: not JSON (Expecting value)."),
        ("a.jsonl", '{"a": 1}\n[1]', ", line 2: is a list, must be an object."),
        ("a.jsonl", '{"a": 1} {"a": 2}', ", line 1: not JSON (Extra data)."),
        ("a.jsonl", FAR + b'{"text": "\xff"}', ", line 1001: not UTF-8 text."),
        ("a.jsonl", '{"text": "é"}'.encode("utf-16"), ", line 1: not UTF-8 text."),
        ("a.json", b"[\n" + FAR.replace(b"\n", b",\n") + b'{"text": "\xff"}]', ", line 1002: not UTF-8 text."),
        ("a.json", '{"a": 1}\n{"a" 2}', ", line 2: not JSON (Expecting ':' delimiter)."),
        ("a.json", '{"a" 1}\n{"a": 2}', ", line 1: not JSON (Expecting ':' delimiter)."),
        ("a.json", '\n[{"a": 1},\n {"a": 2}', ", line 3: not JSON (Expecting ',' delimiter)."),
        ("a.json", '[\n{"a": 1}\n]\nmore', ", line 4: not JSON (Extra data)."),
        ("a.json", '[{"a": 1}, 2]', ", row 2: is a int, must be an object."),
        ("a.json", "3", ": holds one int, must hold a list of objects or one object per line."),
        ("a.txt", b"fine\n" * 5000 + b"caf\xe9", ", line 5001: not UTF-8 text."),
        ("a.csv", b"a,b\n" + b"x,y\n" * 5000 + b"x,caf\xe9\n", ", line 5002: not UTF-8 text."),
        ("a.csv", "a,b\nx,y\n\nx,y,z\n", ", line 4: has 3 cells, must have 2 as the header has (a, b)."),
        ("a.tsv", 'a\tb\n"x\nx"\ty\nx\n', ", line 4: has 1 cells, must have 2 as the header has (a, b)."),
        ("a.csv", 'a,b\nx,"y\nx,y\nx,y\n', ", line 2: not CSV (unexpected end of data)."),
        ("a.csv", 'a,b\nx,y\n"x"z,y\n', ", line 3: not CSV (',' expected after '\"')."),
        ("a.csv", "a,b,a\nx,y,z\n", ", line 1: the header names the column 'a' twice."),
        *((f"a{kind}", blank, ": the file has no rows.") for kind in READERS for blank in ("", "\n \n") if kind != ".parquet"),
        ("a.json", "[]", ": the file has no rows."),
        ("a.csv", "a,b\n", ": the file has no rows."),
        ("a.jsonl", "\ufeff", ": the file has no rows."),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message, packing):
    with pytest.raises(DataError) as error:
        rows_in(tmp_path, name + packing, content)
    assert str(error.value) == name + packing + message


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_CELL_CHARACTERS", 1000)
    read = read_rows(write_file(tmp_path, "a.csv", 'a,b\nx,y\nx,"' + "y\n" * 2000))
    assert next(read) == {"a": "x", "b": "y"}
    with pytest.raises(DataError, match=r"^a\.csv, line 3: not CSV \(field larger than field limit \(1000\)\)\.$"):
        next(read)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_an_incomplete_or_damaged_compressed_file_is_an_error(tmp_path, packing):
    file = write_file(tmp_path, "a.jsonl" + packing, b"".join(b'{"n": %d}\n' % n for n in range(5000)))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + whole)  # concatenated streams are one file
    assert [row["n"] for row in read_rows(file)] == [*range(5000)] * 2
    wrong_sum = [whole[:-8] + bytes(4) + whole[-4:]] if packing == ".gz" else []
    for broken in (whole[:-1], whole[: len(whole) // 2], whole + b"x", LINES.encode(), *wrong_sum):
        file.path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"^a\.jsonl\{packing}: cannot be read \(.+\)\.$"):
            list(read_rows(file))


def test_a_broken_parquet_file_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(PARQUET), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for broken in (b"", b"text\n", whole[:-20], whole[:4] + b"\xff" * 60 + whole[64:]):
        (tmp_path / "a.parquet").write_bytes(broken)
        with pytest.raises(DataError, match=r"^a: not a readable \.parquet file \(.+\)\.$"):
            list(read_rows(SourceFile(tmp_path / "a.parquet", "a", ".parquet", "")))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a: the file has no rows\.$"):
        list(read_rows(SourceFile(tmp_path / "a.parquet", "a", ".parquet", "")))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^a: cannot be read \(No such file or directory\)\.$"):
        list(read_rows(SourceFile(tmp_path / "a.jsonl", "a", ".jsonl", "")))


def test_rows_before_a_broken_line_are_read(tmp_path):
    read = read_rows(write_file(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n{'))
    assert [next(read), next(read)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="line 3"):
        next(read)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.csv.zst"])
def test_a_file_larger_than_memory_is_read_line_by_line(tmp_path, name):
    lines = [json.dumps({"text": f"{n} " + "x" * 2000}) for n in range(4000)]
    if ".csv" in name or ".tsv" in name:
        lines = ["text", *(f"{n} " + "x" * 2000 for n in range(4000))]
    file = write_file(tmp_path, name, "\n".join(lines))  # 8 MB
    tracemalloc.start()
    count = sum(1 for _ in read_rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 1e6


def test_a_parquet_file_larger_than_memory_is_read_page_by_page(tmp_path):
    """One row group of 32 MB that compression and dictionaries cannot shrink."""
    text = [format(n, "064d") * 64 for n in range(8000)]
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "row_group_size": 8000}
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", **options)
    before, most = pa.total_allocated_bytes(), 0
    for n, row in enumerate(read_rows(SourceFile(tmp_path / "a.parquet", "a", ".parquet", ""))):
        assert row["text"] == text[n]
        most = max(most, pa.total_allocated_bytes() - before)
    assert n == 7999 and most < 8e6


DOUBLED = '{"text": "a", "meta": {"k": 1, "k": 2}}'


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("a.jsonl", f'{{"text": "b"}}\n{DOUBLED}\n', "line 2"),
        ("a.ndjson", f"{DOUBLED}\n", "line 1"),
        ("lines.json", f'{{"text": "b"}}\n\n{DOUBLED}\n', "line 3"),
        ("first.json", f'{DOUBLED}\n{{"text": "b"}}', "line 1"),
        ("list.json", f' [\n{{"text": "b"}} ,\n{{"text": "c"}},{DOUBLED}, 5]', "row 3"),
        ("one.json", f'{{"x":\n {DOUBLED}}}', "row 1"),
    ],
)
def test_a_key_twice_in_an_object_is_refused(tmp_path, name, content, place):
    with pytest.raises(DataError) as error:
        rows_in(tmp_path, name, content)
    assert str(error.value) == f"{name}, {place}: found the key 'k' twice in an object; needs each key once."


def test_a_number_that_would_be_infinity_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        rows_in(tmp_path, "a.jsonl", '{"text": "a", "x": 1e400}')
    assert str(error.value) == "a.jsonl, line 1: found the number 1e400; needs at most 1.8e308."
    assert rows_in(tmp_path, "b.jsonl", '{"x": [0.5, 1e300, -2.5E-3, Infinity]}') == [
        {"x": [0.5, 1e300, -2.5e-3, float("inf")]}
    ]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["q"]), pa.array(["r"])], names=["text", "text"]), path)
    with pytest.raises(DataError) as error:
        list(read_rows(SourceFile(path, "a.parquet", ".parquet", "")))
    assert str(error.value) == "a.parquet: has 'text' twice; needs each column once."
    fields = pa.struct([pa.field("role", pa.string()), pa.field("role", pa.string())])
    arrays = [pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["tool"])], fields=list(fields))]
    pq.write_table(pa.table([pa.ListArray.from_arrays([0, 1], arrays[0])], names=["messages"]), path)
    with pytest.raises(DataError) as error:
        list(read_rows(SourceFile(path, "a.parquet", ".parquet", "")))
    assert str(error.value) == "a.parquet: has 'messages.role' twice; needs each column once."
