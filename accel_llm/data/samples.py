"""Some rows of the training sources, each encoded by itself: what is trained of it, or why nothing is."""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from accel_llm.config.fields import Source
from accel_llm.data.encode import Encoder, SourceRow
from accel_llm.data.encoders import encode_rows, goes_to_evaluation
from accel_llm.data.labels import Labels
from accel_llm.data.ledger import is_lost
from accel_llm.data.rows import ARRAYS, Rows, as_rows
from accel_llm.data.sources import RawRow, read_source
from accel_llm.errors import DataError


class Sample(NamedTuple):
    """One row of a source: `problems` say why it is bad, `losses` what of a row that is not bad is not trained.

    `rows` is what is trained of it: one row, none, or several.
    """

    raw: RawRow
    rows: Rows
    problems: list[str]
    losses: list[str]
    labels: Labels | None  # of texts with labels

    @property
    def name(self) -> str:
        """File and number of the row, as messages name it."""
        return row_name(self.raw)


def row_name(row: RawRow) -> str:
    """Return file and number of a row, as messages name it."""
    return f"{row.file}, row {row.number}"


def read_training_rows(encoder: Encoder, train: list[Source], seed: int) -> Iterator[SourceRow]:
    """Return an iterator over the rows that training reads, without those held out for evaluation.

    Raises:
        DataError: a source cannot be read.
    """
    options = encoder.options
    rows = (
        SourceRow(number, 0, row)
        for number, source in enumerate(train)
        for row in (encoder.task.readers[number].read() if encoder.task else read_source(source))
    )
    for row in itertools.islice(rows, options.limit_rows):
        if not goes_to_evaluation(row.row, options, seed):
            yield row


def first_rows(rows: Iterator[SourceRow], count: int) -> list[SourceRow]:
    """Return the first rows. Where a file is broken they end: whoever reads all of it says so."""
    chosen = []
    try:
        for row in itertools.islice(rows, count):
            chosen.append(row)
    except DataError:
        pass
    return chosen


def random_rows(rows: Iterator[SourceRow], count: int, seed: int) -> list[SourceRow]:
    """Return rows from all over the data, in its order: each has the same chance (reservoir sampling, algorithm R).

    Where a file is broken the data ends.
    """
    draw, chosen = random.Random(seed), dict[int, tuple[int, SourceRow]]()
    try:
        for k, row in enumerate(rows):
            place = k if k < count else draw.randrange(k + 1)
            if place < count:
                chosen[place] = (k, row)
    except DataError:
        pass
    return [row for _, row in sorted(chosen.values(), key=lambda pair: pair[0])]


def named_rows(rows: Iterator[SourceRow], wanted: str) -> list[SourceRow]:
    """Return the rows that have this number in their file, or the one with this name: `FILE, row 7`, or the end of it.

    Raises:
        DataError: a source cannot be read.
    """
    if wanted.isdigit():
        return [row for row in rows if row.row.number == int(wanted)]
    return [row for row in rows if f"/{row_name(row.row)}".endswith(f"/{wanted.lstrip('/')}")]


def untrained_rows(rows: Iterator[SourceRow], trained: Rows) -> Iterator[SourceRow]:
    """Return an iterator over the rows of which nothing is in `trained`. Where a file is broken they end."""
    numbers: Mapping[str, set[int]] = {origin.file: set() for origin in trained.origins}
    for k, number in zip(trained.origin.tolist(), trained.number.tolist(), strict=True):
        numbers[trained.origins[k].file].add(number)
    try:
        for row in rows:
            if row.row.number not in numbers.get(row.row.file, ()):
                yield row
    except DataError:
        return


def encode_sample(row: SourceRow, encoder: Encoder) -> Sample:
    """Encode one row as training does, whatever is wrong with it."""
    options = encoder.options.model_copy(update={"on_bad_row": "drop"})
    where, bad = f"{row_name(row.row)}: ", []
    try:
        chunk = encode_rows([row], replace(encoder, options=options))
    except DataError as error:  # with `overlong: error`
        chunk = encode_rows([], encoder)
        bad.append(str(error).removeprefix(where))
    bad += [sentence.removeprefix(where) for sentences in chunk.ledger.examples.values() for sentence in sentences]
    bins = [name for bins in chunk.ledger.bins.values() for name in bins if is_lost(name)]
    losses = [name for name in bins if name.partition(": ")[2] not in chunk.ledger.examples]
    losses += [f"{turns:,} turns without a label: {reason}" for reason, turns in chunk.ledger.turns.items()]
    arrays = {name: np.array(getattr(chunk.part, name)) for name in ARRAYS}
    arrays |= {name: np.zeros(0, kind) for name, kind in ARRAYS.items() if not len(arrays[name])}
    rows = as_rows(arrays, [(row.source, row.row.file)])
    labels = encoder.task.vocabulary.labels if encoder.task else None
    return Sample(row.row, replace(rows, problem_type=labels and labels.problem_type), bad, losses, labels)
