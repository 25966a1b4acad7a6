"""Write rows to a .jsonl, .csv or .parquet file, whole or not at all; the rows may be more than memory holds."""

import base64
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import date, time
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from accel_llm.system.disk import atomic_file

Row = dict[str, Any]

_ROWS_PER_GROUP = 1024  # rows of a .parquet file that are in memory together
# What pyarrow raises for values of several types in one column, or such as it has no type for.
_MIXED = (ValueError, TypeError, OverflowError)


def write_rows(path: Path, rows: Callable[[], Iterable[Row]], columns: list[str]) -> None:
    """Write the rows that each call of `rows` gives; `path` ends with a key of WRITERS. It appears at the end.

    `columns` names all columns of all rows in their order. In .jsonl a row has the columns that it has. In .csv and
    .parquet each has all of them, and one that it lacks is empty; in .csv a value that is no text is written as JSON,
    in .parquet only in a column with values of several types.
    """
    with atomic_file(path) as file:
        WRITERS[path.suffix.lower()](file, rows, columns)


def _write_jsonl(file: BinaryIO, rows: Callable[[], Iterable[Row]], columns: list[str]) -> None:
    for row in rows():
        file.write(_to_json(row).encode(errors="backslashreplace") + b"\n")


def _write_csv(file: BinaryIO, rows: Callable[[], Iterable[Row]], columns: list[str]) -> None:
    # Half a surrogate pair, which UTF-8 cannot hold, becomes its escape.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows():
        writer.writerow([_to_text(row.get(name)) for name in columns])
    text.detach()


def _write_parquet(file: BinaryIO, rows: Callable[[], Iterable[Row]], columns: list[str]) -> None:
    kinds: dict[str, pa.DataType] = dict.fromkeys(columns, pa.null())
    mixed: set[str] = set()
    for group in _groups(rows()):
        for name in columns:
            if name not in mixed:
                try:
                    kinds[name] = _join_types(kinds[name], pa.array([row.get(name) for row in group]).type)
                except _MIXED:
                    mixed.add(name)
                    kinds[name] = pa.string()
    schema = pa.schema([(name, kinds[name]) for name in columns])
    with pq.ParquetWriter(file, schema) as writer:
        for group in _groups(rows()):
            arrays = []
            for name in columns:
                values = [row.get(name) for row in group]
                texts = [None if value is None else _to_text(value) for value in values] if name in mixed else values
                arrays.append(pa.array(texts, kinds[name]))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
        yield group


def _join_types(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the type that holds values of both.

    Raises:
        ValueError, TypeError: there is none, or .parquet cannot hold it.
    """
    schemas = [pa.schema([("", kind)]) for kind in (first, second)]
    joined = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    if "struct<>" in str(joined):
        raise TypeError("an object without keys")
    return joined


def _to_text(value: Any) -> str:
    """Return a text as it is, nothing as the empty text, and any other value as JSON."""
    if value is None:
        return ""
    if isinstance(value, bytes | date | time):
        value = _plain(value)
    text = value if isinstance(value, str) else _to_json(value)
    return text.encode(errors="backslashreplace").decode()


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    """Return what JSON has no type for, such as times and bytes of a .parquet file, as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if isinstance(value, date | time) else str(value)
