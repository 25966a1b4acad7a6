"""Divides the sources of a corpus into stretches, which any number of machines share, and reads their rows.

What a stretch is depends on its file alone, never on the number of parts: so the same text is encoded in the same
pieces whoever does it, and a piece that is there already is found again.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from accel_llm.config.corpus_options import CorpusPart
from accel_llm.config.fields import Source
from accel_llm.data.corpus_shards import is_prepared_corpus
from accel_llm.data.file_lines import ReadingPlace, SourceFile
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.readers import READERS
from accel_llm.data.row_counts import LINE_KINDS
from accel_llm.data.sources import RawRow, read_source, source_files, source_identity
from accel_llm.errors import DataError

# Bytes of a stretch of such a file: a 64th of the file within these bounds, so that small files have several, too.
SMALLEST_STRETCH, LARGEST_STRETCH = 1 << 18, 1 << 24
ROWS_PER_PIECE = 20_000  # of other files, which one process reads from their start to their end


class Stretch(NamedTuple):
    """What one process reads in one go: the lines of a file that begin in `span`, or all rows of a file or dataset."""

    source: int  # index of the source
    number: int  # index of the file in the source
    file: SourceFile | None  # None: the source is a dataset
    span: tuple[int, int] | None  # bytes; None: all rows
    size: int  # bytes, about


class CorpusPiece(NamedTuple):
    """Rows that are encoded together; `address` is a hash of their content and of everything that is done to them."""

    address: str
    stretch: Stretch
    index: int  # its place in the stretch, from 0
    rows: Iterator[RawRow]  # their numbers count from the start of the stretch, from 1


def list_stretches(sources: list[Source]) -> list[Stretch]:
    """Return all stretches of the sources in the order of their rows.

    Raises:
        DataError: a source cannot be read.
    """
    stretches = []
    for number, source in enumerate(sources):
        files = [] if is_prepared_corpus(Path(source.path)) else source_files(source)
        if not files or not files[0].kind or source.limit_rows is not None:  # a dataset has no files of a kind
            stretches.append(Stretch(number, 0, None, None, LARGEST_STRETCH))
            continue
        for index, file in enumerate(files):
            size = max(1, file.path.stat().st_size)
            spans: list[tuple[int, int] | None] = [None]
            if file.kind in LINE_KINDS and file.sample_by == "line" and not file.compression:
                step = min(max(size // 64, SMALLEST_STRETCH), LARGEST_STRETCH)
                spans = [(start, min(start + step, size)) for start in range(0, size, step)]
            stretches += [Stretch(number, index, file, span, span[1] - span[0] if span else size) for span in spans]
    return stretches


def stretches_of_part(stretches: list[Stretch], part: CorpusPart) -> list[Stretch]:
    """Return the stretches whose middle lies in the share of `part`: each is in one part, and sizes are about equal."""
    total, before, chosen = sum(stretch.size for stretch in stretches), 0, []
    for stretch in stretches:
        middle = 2 * before + stretch.size
        if (part.number - 1) * 2 * total <= middle * part.count < part.number * 2 * total:
            chosen.append(stretch)
        before += stretch.size
    return chosen


def read_pieces(stretch: Stretch, source: Source, settings_key: str) -> Iterator[CorpusPiece]:
    """Yield the pieces of a stretch; the rows of a piece are read before the next one, or left.

    Raises:
        DataError: the source cannot be read.
    """
    file, origin = stretch.file, (stretch.source, stretch.number)
    if file is not None and stretch.span is not None:
        content = _hash_lines(file.path, stretch.span)
        address = data_fingerprint(settings_key, file.kind, content)
        yield CorpusPiece(address, stretch, 0, _number_rows(file._replace(span=stretch.span)))
        return
    identity = data_fingerprint(file.path, file.sample_by) if file else source_identity(source)
    limit = None if file else source.limit_rows
    rows = _number_rows(file) if file else read_source(source)
    for index in itertools.count():
        chunk = list(itertools.islice(rows, ROWS_PER_PIECE))
        if not chunk:
            if file and not index:
                raise DataError(f"{file.label}: the file has no rows.")
            return
        yield CorpusPiece(
            data_fingerprint(settings_key, identity, origin[1], limit, index, ROWS_PER_PIECE),
            stretch,
            index,
            iter(chunk),
        )


def _number_rows(file: SourceFile) -> Iterator[RawRow]:
    """Yield the rows of a file, or of a span of it. Only for a message of an error the lines before it are counted."""
    try:
        for number, fields in enumerate(READERS[file.kind](file, ReadingPlace()), 1):
            yield RawRow(file.label, number, fields)
    except DataError:
        if not file.span or not file.span[0] or file.lines_before:
            raise
        lines, _ = count_before(file.path, file.span[0])
        for _ in READERS[file.kind](file._replace(lines_before=lines), ReadingPlace()):
            pass
        raise


def count_before(path: Path, place: int) -> tuple[int, int]:
    """Return how many lines, and how many lines that are not blank, begin before byte `place` of a file."""
    lines = rows = end = 0
    with path.open("rb") as file:
        while end < place and (line := file.readline()):
            end += len(line)
            lines += 1
            rows += bool(line.decode("utf-8", "replace").strip())
    return lines, rows


def _hash_lines(path: Path, span: tuple[int, int]) -> str:
    """Return a hash of the lines of a file that begin in `span`, and of whether they are its first ones."""
    digest, (place, end), block = hashlib.sha256(b"start" if span[0] == 0 else b""), span, b"\n"
    with path.open("rb") as file:
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while place < end and (block := file.read(min(end - place, 1 << 20))):
            digest.update(block)
            place += len(block)
        if place == end and not block.endswith(b"\n"):
            digest.update(file.readline())  # the rest of the last line
    return digest.hexdigest()
