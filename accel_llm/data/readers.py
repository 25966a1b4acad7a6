"""Read the rows of one file, whatever its kind, one by one.

Only a .json list is loaded as a whole; every other file may be larger than memory.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from accel_llm.chat.values import parse_json
from accel_llm.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS_PER_BATCH = 256  # rows of a .parquet file or dataset that are in memory together
# A quote that is never closed turns the rest of the file into one cell. A larger cell is taken for this mistake.
MAX_CELL_CHARACTERS = 1 << 27
# Text that is not JSON, numbers of thousands of digits (both ValueError), and values that are nested too deep.
JSON_ERRORS = (ValueError, RecursionError)


class SourceFile(NamedTuple):
    """A file to read rows from."""

    path: Path
    label: str  # its name in messages
    kind: str  # a key of READERS
    compression: str  # a key of COMPRESSIONS, or the empty string


def read_rows(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file in their order.

    Cells of .csv and .tsv are text, and an empty cell is None. A line of .txt is a row with one field, `text`.

    Raises:
        DataError: the file has no rows, or is broken; the message names the line.
    """
    empty = True
    for row in READERS[file.kind](file):
        empty = False
        yield row
    if empty:
        raise DataError(f"{file.label}: the file has no rows.")


def file_kind(name: str) -> tuple[str, str]:
    """Return (kind, compression) from the suffixes of a file name; each may be the empty string."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def is_readable(name: str) -> bool:
    """Tell by its name whether rows can be read from a file. A compressed .parquet file cannot be read."""
    kind, compression = file_kind(name)
    return kind in READERS and not (kind == ".parquet" and compression)


@contextmanager
def _open(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a file as a stream of its decompressed bytes.

    Raises:
        DataError: the file cannot be read, or its compressed content is damaged or incomplete.
    """
    try:
        if file.compression:
            decompressed: Any = pa.input_stream(str(file.path), compression=COMPRESSIONS[file.compression])
            with io.BufferedReader(decompressed) as stream:
                yield stream
        else:
            with file.path.open("rb") as stream:
                yield stream
    except OSError as error:
        raise DataError(f"{file.label}: cannot be read ({error.strerror or error}).") from None


def _lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its line break)."""
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                # A file may start with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{file.label}, line {number}: not UTF-8 text.") from None


def _read_text(file: SourceFile) -> Iterator[dict[str, Any]]:
    for _, line in _lines(file):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _read_jsonl(file: SourceFile) -> Iterator[dict[str, Any]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except DataError as error:
            raise DataError(f"{file.label}, line {number}: {error}.", error.reason) from None
        except JSON_ERRORS as error:
            raise DataError(f"{file.label}, line {number}: not JSON ({_error_text(error)}).") from None
        if not isinstance(row, dict):
            raise DataError(f"{file.label}, line {number}: is a {type(row).__name__}, must be an object.")
        yield row


def _read_json(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Read a list of objects, one object, or one object per line, which many files named .json hold."""
    # If the first line is a whole object, the file has one object per line and need not be loaded as a whole.
    first = next((line for _, line in _lines(file) if line.strip()), "")
    if first.lstrip().startswith("{") and _is_json(first):
        yield from _read_jsonl(file)
    elif first:
        with _open(file) as stream:
            content = stream.read()
        try:
            rows = parse_json(content.decode("utf-8-sig"))
        except DataError as error:
            row = _find_refused_row(content.decode("utf-8-sig"))
            raise DataError(f"{file.label}, row {row}: {error}.", error.reason) from None
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{file.label}, line {line}: not UTF-8 text.") from None
        except JSON_ERRORS as error:
            line = getattr(error, "lineno", 1)
            raise DataError(f"{file.label}, line {line}: not JSON ({_error_text(error)}).") from None
        del content  # the text of a large file need not stay in memory beside its rows

        # One object is a list of one row.
        rows = [rows] if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            kind = type(rows).__name__
            raise DataError(f"{file.label}: holds one {kind}, must hold a list of objects or one object per line.")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(f"{file.label}, row {number}: is a {type(row).__name__}, must be an object.")
            yield row


def _find_refused_row(content: str) -> int:
    """Return the number of the first row of a list, as JSON text, that `parse_json` refuses; 1 if it is no list."""
    content = content.lstrip()
    number, start = 1, 1
    while content.startswith("["):
        while content[start] in " \t\r\n,":
            start += 1
        try:
            _, end = json.JSONDecoder().raw_decode(content, start)
            parse_json(content[start:end])
        except (DataError, *JSON_ERRORS):
            break
        number, start = number + 1, end
    return number


def _error_text(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except DataError:
        return True  # the line is refused when it is read
    except JSON_ERRORS:
        return False
    return True


def _read_table(file: SourceFile, delimiter: str) -> Iterator[dict[str, Any]]:
    """Read the rows below a header line.

    Without strict mode a quote that is never closed would swallow all rows after it, and nobody would notice.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1  # where the row begins; a quoted cell may span several lines
    try:
        for cells in reader:
            if not cells or (len(cells) == 1 and cells[0].isspace()):
                pass  # a blank line; a line with one empty cell in quotes is not blank
            elif not header:
                header = [cell.strip() for cell in cells]
                duplicate = next((name for name in header if header.count(name) > 1), None)
                if duplicate is not None:
                    raise DataError(f"{file.label}, line {line}: the header names the column {duplicate!r} twice.")
            elif len(cells) != len(header):
                raise DataError(
                    f"{file.label}, line {line}: has {len(cells)} cells, must have {len(header)} as the header has "
                    f"({', '.join(header)})."
                )
            else:
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file.label}, line {line}: not {file.kind[1:].upper()} ({error}).") from None


def _read_parquet(file: SourceFile) -> Iterator[dict[str, Any]]:
    try:
        # These settings read page by page. By default pyarrow 26 loads a row group, which may be the whole file.
        with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
            _check_names(file, table.schema_arrow)
            for batch in table.iter_batches(ROWS_PER_BATCH):
                yield from plain_values(batch)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.label}: not a readable .parquet file ({' '.join(str(error).split())}).") from None


def _check_names(file: SourceFile, fields: Iterable[pa.Field], place: str = "") -> None:
    """Check that no two columns, and no two keys of an object, have the same name: only one would be read."""
    names = [field.name for field in fields]
    if len(set(names)) != len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{file.label}: has {f'{place}{doubled}'!r} twice; needs each column once.")
    for field in fields:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _check_names(file, kind, f"{place}{field.name}.")


READERS: dict[str, Callable[[SourceFile], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def plain_values(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Convert Arrow rows to Python values.

    Arrow stores columns of mixed types as JSON text, which `to_pylist` returns as text; here it is parsed.
    """
    rows = batch.to_pylist()
    for field in batch.schema:
        if "arrow.json" in str(field.type):
            for row in rows:
                row[field.name] = _parse_json(row[field.name], field.type)
    return rows


def _parse_json(value: Any, kind: pa.DataType) -> Any:
    """Parse the JSON text in a value of Arrow type `kind`, at any depth."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _parse_json(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_parse_json(item, kind.value_type) for item in value]
    return value
