"""Read texts from files for ever, epoch after epoch, in parts of a few rows; any part can be read again from its place."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from accel_llm.config.fields import Source
from accel_llm.data.encode import SourceRow
from accel_llm.data.file_lines import ReadingPlace, SourceFile
from accel_llm.data.sources import RawRow, files_to_read, read_file
from accel_llm.errors import DataError

ROWS_PER_PART = 64  # rows that are read and encoded together


class StreamedFile(NamedTuple):
    """A file of a source that is streamed; its index in the list of all of them is the number of its origin."""

    number: int  # of the source
    source: Source
    file: SourceFile


@dataclass
class TextPlace:
    """Where the next row of a stream of texts is: in which epoch, in which of its files, and where in that file."""

    epoch: int = 0
    file: int = 0  # index in the order of this epoch
    taken: int = 0  # rows of the file's source in this epoch, for `limit_rows`
    place: ReadingPlace = field(default_factory=ReadingPlace)

    def to_dict(self) -> dict[str, Any]:
        """Return the place as plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TextPlace":
        """Rebuild a place from the plain values of `to_dict`."""
        return cls(**{**values, "place": ReadingPlace(**values["place"])})


def streamed_files(sources: Sequence[Source]) -> list[StreamedFile]:
    """Return the files of all sources in their order.

    Raises:
        DataError: a source cannot be read, or it is standard input, which cannot be read from a place on.
    """
    if any(source.path == "-" for source in sources):
        raise DataError("train_files: - is standard input, and a run could not go on reading it; name files to stream.")
    return [
        StreamedFile(number, source, file) for number, source in enumerate(sources) for file in files_to_read(source)
    ]


class TextReader:
    """Reads the rows of some files from a place on, without end. After each part `place` says where the next one begins."""

    def __init__(self, files: list[StreamedFile], origins: Sequence[int], shuffle_seed: int | None, place: TextPlace):
        """`origins` are the numbers of the files' origins. With `shuffle_seed` each epoch has the files in a new order.

        Files of a source that has `limit_rows` are never shuffled, since its first rows are meant.
        """
        self.files, self.origins, self.place = files, origins, place
        limited = any(each.source.limit_rows for each in files)
        self.shuffle_seed = None if limited else shuffle_seed
        self._rows: Iterator[RawRow] | None = None  # of the file that is being read

    def read_part(self) -> tuple[list[SourceRow], bool]:
        """Return the next rows, and whether the epoch ends with them; they are of one file, and may be none."""
        place, index = self.place, self._order()[self.place.file]
        number, source, file = self.files[index]
        if self._rows is None:
            self._rows = read_file(source, file, place.place)
        room = ROWS_PER_PART if source.limit_rows is None else min(ROWS_PER_PART, source.limit_rows - place.taken)
        rows = [SourceRow(number, self.origins[index], row) for row in itertools.islice(self._rows, max(room, 0))]
        place.taken += len(rows)
        if len(rows) == ROWS_PER_PART:
            return rows, False

        # The file has ended, or what may be read of it.
        following = place.file + 1
        self._rows, place.place = None, ReadingPlace()
        if following == len(self.files):
            place.epoch, place.file, place.taken = place.epoch + 1, 0, 0
            return rows, True
        place.file = following
        if self.files[self._order()[following]].number != number:
            place.taken = 0
        return rows, False

    def _order(self) -> list[int]:
        """Return the indices of the files in the order of this epoch."""
        if self.shuffle_seed is None:
            return list(range(len(self.files)))
        # A key that no epoch of rows has (data/order.py).
        rng = np.random.Generator(np.random.Philox(key=[self.shuffle_seed, 2**62 + self.place.epoch]))
        return rng.permutation(len(self.files)).tolist()

    def epochs(self) -> float:
        """Return how often the files were passed through so far; within a file whose size tells nothing it stands still."""
        file = self.files[self._order()[self.place.file]].file
        size = _size(file)
        share = min(1.0, self.place.place.offset / size) if size else 0.0
        return self.place.epoch + (self.place.file + share) / len(self.files)


def _size(file: SourceFile) -> int:
    """Return the offset at which a file ends, or 0 if that is not known before it is read."""
    if file.compression or file.kind == ".json" or not file.path.is_file():
        return 0
    return pq.read_metadata(file.path).num_rows if file.kind == ".parquet" else file.path.stat().st_size
