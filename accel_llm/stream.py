"""The order of rows and the endless stream of micro-batches.

Position in the stream is the number of rows (packed bins) consumed by all processes together, and order is a pure
function of (seed, epoch): a resumed run needs nothing but a step number, whatever its world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from accel_llm.data import Rows
from accel_llm.distributed import accumulation_steps, rows_per_step
from accel_llm.options import TrainOptions
from accel_llm.order import arranged, mixed
from accel_llm.packing import collate_packed, collate_padded
from accel_llm.sources import source_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How many rows and steps a run has; pure arithmetic, the same on every process."""

    bins: int  # packed rows (or plain rows) in one epoch
    rows_per_step: int
    total_rows: int | None  # stream ends here (epochs), or never (max_steps)
    total_steps: int

    def epoch(self, step: int) -> float:
        return round(min(step * self.rows_per_step, self.total_rows or step * self.rows_per_step) / self.bins, 4)


class Stream:
    """Micro-batches of one process, from any step on, without end.

    Step s takes rows s * rows_per_step .. (s + 1) * rows_per_step of the endless sequence of epochs; micro-batch and
    process decide only who computes which. Slots without a row (the last step, or a `total_batch_size` that the
    processes do not divide) hold two tokens with no label, which add nothing to sum or count.
    """

    def __init__(self, rows: Rows, options: TrainOptions, rank: int, world: int, pad_token_id: int):
        self.rows, self.options = rows, options
        self.rank, self.world, self.pad = rank, world, pad_token_id
        self.accumulation = accumulation_steps(options)
        weights = [source_of(place).weight for place in options.train_files]
        self.mixed, self._lengths = mixed(rows.source, weights, options.seed), rows.lengths
        self._epoch = lru_cache(maxsize=2)(partial(arranged, self.mixed, self._lengths, options))
        bins, per_step = len(self._epoch(0).offsets) - 1, rows_per_step(options)
        if options.max_steps is not None:
            self.plan = Plan(bins, per_step, None, options.max_steps)
        else:
            total = max(1, round(options.num_train_epochs * bins))
            self.plan = Plan(bins, per_step, total, -(-total // per_step))

    def documents(self, position: int) -> list[int]:
        """The rows of bin `position` of the endless sequence; none beyond the end of the last epoch."""
        if self.plan.total_rows is not None and position >= self.plan.total_rows:
            return []
        epoch, index = divmod(position, self.plan.bins)
        order, offsets = self._epoch(epoch)
        return order[offsets[index] : offsets[index + 1]].tolist()

    def micro_batch(self, step: int, micro: int) -> Batch:
        size = self.options.per_device_train_batch_size
        first = micro * self.world * size + self.rank * size
        slots = range(first, min(first + size, self.plan.rows_per_step))
        chosen = [k for slot in slots for k in self.documents(step * self.plan.rows_per_step + slot)]
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
