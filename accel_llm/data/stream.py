"""The endless stream of micro-batches.

A position in the stream is the number of rows (packed bins) that all processes together have consumed. The order of
rows is a pure function of seed and position, so a resumed run needs no more than this number, whatever its number of
processes. Only texts that are streamed from their files need a state beside it (see text_stream.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, cast

import numpy as np
import torch

from accel_llm.backend.strategy import accumulation_steps
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import TrainOptions
from accel_llm.config.preference_options import AnswerOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.batches import Batch, attend_across, collate
from accel_llm.data.corpus import stored_epoch, uses_stored_packing
from accel_llm.data.epochs import Epochs, weighted_epochs
from accel_llm.data.even_work import deal_rows, work_of
from accel_llm.data.ledger import Ledger
from accel_llm.data.mixture import Turns
from accel_llm.data.order import mix_sources
from accel_llm.data.packing import Bins, pack
from accel_llm.data.rows import Rows
from accel_llm.data.source_names import add_sources, short_names
from accel_llm.data.sources import as_source
from accel_llm.data.step_sizes import StepSizes, step_sizes
from accel_llm.data.text_stream import STEPS_KEPT, StreamedRows, TextStream
from accel_llm.system.launcher import world_size
from accel_llm.system.progress import tracked


@dataclass(frozen=True, kw_only=True)
class Position:
    """The rank of this process, and how much of the stream is consumed."""

    rank: int = 0
    world: int = 1  # number of processes
    step: int = 0
    rows: int = 0  # consumed by all processes together
    streams: list[Any] = field(default_factory=list)  # of texts that are streamed: the state of each stream
    saved: dict[str, int] = field(default_factory=dict)  # elements of each tensor of the checkpoint that is continued


@dataclass(frozen=True)
class TrainingPlan:
    """The number of rows and steps of a run: pure arithmetic, the same on every process."""

    bins: int | None  # packed rows (or plain rows) in one epoch; None: it is streamed, and nobody knows
    rows_per_step: int
    total_rows: int | None  # rows until the stream ends; None with max_steps: it never ends
    total_steps: int
    first_step: int = 0  # the step at which this run starts; from here on a step has rows_in(step) rows
    first_row: int = 0
    batch_warmup_steps: int = 0  # first steps, with fewer rows than rows_per_step
    full: float | None = None  # how full the packed rows of a mixture are; None: all rows are packed together
    # By the rows consumed: how often each source of a mixture was passed through; of a single stream the name is empty.
    epochs_of_sources: Callable[[int], dict[str, float]] = field(default=lambda rows: {}, compare=False)
    # By the rows consumed: the ledger of what was streamed for them; None: all rows were counted before the run.
    streamed_ledger: Callable[[int], Ledger] | None = field(default=None, compare=False)

    @cached_property
    def sizes(self) -> StepSizes:
        return StepSizes(self.rows_per_step, self.batch_warmup_steps)

    def rows_in(self, step: int) -> int:
        """Return the rows of `step` (from 0), empty slots included."""
        return self.sizes.rows(step)

    def rows_at(self, step: int) -> int:
        """Return the rows of the stream before `step` (from 0), empty slots included."""
        return self.first_row + self.sizes.rows_before(step) - self.sizes.rows_before(self.first_step)

    def epoch(self, step: int) -> float:
        """Return the epochs that are complete before `step`, to 4 digits."""
        rows = self.rows_at(step)
        if self.bins is None:
            return round(min(self.epochs_of_sources(rows).values()), 4)
        return round(min(rows, self.total_rows or rows) / self.bins, 4)

    def source_epochs(self, step: int) -> dict[str, float]:
        """Return for each source of a mixture how often it was passed through before `step`, to 4 digits, by its name."""
        rows = self.rows_at(step)
        passed = self.epochs_of_sources(min(rows, self.total_rows or rows))
        return {name: round(epochs, 4) for name, epochs in passed.items() if name}


# Makes a batch of rows, or pairs, at indices: (rows, indices, packed, pad_token_id, virtual).
Collate = Callable[[Any, list[int], bool, int, int], Batch]


def _packed_lengths(rows: Rows | Pairs, options: TrainOptions) -> np.ndarray:
    """Return the tokens of each row, or pair, that count against `max_length`, int64 [n].

    A pair whose prompt cannot be shared has it twice, and may be longer than `max_length`: it fills a row alone.
    """
    return np.minimum(rows.lengths + options.virtual_tokens * rows.rows_per_unit, options.max_length)


def _sequences(rows: Rows | Pairs, options: TrainOptions) -> tuple[list[Epochs], Turns]:
    """Return the endless sequences of packed rows, and whose turn it is at each row of the stream.

    Sources with weights are packed each by itself and take turns. If the rows are ordered by length, all of them are
    arranged together.
    """
    weights, lengths = [as_source(place).weight for place in options.train_files], _packed_lengths(rows, options)
    if isinstance(rows, Rows) and uses_stored_packing(rows, options):
        return [Epochs(np.arange(len(rows)), lengths, options, packed=partial(stored_epoch, rows, options))], Turns([1])
    documents = np.arange(len(rows))
    if isinstance(rows, Rows) and rows.stored is not None:
        documents = np.asarray(rows.stored.order)  # of a prepared corpus: as its sources have them
    source = rows.source[documents]
    if None not in weights and len(weights) > 1 and options.order == "shuffle":
        return weighted_epochs(documents, source, cast(list[float], weights), lengths, options)
    return [Epochs(documents[mix_sources(source, weights, options.seed)], lengths, options)], Turns([1])


def across(options: TrainOptions) -> bool:
    """Return whether the documents of a packed row see those before them."""
    return isinstance(options, PretrainOptions) and options.cross_document_attention


def is_dealt(options: TrainOptions, processes: int) -> bool:
    """Return whether the rows of a step are dealt to the processes by their work: those of next-token prediction are."""
    return processes > 1 and not isinstance(options, AnswerOptions | ClassifyOptions)


def padding_share(rows: Rows, options: TrainOptions, rows_per_step: int) -> float:
    """Return the share of padding in the tokens that the first epoch computes, if rows are not packed.

    A row is as long as the longest row of its micro-batch. `rows` may be pairs of answers, which a step counts as one.
    """
    units, lengths = as_units(rows, share_prompts=False), rows.lengths + options.virtual_tokens
    sequences, _ = _sequences(units, options)
    order = np.concatenate([sequence.first_round()[0].order for sequence in sequences])
    answers = lengths.reshape(len(units), -1)[order]  # [units, rows in a unit]
    places = np.arange(len(answers))
    if is_dealt(options, world_size()):  # the longest rows of a step first
        answers = answers[np.lexsort((-answers.max(1), places // rows_per_step))]

    # A micro-batch begins where a step does, and after each `per_device_train_batch_size` rows of it.
    starts = np.flatnonzero(places % rows_per_step % options.per_device_train_batch_size == 0)
    longest = np.maximum.reduceat(answers.max(1), starts)
    computed = (longest * np.diff(starts, append=len(answers))).sum() * answers.shape[1]
    return float(1 - answers.sum() / computed)


def evaluation_batches(
    rows: Rows | Pairs,
    options: TrainOptions,
    rank: int,
    world: int,
    pad_token_id: int,
    collate: Collate = collate,
    name: str = "evaluate",
) -> Iterator[Batch]:
    """Yield the batches of process `rank` of `world` over all rows, or pairs, each once, on the CPU.

    Each process gets the same number of batches, since weights may be sharded; one without rows left gets batches
    without labels. `name` is that of the bar.
    """
    lengths, single = _packed_lengths(rows, options), Bins(np.arange(len(rows)), np.arange(len(rows) + 1))
    order, offsets = pack(lengths, options.max_length) if options.packing else single
    size, count = options.per_device_eval_batch_size, len(offsets) - 1
    firsts = range(rank * size, rank * size + -(-count // (size * world)) * size * world, size * world)
    for first in tracked(firsts, name):
        bins = range(first, min(first + size, count))
        indices = [int(k) for b in bins for k in order[offsets[b] : offsets[b + 1]]]
        yield collate(rows, indices, bool(options.packing), pad_token_id, options.virtual_tokens)


class Stream:
    """The micro-batches of one process, from any step on, without end.

    Step s takes the next `plan.rows_in(s)` rows of the endless sequence of epochs. A resumed run counts from `start`,
    since its checkpoint may have had another number of rows per step. The number of processes and of micro-batches only
    decides which process computes which row. Some slots have no row: those after the last row, and those of a
    `total_batch_size`, or of a step of the batch warmup, that is no multiple of the processes. They hold two tokens
    without a label, which add nothing to a sum or a count.

    The rows may be `Pairs`, which are never divided: then each index is one of a pair. `collate` makes a batch of them.
    """

    def __init__(
        self,
        rows: Rows | Pairs,
        options: TrainOptions,
        start: Position,
        pad_token_id: int,
        collate: Collate = collate,
    ):
        self.options, self.collate, self.saved = options, collate, start.saved
        self.rank, self.world, self.pad_token_id = start.rank, start.world, pad_token_id
        self.rows: Rows | Pairs | StreamedRows = rows
        self.streams: list[TextStream] = []
        self.sequences: list[TextStream] | list[Epochs]
        if isinstance(rows, Rows) and rows.streamed is not None:
            self.streams, self.turns, self.rows = rows.streamed.open_streams(options, start.streams)
            self._identity = rows.streamed.identity
            self.sequences = self.streams
        else:
            self.sequences, self.turns = _sequences(rows, options)
            self._lengths, self._source = _packed_lengths(rows, options), rows.source
        self.accumulation, self._places = accumulation_steps(options), lru_cache(maxsize=8)(self._deal_step)
        self.source_names = [] if isinstance(rows, Pairs) else short_names(options.train_files)
        self.plan = self._plan(start)

    def _plan(self, start: Position) -> TrainingPlan:
        """Return how many rows and steps are left from `start` on."""
        options, sizes, mixture = self.options, step_sizes(self.options), len(self.sequences) > 1
        if self.streams:
            plan = TrainingPlan(
                None, sizes.full, None, options.max_steps or start.step, start.step, start.rows, sizes.warmup
            )
            return replace(plan, epochs_of_sources=self._epochs_of_sources, streamed_ledger=self._streamed_ledger)

        # In an epoch each document is there at least once.
        bins = self.turns.rows_until([sequence.rows for sequence in cast(list[Epochs], self.sequences)])
        total = None if options.max_steps is not None else max(1, round(options.num_train_epochs * bins))
        steps_left = sizes.steps_for(total - start.rows, start.step) if total is not None else 0
        steps = options.max_steps or start.step + steps_left
        plan = TrainingPlan(bins, sizes.full, total, steps, start.step, start.rows, sizes.warmup)
        if mixture:
            full = self._fill(bins) if options.packing else None
            plan = replace(plan, full=full, epochs_of_sources=self._epochs_of_sources)
        return plan

    def _fill(self, rows: int) -> float:
        """Return how full the first `rows` rows are, from 0 to 1."""
        rounds = [sequence.first_round() for sequence in self.sequences]
        tokens = [lengths.sum() / (len(bins.offsets) - 1) for bins, lengths in rounds]  # of a row
        return float(np.dot(tokens, self.turns.counts(rows)) / (rows * self.options.max_length))

    def _epochs_of_sources(self, rows: int) -> dict[str, float]:
        counts = self.turns.counts(rows)
        names = short_names(self.options.train_files) if len(counts) > 1 else [""]
        return {name: each.epoch(n) for name, each, n in zip(names, self.sequences, counts, strict=True)}

    def _streamed_ledger(self, rows: int) -> Ledger:
        """Return the ledger of all that was read for the first `rows` rows, in whole blocks."""
        total = Ledger()
        for stream, count in zip(self.streams, self.turns.counts(rows), strict=True):
            total.merge(stream.ledger(count))
        total.note("Streamed: all that was read until now, in whole blocks of the buffer.")
        return total

    def states(self, step: int) -> list[dict[str, Any]]:
        """Return what a checkpoint after `step` keeps of streamed texts, one state for each stream."""
        counts = self._rows_before(step)
        states = [each.state(rows) for each, rows in zip(self.streams, counts, strict=False)]
        return [state | {"identity": self._identity} for state in states]

    def _rows_before(self, step: int) -> list[int]:
        """Return how many rows each sequence gives before `step`."""
        return self.turns.counts(max(0, self.plan.rows_at(max(0, step))))

    def first_epoch(self) -> tuple[Bins, np.ndarray]:
        """Return the rows of the first epoch, those of each source once, and the tokens of their documents in order."""
        rounds = [sequence.first_round() for sequence in self.sequences]
        starts = np.cumsum([0, *(len(bins.order) for bins, _ in rounds)])
        offsets = [bins.offsets[:-1] + start for (bins, _), start in zip(rounds, starts, strict=False)]
        order = np.concatenate([bins.order for bins, _ in rounds])
        return Bins(order, np.concatenate([*offsets, starts[-1:]])), np.concatenate([each for _, each in rounds])

    def documents(self, position: int) -> list[int]:
        """Return the row indices in bin `position` of the endless sequence; after the last epoch there are none."""
        if self.plan.total_rows is not None and position >= self.plan.total_rows:
            return []
        source, row = self.turns.place(position)
        return self.sequences[source].documents(row)

    def row_indices(self, step: int, micro: int, rank: int) -> list[int]:
        """Return the row indices of micro-batch `micro` of step `step` (both from 0) on process `rank`."""
        return [k for position in self._positions(step, micro, rank) for k in self.documents(position)]

    def prompt_numbers(self, step: int, micro: int, rank: int) -> list[int]:
        """Return which prompt of an ensemble is trained on each row of `row_indices`: drawn by seed and position."""
        numbers = []
        for position in self._positions(step, micro, rank):
            # A key that no epoch has (data/order.py), because seeds are below 2**32.
            rng = np.random.Generator(np.random.Philox(key=[2**32 + self.options.seed, position]))
            drawn = rng.integers(self.options.prompt_ensemble, size=len(self.documents(position)))
            numbers += drawn.repeat(self.rows.rows_per_unit).tolist()
        return numbers

    def _positions(self, step: int, micro: int, rank: int) -> list[int]:
        """Return the places in the endless sequence that micro-batch `micro` of `step` takes on process `rank`."""
        if micro >= self.micro_batches_in(step):
            return []  # a step of the warmup has fewer
        start, rows = self.plan.rows_at(step), self.plan.rows_in(step)
        return [start + int(place) for place in self._places(step)[micro, rank] if place < rows]

    def micro_batches_in(self, step: int) -> int:
        """Return how many micro-batches of `step` (from 0) have a row on some process: `accumulation`, after a warmup."""
        return -(-self.plan.rows_in(step) // (self.options.per_device_train_batch_size * self.world))

    def _deal_step(self, step: int) -> np.ndarray:
        """Return the slots of `step` for each process, int64 [micro-batches, processes, rows]; some may be empty."""
        size, micro_batches = self.options.per_device_train_batch_size, self.micro_batches_in(step)
        slots = np.arange(micro_batches * self.world * size)
        if not is_dealt(self.options, self.world):
            return slots.reshape(micro_batches, self.world, size)
        start, rows, longest = self.plan.rows_at(step), self.plan.rows_in(step), self.options.max_length
        documents = [self.documents(start + k) if k < rows else [] for k in slots.tolist()]
        lengths = (
            self._lengths_of if not across(self.options) else lambda part: self._lengths_of(part).sum(keepdims=True)
        )
        work = [work_of(lengths(part), longest) for part in documents]
        return deal_rows(np.array(work), size, self.world, bool(self.options.packing))

    def _lengths_of(self, documents: list[int]) -> np.ndarray:
        """Return the tokens of documents that count against `max_length`, int64 [n]."""
        if isinstance(self.rows, StreamedRows):
            return self.rows.lengths_of(documents) + self.options.virtual_tokens
        return self._lengths[documents]

    def _sources_of(self, documents: list[int]) -> list[int]:
        """Return the number of the source of each document."""
        found = self.rows.sources_of(documents) if isinstance(self.rows, StreamedRows) else self._source[documents]
        return found.tolist()

    def batch(self, indices: list[int]) -> Batch:
        """Return the rows, or pairs, at `indices` as one batch, on the CPU."""
        options = self.options
        return self.collate(self.rows, indices, bool(options.packing), self.pad_token_id, options.virtual_tokens)

    def micro_batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch `micro` of step `step` (both from 0) of this process, on the CPU."""
        parts = [self.documents(position) for position in self._positions(step, micro, self.rank)]
        indices = [k for part in parts for k in part]
        batch = self.batch(indices)
        if self.options.prompt_ensemble > 1:
            batch["prompt_numbers"] = torch.tensor(self.prompt_numbers(step, micro, self.rank) or [0])
        if len(self.source_names) > 1 and not isinstance(self.options, AnswerOptions | ClassifyOptions):
            add_sources(batch, self._sources_of(indices), self.source_names)
        if across(self.options):
            attend_across(batch, [len(part) for part in parts if part])
        return batch

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches from the start of `first_step` on, without end."""
        step = first_step
        while True:
            for sequence, row in zip(self.sequences, self._rows_before(step - STEPS_KEPT), strict=True):
                sequence.forget_before(row)
            for micro in range(self.micro_batches_in(step)):
                yield self.micro_batch(step, micro)
            step += 1
