"""Steps that change no weight: their loss or gradient is not finite, or far above those before (`spike_threshold`).

All processes skip them, count them and name their rows.
"""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_cpus
from accel_llm.backend.strategy import engine, strategy
from accel_llm.config.options import TrainOptions
from accel_llm.data.stream import Stream
from accel_llm.errors import DataError
from accel_llm.training.loop import may_step
from accel_llm.training.start import Start

MAX_NAMED_ROWS = 20
SPIKE_WINDOW = 128  # steps whose mean and deviation a step is compared with
Pair = tuple[float, float]  # loss and norm of the gradient of a step


class BadSteps:
    """Decides which steps are skipped, and counts them. A resumed run counts and decides as if it had not stopped."""

    def __init__(self, accelerator: Accelerator, stream: Stream, options: TrainOptions, start: Start):
        self.accelerator, self.stream, self.options = accelerator, stream, options
        self.skipped, self.spikes = start.skipped, start.spikes  # not finite; finite, but far above those before
        self.recent: list[Pair] = list(start.recent)  # of the last steps, spikes among them
        self.spike = ""  # why the step at hand is skipped, if it is a spike

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, for `Start`."""
        return {"skipped": self.skipped, "spikes": self.spikes, "recent": self.recent}

    @property
    def all_skipped(self) -> int:
        """The number of steps that changed no weight."""
        return self.skipped + self.spikes

    def may_step(self, losses: list[torch.Tensor], targets: float, grad_norm: float) -> bool:
        """Return whether to call `optimizer.step`; see `loop.may_step`. A spike is skipped too.

        `losses` are the summed ones of this process, `targets` and `grad_norm` those of the whole step. With
        `spike_threshold` it costs one all-reduce in a step, and the host waits for the losses.
        """
        self.spike, threshold = "", self.options.spike_threshold
        if threshold is not None and self.accelerator.sync_gradients:
            loss = sum_on_cpus(self.accelerator, [float(sum(losses))])[0] / targets
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.spike = describe_spike(self.recent, (loss, grad_norm), threshold)
                self.recent = [*self.recent[1 - SPIKE_WINDOW :], (loss, grad_norm)]
        if self.spike and self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # the gradient was unscaled, and its step will not come
        return not self.spike and may_step(self.accelerator, grad_norm)

    def check(self, step: int, losses: list[torch.Tensor], grad_norm: float) -> None:
        """Count step `step` (from 1) if it was skipped, and say so. Such a step has changed no weight.

        `losses` are those of this process's micro-batches. `grad_norm` is the same on all processes, so all of them
        make the same decision.

        Raises:
            DataError: more than `max_skipped_steps` steps were skipped. It names the rows of this one.
        """
        if self.spike:
            self.spikes += 1
            self.accelerator.print(f"step {step} skipped: {self.spike}; {', '.join(self._row_names(step, []))}")
            self.spike = ""
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


def spike_problems(options: TrainOptions) -> list[str]:
    """Return a sentence if no step can be skipped under the strategy of the launch YAML."""
    if options.spike_threshold is None or engine() != "deepspeed":
        return []
    return [
        f"spike_threshold: under {strategy()} DeepSpeed steps inside the backward pass, before anybody knows the norm of the "
        "gradient, so no spike can be skipped; remove it, or use ddp.yaml or fsdp2.yaml."
    ]


def describe_spike(recent: list[Pair], now: Pair, threshold: float) -> str:
    """Say how the loss or the norm of a step is a spike; empty if it is none, or fewer than SPIKE_WINDOW are known.

    A spike is more than `threshold` standard deviations above the mean of `recent`. Spikes stay among them: so they do
    not hide a run whose loss has risen for good, which goes on after some skipped steps.
    """
    if len(recent) < SPIKE_WINDOW:
        return ""
    means, deviations = np.mean(recent, axis=0), np.std(recent, axis=0, ddof=1)
    for name, value, mean, deviation in zip(("loss", "gradient norm"), now, means, deviations, strict=True):
        if deviation > 0 and value > mean + threshold * deviation:
            far = f"{(value - mean) / deviation:.1f} standard deviations above the mean {mean:.4g}"
            return f"its {name} {value:.4g} is {far} of the {SPIKE_WINDOW} steps before"
    return ""
