"""The order of rows and the endless stream of micro-batches.

Position in the stream is the number of rows (packed bins) consumed by all processes together, and order is a pure
function of (seed, epoch): a resumed run needs nothing but a step number, whatever its world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from accel_llm.data import Rows
from accel_llm.distributed import accumulation_steps, rows_per_step
from accel_llm.options import TrainOptions
from accel_llm.packing import collate_packed, collate_padded, pack

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
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        bins, per_step = len(self._epoch(0)[1]) - 1, rows_per_step(options)
        if options.max_steps is not None:
            self.plan = Plan(bins, per_step, None, options.max_steps)
        else:
            total = max(1, round(options.num_train_epochs * bins))
            self.plan = Plan(bins, per_step, total, -(-total // per_step))

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows in order and where each bin begins in it: (int64 [rows], int64 [bins + 1])."""
        rng = np.random.Generator(np.random.Philox(key=[self.options.seed, epoch]))
        if self.options.packing:
            packed = pack(self.rows.lengths, self.options.max_length, rng)
            return packed.order, packed.offsets
        return rng.permutation(len(self.rows)), np.arange(len(self.rows) + 1)

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
        return collate_packed(rows) if self.options.packing else collate_padded(rows, self.pad)

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Micro-batches from the start of `first_step` on."""
        step = first_step
        while True:
            for micro in range(self.accumulation):
                yield self.micro_batch(step, micro)
            step += 1


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
