"""Find what the label column of all training rows holds, before any row is encoded."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from accel_llm.config.fields import Source
from accel_llm.data.labelled_rows import LabelledRow, describe_columns, name_columns, parse_labelled
from accel_llm.data.labels import MULTI_LABEL, LabelCounts, LabelKind, Vocabulary, find_vocabulary
from accel_llm.data.sources import RawRow, read_source, source_features
from accel_llm.errors import DataError


@dataclass
class LabelledReader:
    """Reads the rows of one source, and parses each into one text, or two, and a label."""

    source: Source
    columns: Mapping[str, str]
    several: bool  # a label that is no list is a list, too
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> names of class numbers
    headless: dict[tuple[str, ...], list[str]] = field(default_factory=dict)  # a first line that is a row -> names
    read_from: dict[str, None] = field(default_factory=dict)  # what `describe_columns` says of rows to train on

    def read(self) -> Iterator[RawRow]:
        """Return an iterator over the rows; see `read_source`."""
        return read_source(self.source, self._name_columns)

    def _name_columns(self, cells: list[list[str]]) -> list[str] | None:
        names = name_columns(cells, self.columns)
        if names:
            self.headless[tuple(cells[0])] = names
        return names

    def parse(self, row: RawRow) -> LabelledRow:
        """Parse a row; see `parse_labelled`."""
        return parse_labelled(row.fields, self.columns, self.class_names, self.several)

    def notes(self) -> list[str]:
        """Return a sentence for each way to name the columns of the files without a header, and for columns that were read."""
        ways = dict.fromkeys(", ".join(names) for names in self.headless.values())
        notes = [f"{self.source.label}: a file without a header; its columns are {way}." for way in ways]
        return [*notes, *(f"{self.source.label}: {way}." for way in self.read_from)]


@dataclass(frozen=True)
class LabelTask:
    """How rows of texts with labels are read, by number of the source, and what their labels mean."""

    readers: list[LabelledReader]
    vocabulary: Vocabulary


def find_task(
    kind: LabelKind,
    sources: list[Source],
    columns: list[dict[str, str]],
    training_sources: int,
    limit_rows: int | None,
) -> LabelTask:
    """Read the labels of all rows of the first `training_sources` of `sources`, and tell what they are.

    Rows that `eval_share` holds out count as well, so that the seed does not decide which classes there are. Bad rows
    are left out: they are refused, or counted, when they are encoded.

    Raises:
        DataError: a source cannot be read, or its labels are of no problem type.
    """
    several = kind.problem_type == MULTI_LABEL
    readers = [
        LabelledReader(source, names, several, _class_names(source))
        for source, names in zip(sources, columns, strict=True)
    ]
    counts, found = LabelCounts(), dict[tuple[str, ...] | None, None]()
    rows = ((reader, row) for reader in readers[:training_sources] for row in reader.read())
    for reader, row in itertools.islice(rows, limit_rows):
        try:
            parsed = reader.parse(row)
        except DataError:
            continue
        counts.add(parsed.label)
        reader.read_from[describe_columns(row.fields, reader.columns)] = None
        found[parsed.names] = None
    return LabelTask(readers, find_vocabulary(counts, kind, _join_names(found)))


def _join_names(found: dict[tuple[str, ...] | None, None]) -> tuple[str, ...] | None:
    """Return the names of classes that all sources give, in their order; None if a source gives none."""
    if not found or None in found:
        return None
    return tuple(dict.fromkeys(name for names in found if names for name in names))


def _class_names(source: Source) -> dict[str, tuple[str, ...]]:
    """Return the names of the class numbers in each column of a source that is a `datasets.ClassLabel`.

    Raises:
        DataError: two files of the source give different names to one column.
    """
    names: dict[str, tuple[str, ...]] = {}
    for file, features in source_features(source):
        for column, feature in features.items():
            while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
                feature = feature[0] if isinstance(feature, list) else feature["feature"]
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
                new = tuple(feature["names"])
                if names.setdefault(column, new) != new:
                    problem = "gives other names to its classes than the files before it"
                    raise DataError(f"{file}: the column {column} {problem}; name the files as separate sources.")
    return names
