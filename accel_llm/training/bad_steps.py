"""Steps whose loss or gradient is not finite: skipped by all processes alike, counted, and named by their rows."""

import math

import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_hosts
from accel_llm.config.options import TrainOptions
from accel_llm.data.stream import Stream
from accel_llm.errors import DataError

MAX_NAMED_ROWS = 20  # rows at most


class BadSteps:
    """How many steps were skipped because their gradient was not finite."""

    def __init__(self, accelerator: Accelerator, stream: Stream, options: TrainOptions, skipped: int = 0):
        self.accelerator, self.stream, self.options = accelerator, stream, options
        self.skipped = skipped

    def check(self, step: int, losses: list[torch.Tensor], grad_norm: float) -> None:
        """Count step `step` (from 1), if its gradient was not finite: the weights are what they were.

        `losses` are those of this process's micro-batches.

        The norm is the same on all processes, so all of them come here. fp16's loss scale grows until a gradient is too
        large for it: where all losses are finite that is no sickness.

        Raises:
            DataError: it is one step too many; its rows are named.
        """
        if math.isfinite(grad_norm):
            return
        sick = self._sick_micro_batches(losses)
        if self.accelerator.mixed_precision == "fp16" and not sick:
            return
        self.skipped += 1
        what = "loss" if sick else "gradient"
        rows = ", ".join(self._rows(step, sick))
        allowed = self.options.max_skipped_steps
        if self.skipped > allowed:
            raise DataError(
                f"max_skipped_steps: the {what} of step {step} is not finite, which makes {self.skipped} such steps where "
                f"{allowed} are allowed; it is that of {rows}. Look at these rows, or lower learning_rate."
            )
        if self.accelerator.is_main_process:
            print(f"step {step} skipped: its {what} is not finite ({self.skipped} of {allowed}); {rows}", flush=True)

    def _sick_micro_batches(self, losses: list[torch.Tensor]) -> list[tuple[int, int]]:
        """(process, micro-batch) wherever the loss is not finite."""
        world, count = self.accelerator.num_processes, len(losses)
        flags = [0.0] * (world * count)
        for micro, loss in enumerate(losses):
            flags[self.accelerator.process_index * count + micro] = float(not math.isfinite(float(loss)))
        return [divmod(k, count) for k, flag in enumerate(sum_on_hosts(self.accelerator, flags)) if flag]

    def _rows(self, step: int, sick: list[tuple[int, int]]) -> list[str]:
        """The rows of the sick micro-batches, or of the whole step where only the gradient is."""
        world, stream = self.accelerator.num_processes, self.stream
        where = sick or [(rank, micro) for rank in range(world) for micro in range(stream.accumulation)]
        found = [stream.rows.name(k) for rank, micro in where for k in stream.chosen(step - 1, micro, rank)]
        return found[:MAX_NAMED_ROWS] + (
            [f"and {len(found) - MAX_NAMED_ROWS} more"] if len(found) > MAX_NAMED_ROWS else []
        )
