"""Steps whose loss or gradient is not finite: all processes skip them, count them and name their rows."""

import math

import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_cpus
from accel_llm.config.options import TrainOptions
from accel_llm.data.stream import Stream
from accel_llm.errors import DataError

MAX_NAMED_ROWS = 20


class BadSteps:
    """Counts the steps that were skipped because their gradient was not finite."""

    def __init__(self, accelerator: Accelerator, stream: Stream, options: TrainOptions, skipped: int = 0):
        self.accelerator, self.stream, self.options = accelerator, stream, options
        self.skipped = skipped

    def check(self, step: int, losses: list[torch.Tensor], grad_norm: float) -> None:
        """Count step `step` (from 1) if its gradient was not finite. Such a step has changed no weight.

        `losses` are those of this process's micro-batches. `grad_norm` is the same on all processes, so all of them
        make the same decision.

        Raises:
            DataError: more than `max_skipped_steps` steps were skipped. It names the rows of this one.
        """
        if math.isfinite(grad_norm):
            return
        bad = self._bad_micro_batches(losses)
        # fp16's loss scale grows until a gradient overflows: with finite losses that is how it works, and no fault.
        if self.accelerator.mixed_precision == "fp16" and not bad:
            return
        self.skipped += 1
        what = "loss" if bad else "gradient"
        rows = ", ".join(self._row_names(step, bad))
        allowed = self.options.max_skipped_steps
        if self.skipped > allowed:
            raise DataError(
                f"max_skipped_steps: the {what} of step {step} is not finite ({self.skipped} such steps, {allowed} "
                f"allowed). Its rows: {rows}. Look at them, or lower learning_rate."
            )
        if self.accelerator.is_main_process:
            print(f"step {step} skipped: its {what} is not finite ({self.skipped} of {allowed}); {rows}", flush=True)

    def _bad_micro_batches(self, losses: list[torch.Tensor]) -> list[tuple[int, int]]:
        """Return (process, micro-batch) of each loss that is not finite, over all processes."""
        world, count = self.accelerator.num_processes, len(losses)
        flags = [0.0] * (world * count)
        for micro, loss in enumerate(losses):
            flags[self.accelerator.process_index * count + micro] = float(not math.isfinite(float(loss)))
        return [divmod(k, count) for k, flag in enumerate(sum_on_cpus(self.accelerator, flags)) if flag]

    def _row_names(self, step: int, bad: list[tuple[int, int]]) -> list[str]:
        """Return the names of the rows in the `bad` micro-batches; of all rows if only the gradient is not finite."""
        world, stream = self.accelerator.num_processes, self.stream
        places = bad or [(rank, micro) for rank in range(world) for micro in range(stream.accumulation)]
        names = [stream.rows.name(k) for rank, micro in places for k in stream.row_indices(step - 1, micro, rank)]
        more = [f"and {len(names) - MAX_NAMED_ROWS} more"] if len(names) > MAX_NAMED_ROWS else []
        return names[:MAX_NAMED_ROWS] + more
