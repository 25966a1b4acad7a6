"""The order of rows and the endless stream of micro-batches.

Position in the stream is the number of rows (packed bins) consumed by all processes together, and order is a pure
function of (seed, epoch): a resumed run needs nothing but that number, whatever its world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel_llm.backend.accelerator import accumulation_steps, rows_per_step
from accel_llm.config.options import TrainOptions
from accel_llm.data.order import arranged, mixed
from accel_llm.data.packing import collate_packed, collate_padded
from accel_llm.data.rows import Rows
from accel_llm.data.sources import source_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Where a run begins and what it takes over: nothing at step 0, else what a checkpoint holds, `folder`."""

    output_dir: Path
    identity: dict[str, Any] = field(default_factory=dict)  # what makes the run this run
    rank: int = 0
    world: int = 1
    folder: Path | None = None
    step: int = 0
    rows: int = 0  # of the stream that have been consumed
    same_processes: bool = True  # as many as saved the checkpoint
    meter: tuple[float, ...] = (0.0,) * 5  # this process's sums since the last line of metrics
    skipped: int = 0  # steps whose gradient was not finite
    best: tuple[int, float] | None = None  # step and metric of the best checkpoint
    evaluate: bool = False  # an evaluation of this step was due and was cut short
    changed: tuple[str, ...] = ()  # options that differ from the checkpoint's, and are allowed to


@dataclass(frozen=True)
class Plan:
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

    def __init__(self, rows: Rows, options: TrainOptions, start: Start, pad_token_id: int):
        self.rows, self.options = rows, options
        self.rank, self.world, self.pad, self.start = start.rank, start.world, pad_token_id, start
        self.accumulation = accumulation_steps(options)
        weights = [source_of(place).weight for place in options.train_files]
        self.mixed, self._lengths = mixed(rows.source, weights, options.seed), rows.lengths
        self._epoch = lru_cache(maxsize=2)(partial(arranged, self.mixed, self._lengths, options))
        bins, per_step = len(self._epoch(0).offsets) - 1, rows_per_step(options)
        total = None if options.max_steps is not None else max(1, round(options.num_train_epochs * bins))
        left = -(-max(0, total - start.rows) // per_step) if total is not None else 0
        steps = options.max_steps or start.step + left
        self.plan = Plan(bins, per_step, total, steps, start.step, start.rows)

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
        chosen = self.chosen(step, micro, self.rank)
        rows = [self.rows[k] for k in chosen] or [(np.full(2, self.pad, np.int32), np.full(2, -100, np.int32))]
        weights = self.rows.weights_of(chosen)
        return collate_packed(rows, weights) if self.options.packing else collate_padded(rows, self.pad, weights)

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Micro-batches from the start of `first_step` on."""
        step = first_step
        while True:
            for micro in range(self.accumulation):
                yield self.micro_batch(step, micro)
            step += 1


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
