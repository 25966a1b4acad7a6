"""The rows of the files that `launch/predict.py` reads, and which of them are done."""

from typing import Any, NamedTuple

from accel_llm.config.fields import Source
from accel_llm.config.tool_options import PredictOptions
from accel_llm.data.sources import RawRow

TOO_LONG = "too long"
UNKNOWN_TOKENS = "unknown tokens"


class InputRow(NamedTuple):
    """A row of the input: its number, from 0 over all sources, and where it stands."""

    number: int
    source: Source
    row: RawRow

    @property
    def where(self) -> str:
        return f"{self.row.file}, row {self.row.number}"


class RowNumbers:
    """A set of numbers that are added nearly in their order: little is kept of millions."""

    def __init__(self) -> None:
        self.first, self.ahead = 0, set[int]()  # all below `first` are in the set

    def add(self, number: int) -> None:
        self.ahead.add(number)
        while self.first in self.ahead:
            self.ahead.remove(self.first)
            self.first += 1

    def is_empty(self) -> bool:
        return not (self.first or self.ahead)

    def __contains__(self, number: int) -> bool:
        return number < self.first or number in self.ahead


def row_format(source: Source, options: PredictOptions) -> tuple[Any, dict[str, str]]:
    """Return the format and the columns of the rows of a source; its own come before those of the options."""
    return source.data_format or options.data_format, {**options.columns, **source.columns}
