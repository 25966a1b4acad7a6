"""A file of rows, compressed or not: its bytes, and its lines from any place on."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from accel_llm.config.fields import SampleBy
from accel_llm.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class SourceFile(NamedTuple):
    """A file to read rows from."""

    path: Path
    label: str  # its name in messages
    kind: str  # a key of READERS
    compression: str  # a key of COMPRESSIONS, or the empty string
    span: tuple[int, int] | None = None  # bytes [start, end) of a file of lines: those that begin there; None: all
    lines_before: int = 0  # lines before `span`, as messages count them
    sample_by: SampleBy = "line"  # what a row of a .txt file is


@dataclass
class ReadingPlace:
    """How far a file is read: where its next row begins."""

    offset: int = 0  # decompressed bytes; in a .parquet file, a list of JSON or a dataset: rows
    line: int = 0  # lines before it
    row: int = 0  # rows before it


def file_kind(name: str) -> tuple[str, str]:
    """Return (kind, compression) from the suffixes of a file name; each may be the empty string."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


@contextmanager
def open_file(file: SourceFile) -> Iterator[BinaryIO]:
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


def read_lines(file: SourceFile, place: ReadingPlace | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its line break), from `place` on, which moves behind each line."""
    place, is_start = place or ReadingPlace(), not file.span or file.span[0] == 0
    with open_file(file) as stream:
        _skip(stream, file, place.offset)
        for line in _lines_that_begin_in(stream, file.span) if file.span else stream:
            place.offset, place.line = place.offset + len(line), place.line + 1
            try:
                # A file may start with a byte order mark.
                encoding = "utf-8-sig" if place.line == 1 and is_start else "utf-8"
                yield file.lines_before + place.line, line.decode(encoding)
            except UnicodeDecodeError:
                raise DataError(f"{file.label}, line {file.lines_before + place.line}: not UTF-8 text.") from None


def _lines_that_begin_in(stream: BinaryIO, span: tuple[int, int]) -> Iterator[bytes]:
    """Yield the lines whose first byte lies in `span`, whole: so spans that touch have each line once."""
    place, end = span
    if place:
        # A line begins at `place` if a line break is the byte before.
        stream.seek(place - 1)
        place += len(stream.readline()) - 1
    while place < end and (line := stream.readline()):
        place += len(line)
        yield line


def _skip(stream: BinaryIO, file: SourceFile, count: int) -> None:
    """Go to byte `count` of a stream that was just opened."""
    if not file.compression:
        stream.seek(count)
    while file.compression and count > 0:
        count -= len(stream.read(min(count, 1 << 20))) or count
