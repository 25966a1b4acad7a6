"""The order of rows and the endless stream of micro-batches.

Position in the stream is the number of rows (packed bins) consumed by all processes together, and order is a pure
function of (seed, epoch): a resumed run needs nothing but that number, whatever its world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from accel_llm.backend.strategy import accumulation_steps, rows_per_step
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import Batch, collate
from accel_llm.data.order import arrange_epoch, mix_sources
from accel_llm.data.rows import Rows
from accel_llm.data.sources import as_source


@dataclass(frozen=True, kw_only=True)
class Position:
    """Which process this is, and how far the stream has been consumed."""

    rank: int = 0
    world: int = 1
    step: int = 0
    rows: int = 0  # consumed by all processes together


@dataclass(frozen=True)
class TrainingPlan:
    """How many rows and steps a run has; pure arithmetic, the same on every process."""

    bins: int  # packed rows (or plain rows) in one epoch
    rows_per_step: int
    total_rows: int | None  # stream ends here (epochs), or never (max_steps)
    total_steps: int
    first_step: int = 0  # from which on a step has rows_per_step rows
    first_row: int = 0

    def rows_at(self, step: int) -> int:
        """Rows of the stream that lie before `step` (from 0), filled slots included."""
        return self.first_row + (step - self.first_step) * self.rows_per_step

    def epoch(self, step: int) -> float:
        rows = self.rows_at(step)
        return round(min(rows, self.total_rows or rows) / self.bins, 4)


class Stream:
    """Micro-batches of one process, from any step on, without end.

    Step s takes rows s * rows_per_step .. (s + 1) * rows_per_step of the endless sequence of epochs, counted from `start`
    where a checkpoint had another number of rows in a step; micro-batch and process decide only who computes which. Slots without a row (the last step, or a `total_batch_size` that the
    processes do not divide) hold two tokens with no label, which add nothing to sum or count.
    """

    def __init__(self, rows: Rows, options: TrainOptions, start: Position, pad_token_id: int):
        self.rows, self.options = rows, options
        self.rank, self.world, self.pad, self.start = start.rank, start.world, pad_token_id, start
        self.accumulation = accumulation_steps(options)
        weights = [as_source(place).weight for place in options.train_files]
        self.mixed, self._lengths = mix_sources(rows.source, weights, options.seed), rows.lengths
        self._epoch = lru_cache(maxsize=2)(partial(arrange_epoch, self.mixed, self._lengths, options))
        bins, per_step = len(self._epoch(0).offsets) - 1, rows_per_step(options)
        total = None if options.max_steps is not None else max(1, round(options.num_train_epochs * bins))
        left = -(-max(0, total - start.rows) // per_step) if total is not None else 0
        steps = options.max_steps or start.step + left
        self.plan = TrainingPlan(bins, per_step, total, steps, start.step, start.rows)

    def documents(self, position: int) -> list[int]:
        """The rows of bin `position` of the endless sequence; none beyond the end of the last epoch."""
        if self.plan.total_rows is not None and position >= self.plan.total_rows:
            return []
        epoch, index = divmod(position, self.plan.bins)
        order, offsets = self._epoch(epoch)
        return order[offsets[index] : offsets[index + 1]].tolist()

    def chosen(self, step: int, micro: int, rank: int) -> list[int]:
        """The rows of the micro-batch `micro` of step `step` (both from 0) on process `rank`."""
        size = self.options.per_device_train_batch_size
        first = micro * self.world * size + rank * size
        slots = range(first, min(first + size, self.plan.rows_per_step))
        return [k for slot in slots for k in self.documents(self.plan.rows_at(step) + slot)]

    def micro_batch(self, step: int, micro: int) -> Batch:
        return collate(self.rows, self.chosen(step, micro, self.rank), bool(self.options.packing), self.pad)

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Micro-batches from the start of `first_step` on."""
        step = first_step
        while True:
            for micro in range(self.accumulation):
                yield self.micro_batch(step, micro)
            step += 1
