"""Read the rows of one file, whatever its kind, one by one.

Only a .json list is loaded as a whole; every other file may be larger than memory.
"""

import csv
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from accel_llm.chat.values import parse_json
from accel_llm.data.arrow_values import plain_values
from accel_llm.data.file_lines import ReadingPlace, SourceFile, file_kind, open_file, read_lines
from accel_llm.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # kind of a table -> what stands between its cells
ROWS_PER_BATCH = 256  # rows of a .parquet file or dataset that are in memory together
# A quote that is never closed turns the rest of the file into one cell. A larger cell is taken for this mistake.
MAX_CELL_CHARACTERS = 1 << 27
# Text that is not JSON, numbers of thousands of digits (both ValueError), and values that are nested too deep.
JSON_ERRORS = (ValueError, RecursionError)
_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a cell between quotes; a quote in it is doubled
LOOKED_AT = 100  # first lines of a table by which `NameColumns` decides

# Takes the cells of the first lines of a table, and returns names for its columns; None if its first line is a header.
NameColumns = Callable[[list[list[str]]], list[str] | None]


def read_rows(
    file: SourceFile, name_columns: NameColumns | None = None, place: ReadingPlace | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file in their order, from `place` on; with each row `place` moves behind it.

    Cells of .csv and .tsv are text, and an empty cell is None. Their first line is the header, unless `name_columns`
    finds that there is none. A row of .txt has one field, `text`: by `sample_by` a line that is not blank, lines up to
    an empty one, or the whole file with all its line breaks. A place is found at once, but in a
    compressed file all before it is decompressed, and a .json list is loaded as a whole.

    Raises:
        DataError: the file has no rows, or is broken; the message names the line.
    """
    place = place or ReadingPlace()
    if name_columns and file.kind in DELIMITERS:
        rows = _read_table(file, place, DELIMITERS[file.kind], name_columns)
    else:
        rows = READERS[file.kind](file, place)
    for row in rows:
        place.row += 1
        yield row
    if not place.row:
        raise DataError(f"{file.label}: the file has no rows.")


def is_readable(name: str) -> bool:
    """Tell by its name whether rows can be read from a file. A compressed .parquet file cannot be read."""
    kind, compression = file_kind(name)
    return kind in READERS and not (kind == ".parquet" and compression)


def _read_text(file: SourceFile, place: ReadingPlace) -> Iterator[dict[str, Any]]:
    lines: list[str] = []  # of a paragraph or document that goes on
    for _, line in read_lines(file, place):
        if file.sample_by == "line":
            if line.strip():
                yield {"text": line.rstrip("\r\n")}
        elif file.sample_by == "document" or line.rstrip("\r\n"):
            lines.append(line)
        else:
            yield from _whole_text(file, lines)
            lines.clear()
    yield from _whole_text(file, lines)


def _whole_text(file: SourceFile, lines: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a paragraph or document as one row; nothing if all of them are blank."""
    text = "".join(lines)
    if text.strip():
        yield {"text": text if file.sample_by == "document" else text.rstrip("\r\n")}


def _read_jsonl(file: SourceFile, place: ReadingPlace) -> Iterator[dict[str, Any]]:
    for number, line in read_lines(file, place):
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


def _read_json(file: SourceFile, place: ReadingPlace) -> Iterator[dict[str, Any]]:
    """Read a list of objects, one object, or one object per line, which many files named .json hold."""
    # If the first line is a whole object, the file has one object per line and need not be loaded as a whole.
    first = next((line for _, line in read_lines(file) if line.strip()), "")
    if first.lstrip().startswith("{") and _is_json(first):
        yield from _read_jsonl(file, place)
    elif first:
        with open_file(file) as stream:
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
        for row in itertools.islice(rows, place.offset, None):
            place.offset += 1
            if not isinstance(row, dict):
                raise DataError(f"{file.label}, row {place.offset}: is a {type(row).__name__}, must be an object.")
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


def _read_table(
    file: SourceFile, place: ReadingPlace, delimiter: str, name_columns: NameColumns | None = None
) -> Iterator[dict[str, Any]]:
    """Read the rows below a header line, or all rows with the names that `name_columns` gives to their columns."""
    lines = _table_lines(file, delimiter, place)
    head = _table_lines(file, delimiter, ReadingPlace()) if place.offset else lines  # the header is at the start
    first = list(itertools.islice(head, LOOKED_AT if name_columns else 1))
    header = None
    if name_columns and first:
        try:
            header = name_columns([cells for _, cells in first])
        except DataError as error:
            raise DataError(f"{file.label}: {error}.", error.reason) from None
    what = "the header"
    if header:
        what = "line 1"
    elif first:
        line, cells = first.pop(0)
        header = [cell.strip() for cell in cells]
        duplicate = next((name for name in header if header.count(name) > 1), None)
        if duplicate is not None:
            raise DataError(f"{file.label}, line {line}: the header names the column {duplicate!r} twice.")
    for line, cells in itertools.chain(first, lines):
        assert header is not None
        if len(cells) != len(header):
            raise DataError(
                f"{file.label}, line {line}: has {len(cells)} cells, must have {len(header)} as {what} has "
                f"({', '.join(header)})."
            )
        yield {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _table_lines(file: SourceFile, delimiter: str, place: ReadingPlace) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line where a row begins, its cells) of a table from `place` on; blank lines are left out.

    Without strict mode a quote that is never closed would swallow all rows after it, and nobody would notice.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    quoting = csv.QUOTE_NONE if _has_plain_quotes(file, delimiter) else csv.QUOTE_MINIMAL
    reader = csv.reader(
        (line for _, line in read_lines(file, place)), delimiter=delimiter, quoting=quoting, strict=True
    )
    line = place.line + 1  # a quoted cell may span several lines
    try:
        for cells in reader:
            # A line with one empty cell in quotes is not blank.
            if cells and not (len(cells) == 1 and cells[0].isspace()):
                yield line, cells
            line = place.line + 1
    except csv.Error as error:
        raise DataError(f"{file.label}, line {line}: not {file.kind[1:].upper()} ({error}).") from None


def _has_plain_quotes(file: SourceFile, delimiter: str) -> bool:
    """Tell whether quotes are plain signs in a .tsv file, as in those of GLUE, where they need not come in pairs.

    Read as a table with quoted cells, such a file breaks, or lines between two quotes become one cell. Here every line
    has the cells of a row, while a quoted cell that goes on in the next line breaks a row in two.
    """
    if file.kind != ".tsv":
        return False
    found, tabs = False, -1
    for _, line in read_lines(file):
        line = line.rstrip("\r\n")
        if not line or line.isspace():
            continue
        tabs = line.count(delimiter) if tabs < 0 else tabs
        if not tabs or line.count(delimiter) != tabs:
            return False
        if '"' in line and not found:
            cells = line.split(delimiter)
            found = any(cell.startswith('"') and not _QUOTED.fullmatch(cell) for cell in cells)
    return found


def _read_parquet(file: SourceFile, place: ReadingPlace) -> Iterator[dict[str, Any]]:
    try:
        # These settings read page by page. By default pyarrow 26 loads a row group, which may be the whole file.
        with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
            _check_names(file, table.schema_arrow)
            # Only the row group of the place is decoded from its start.
            ends = list(itertools.accumulate(table.metadata.row_group(k).num_rows for k in range(table.num_row_groups)))
            first = bisect_right(ends, place.offset)
            before = place.offset - (ends[first - 1] if first else 0)
            groups = list(range(first, len(ends)))
            for batch in table.iter_batches(ROWS_PER_BATCH, groups) if groups else ():
                for row in plain_values(batch.slice(min(before, len(batch)))):
                    place.offset += 1
                    yield row
                before = max(0, before - len(batch))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.label}: not a readable .parquet file ({' '.join(str(error).split())}).") from None


def read_features(file: SourceFile) -> dict[str, Any]:
    """Return the features that `datasets` wrote into a .parquet file, by column; an empty dict without them.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        metadata = pq.read_schema(file.path).metadata or {}
        return json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
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


READERS: dict[str, Callable[[SourceFile, ReadingPlace], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    **{kind: partial(_read_table, delimiter=delimiter) for kind, delimiter in DELIMITERS.items()},
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
