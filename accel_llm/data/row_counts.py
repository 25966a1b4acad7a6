"""How many rows the sources have, for a bar with the time left, as far as it is known without parsing them."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from accel_llm.config.fields import Source
from accel_llm.data.file_lines import SourceFile
from accel_llm.data.sources import source_files

LINE_KINDS = (".jsonl", ".ndjson", ".txt")  # kinds of files with a row in each line that is not empty, if so asked
BYTES_AT_ONCE = 1 << 22


def expected_rows(sources: Iterable[Source]) -> int | None:
    """Return about how many rows are read: empty lines count too. None if a source does not say it quickly.

    Tables have lines inside cells, and a .json list or a compressed file would have to be read as a whole. A dataset is
    loaded when its rows are read.
    """
    total = 0
    for source in sources:
        counts = [_count_rows(file) for file in source_files(source) or [None]]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        total += sum(known) if source.limit_rows is None else min(sum(known), source.limit_rows)
    return total


def _count_rows(file: SourceFile | None) -> int | None:
    if file is None or file.compression:
        return None
    try:
        if file.kind in LINE_KINDS and file.sample_by == "line":
            return _count_lines(file.path)
        return pq.read_metadata(file.path).num_rows if file.kind == ".parquet" else None
    except (OSError, ValueError, pa.ArrowException):  # the reader says what is wrong with the file
        return None


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as content:
        while block := content.read(BYTES_AT_ONCE):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")
