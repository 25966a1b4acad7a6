"""The endless stream of micro-batches.

A position in the stream is the number of rows (packed bins) that all processes together have consumed. The order of
rows is a pure function of seed and epoch, so a resumed run needs no more than this number, whatever its number of
processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from accel_llm.backend.strategy import accumulation_steps, rows_per_step
from accel_llm.config.options import TrainOptions
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.batches import Batch, collate
from accel_llm.data.order import arrange_epoch, mix_sources
from accel_llm.data.packing import Bins, pack
from accel_llm.data.rows import Rows
from accel_llm.data.sources import as_source
from accel_llm.system.progress import tracked


@dataclass(frozen=True, kw_only=True)
class Position:
    """The rank of this process, and how much of the stream is consumed."""

    rank: int = 0
    world: int = 1  # number of processes
    step: int = 0
    rows: int = 0  # consumed by all processes together
    saved: dict[str, int] = field(default_factory=dict)  # elements of each tensor of the checkpoint that is continued


@dataclass(frozen=True)
class TrainingPlan:
    """The number of rows and steps of a run: pure arithmetic, the same on every process."""

    bins: int  # packed rows (or plain rows) in one epoch
    rows_per_step: int
    total_rows: int | None  # rows until the stream ends; None with max_steps: it never ends
    total_steps: int
    first_step: int = 0  # the step at which this run starts; from here on a step has rows_per_step rows
    first_row: int = 0

    def rows_at(self, step: int) -> int:
        """Return the rows of the stream before `step` (from 0), empty slots included."""
        return self.first_row + (step - self.first_step) * self.rows_per_step

    def epoch(self, step: int) -> float:
        """Return the epochs that are complete before `step`, to 4 digits."""
        rows = self.rows_at(step)
        return round(min(rows, self.total_rows or rows) / self.bins, 4)


# Makes a batch of rows, or pairs, at indices: (rows, indices, packed, pad_token_id, virtual).
Collate = Callable[[Any, list[int], bool, int, int], Batch]


def _packed_lengths(rows: Rows | Pairs, options: TrainOptions) -> np.ndarray:
    """Return the tokens of each row, or pair, that count against `max_length`, int64 [n].

    A pair whose prompt cannot be shared has it twice, and may be longer than `max_length`: it fills a row alone.
    """
    return np.minimum(rows.lengths + options.virtual_tokens * rows.rows_per_unit, options.max_length)


def _epochs(rows: Rows | Pairs, options: TrainOptions) -> Callable[[int], Bins]:
    """Return the function that gives the bins of an epoch (from 0)."""
    weights = [as_source(place).weight for place in options.train_files]
    epoch_rows = mix_sources(rows.source, weights, options.seed)
    return partial(arrange_epoch, epoch_rows, _packed_lengths(rows, options), options)


def padding_share(rows: Rows, options: TrainOptions, rows_per_step: int) -> float:
    """Return the share of padding in the tokens that the first epoch computes, if rows are not packed.

    A row is as long as the longest row of its micro-batch. `rows` may be pairs of answers, which a step counts as one.
    """
    units, lengths = as_units(rows, share_prompts=False), rows.lengths + options.virtual_tokens
    answers = lengths.reshape(len(units), -1)[_epochs(units, options)(0).order]  # [units, rows in a unit]

    # A micro-batch begins where a step does, and after each `per_device_train_batch_size` rows of it.
    places = np.arange(len(answers))
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

    Step s takes the rows s * rows_per_step to (s + 1) * rows_per_step of the endless sequence of epochs. A resumed run
    counts from `start`, since its checkpoint may have had another number of rows per step. The number of processes and
    of micro-batches only decides which process computes which row. Some slots have no row: those after the last row,
    and those of a `total_batch_size` that is no multiple of the processes. They hold two tokens without a label, which
    add nothing to a sum or a count.

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
        self.rows, self.options, self.collate = rows, options, collate
        self.rank, self.world, self.pad_token_id = start.rank, start.world, pad_token_id
        self.accumulation, self.saved = accumulation_steps(options), start.saved

        # Two epochs stay in memory, because a step may reach into the next one.
        self._arrange_epoch = lru_cache(maxsize=2)(_epochs(rows, options))

        # How many rows and steps are left from `start` on.
        bins, per_step = len(self._arrange_epoch(0).offsets) - 1, rows_per_step(options)
        total = None if options.max_steps is not None else max(1, round(options.num_train_epochs * bins))
        steps_left = -(-max(0, total - start.rows) // per_step) if total is not None else 0
        steps = options.max_steps or start.step + steps_left
        self.plan = TrainingPlan(bins, per_step, total, steps, start.step, start.rows)

    def first_epoch(self) -> Bins:
        """Return the rows of the first epoch, packed if the options say so, in their order."""
        return self._arrange_epoch(0)

    def documents(self, position: int) -> list[int]:
        """Return the row indices in bin `position` of the endless sequence; after the last epoch there are none."""
        if self.plan.total_rows is not None and position >= self.plan.total_rows:
            return []
        epoch, index = divmod(position, self.plan.bins)
        order, offsets = self._arrange_epoch(epoch)
        return order[offsets[index] : offsets[index + 1]].tolist()

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

    def _positions(self, step: int, micro: int, rank: int) -> range:
        """Return the places in the endless sequence that micro-batch `micro` of `step` takes on process `rank`."""
        size, start = self.options.per_device_train_batch_size, self.plan.rows_at(step)
        first = micro * self.world * size + rank * size
        return range(start + first, start + min(first + size, self.plan.rows_per_step))

    def batch(self, indices: list[int]) -> Batch:
        """Return the rows, or pairs, at `indices` as one batch, on the CPU."""
        options = self.options
        return self.collate(self.rows, indices, bool(options.packing), self.pad_token_id, options.virtual_tokens)

    def micro_batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch `micro` of step `step` (both from 0) of this process, on the CPU."""
        batch = self.batch(self.row_indices(step, micro, self.rank))
        if self.options.prompt_ensemble > 1:
            batch["prompt_numbers"] = torch.tensor(self.prompt_numbers(step, micro, self.rank) or [0])
        return batch

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches from the start of `first_step` on, without end."""
        step = first_step
        while True:
            for micro in range(self.accumulation):
                yield self.micro_batch(step, micro)
            step += 1
