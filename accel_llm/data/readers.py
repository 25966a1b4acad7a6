"""One file of any kind -> rows, one by one.

Only a .json list is held in memory whole; everything else may be larger than memory.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from accel_llm.errors import DataError

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
ROWS_AT_ONCE = 256
# A quote that is never closed makes one cell of the rest of the file; so large a cell is that mistake.
LARGEST_CELL = 1 << 27
# Beside what is no JSON: numbers of thousands of digits, and values nested too deep.
READ_ERRORS = (ValueError, RecursionError)


class SourceFile(NamedTuple):
    path: Path
    shown: str  # how a person knows it
    kind: str  # one of READERS
    packing: str  # one of PACKINGS, or nothing


def read_rows(file: SourceFile) -> Iterator[dict[str, Any]]:
    """The rows of one file in their order.

    Cells of .csv and .tsv are text, an empty one is None; a line of .txt is a row with one field `text`.

    Raises:
        DataError: a file without rows, or a broken one (with its line).
    """
    empty = True
    for row in READERS[file.kind](file):
        empty = False
        yield row
    if empty:
        raise DataError(f"{file.shown}: the file has no rows.")


def file_kind(name: str) -> tuple[str, str]:
    """(Kind, packing) by the ends of a name; either may be the empty string."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    return suffixes[-1] if suffixes else "", packing


def is_readable(name: str) -> bool:
    kind, packing = file_kind(name)
    return kind in READERS and not (kind == ".parquet" and packing)


@contextmanager
def _open(file: SourceFile) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. A file that is cut off or damaged is a DataError, not an early end."""
    try:
        if file.packing:
            unpacked: Any = pa.input_stream(str(file.path), compression=PACKINGS[file.packing])
            with io.BufferedReader(unpacked) as stream:
                yield stream
        else:
            with file.path.open("rb") as stream:
                yield stream
    except OSError as error:
        raise DataError(f"{file.shown}: cannot be read ({error.strerror or error}).") from None


def _lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """(Line number from 1, line with its end)."""
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{file.shown}, line {number}: not UTF-8 text.") from None


def _read_text(file: SourceFile) -> Iterator[dict[str, Any]]:
    for _, line in _lines(file):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _read_jsonl(file: SourceFile) -> Iterator[dict[str, Any]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except READ_ERRORS as error:
            raise DataError(f"{file.shown}, line {number}: not JSON ({_words(error)}).") from None
        if not isinstance(row, dict):
            raise DataError(f"{file.shown}, line {number}: is a {type(row).__name__}, must be an object.")
        yield row


def _read_json(file: SourceFile) -> Iterator[dict[str, Any]]:
    """A list of objects, one object, or objects one a line, which are common under the name .json."""
    first = next((line for _, line in _lines(file) if line.strip()), "")
    if first.lstrip().startswith("{") and _is_json(first):
        yield from _read_jsonl(file)
    elif first:
        with _open(file) as stream:
            content = stream.read()
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{file.shown}, line {line}: not UTF-8 text.") from None
        except READ_ERRORS as error:
            line = getattr(error, "lineno", 1)
            raise DataError(f"{file.shown}, line {line}: not JSON ({_words(error)}).") from None
        del content
        rows = [rows] if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            found = type(rows).__name__
            raise DataError(f"{file.shown}: holds one {found}; a list of objects, or one object a line, is needed.")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(f"{file.shown}, row {number}: is a {type(row).__name__}, must be an object.")
            yield row


def _words(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except READ_ERRORS:
        return False
    return True


def _read_table(file: SourceFile, delimiter: str) -> Iterator[dict[str, Any]]:
    """Rows below a header. Strict: else a quote that is not closed would swallow all rows behind it, unseen."""
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1  # on which the row begins; a quoted cell may go over several
    try:
        for cells in reader:
            if not cells or (len(cells) == 1 and cells[0].isspace()):
                pass  # a blank line; an empty cell in quotes is none
            elif not header:
                header = [cell.strip() for cell in cells]
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise DataError(f"{file.shown}, line {line}: the header names the column {twice!r} twice.")
            elif len(cells) != len(header):
                found = f"has {len(cells)} cells, must have {len(header)} as the header has"
                raise DataError(f"{file.shown}, line {line}: {found} ({', '.join(header)}).")
            else:
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file.shown}, line {line}: not {file.kind[1:].upper()} ({error}).") from None


def _read_parquet(file: SourceFile) -> Iterator[dict[str, Any]]:
    try:
        # So pages are read as they are needed; by default pyarrow 26 holds a row group, which may be the whole file.
        with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE):
                yield from plain_values(batch)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.shown}: not a readable .parquet file ({' '.join(str(error).split())}).") from None


READERS: dict[str, Callable[[SourceFile], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def plain_values(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Arrow rows as Python objects. Columns of mixed types are JSON texts inside; to_pylist leaves them texts."""
    rows = batch.to_pylist()
    for field in batch.schema:
        if "arrow.json" in str(field.type):
            for row in rows:
                row[field.name] = _parsed(row[field.name], field.type)
    return rows


def _parsed(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_parsed(item, kind.value_type) for item in value]
    return value
