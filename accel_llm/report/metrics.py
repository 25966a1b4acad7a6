"""Loss and throughput: one line a logging step on the screen, in metrics.jsonl and in the trackers."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from accel_llm.backend.collectives import sum_over_processes
from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import RunOptions
from accel_llm.data.batches import Batch, count_targets, total_weight
from accel_llm.data.stream import TrainingPlan
from accel_llm.system.disk import write_atomically

console = Console(highlight=False)


class Meter:
    """Sums loss and tokens on the device and reads them once a logging step, the loop's one synchronisation point."""

    def __init__(
        self,
        accelerator: Accelerator,
        options: RunOptions,
        plan: TrainingPlan,
        step: int = 0,
        state: Sequence[float] = (0.0,) * 5,
    ):
        """`step` and `state` are those at which a resumed run goes on."""
        self.accelerator, self.options, self.plan = accelerator, options, plan
        self.file = Path(options.output_dir) / "metrics.jsonl"
        self.supervised = 0
        # Trackers take numbers and texts; without any the call does nothing.
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in resolved_options(options).items()}
        accelerator.init_trackers(options.run_name or "accel-llm", config=settings)
        self._reset(state)
        if accelerator.is_main_process and step:
            self.supervised = _forget_after(self.file, step)
        self.progress = _progress(accelerator, plan, step)

    def _reset(self, state: Sequence[float] = (0.0,) * 5) -> None:
        # loss, its weight, targets, tokens
        self.sums = torch.tensor(state[:4], dtype=torch.float64, device=self.accelerator.device)
        self.since = time.perf_counter() - state[4]

    def state(self) -> list[float]:
        """What this process has summed up since the last line of metrics, and the seconds since then."""
        return [*self.sums.tolist(), time.perf_counter() - self.since]

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Count one micro-batch of this process: its summed loss, labelled targets and real tokens.

        A loss that is not finite is left out of the mean; `BadSteps` decides whether its step counts at all.
        """
        finite = loss.detach().isfinite()
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        targets = count_targets(batch["labels"])
        self.sums[0] += torch.where(finite, loss.detach(), 0.0)
        self.sums[1] += total_weight(batch) * finite
        self.sums[2] += targets
        # Without targets it is no row at all but what fills a slot of the last step.
        self.sums[3] += tokens * (targets > 0)

    def log(self, step: int, learning_rate: float, grad_norm: float) -> None:
        """Report step `step` (from 1) when it is due: every `logging_steps`, and the first and last one."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=step)
        if step % self.options.logging_steps and step not in (1, self.plan.total_steps):
            return
        loss, weight, targets, tokens = sum_over_processes(self.accelerator, self.sums).tolist()
        seconds = time.perf_counter() - self.since
        self.supervised += int(targets)
        self.write(
            step,
            {
                "loss": loss / weight if weight else float("nan") if targets else 0.0,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": round(tokens / seconds, 1),
                "supervised_tokens": self.supervised,
                "epoch": self.plan.epoch(step),
                "peak_memory_mb": peak_memory_mb(self.accelerator.device),
            },
        )
        self._reset()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One JSON object to metrics.jsonl, the same numbers to the trackers, a line to the screen."""
        self.accelerator.log(values, step=step)
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_json_line({"step": step} | values))
            file.flush()
            # A resumed run goes on after these lines, whatever becomes of the machine.
            os.fsync(file.fileno())
        line = f"step {step}/{self.plan.total_steps}  " + "  ".join(
            _shown(k, v) for k, v in values.items() if k in SHOWN_METRICS or "/" in k
        )
        if self.progress:
            self.progress.update(self.progress.task_ids[0], status=_status(values))
            self.progress.console.print(line)
        else:
            print(line, flush=True)

    def pause_clock(self) -> "_Pause":
        """Time spent inside (evaluating, saving) does not count against tokens per second."""
        return _Pause(self)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()


class _Pause:
    def __init__(self, meter: Meter):
        self.meter = meter

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.meter.since += time.perf_counter() - self.start


SHOWN_METRICS = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad", "tokens_per_second": "tok/s"}


def _shown(name: str, value: Any) -> str:
    text = (
        f"{value:.2e}"
        if name == "learning_rate"
        else f"{value:,.0f}"
        if name == "tokens_per_second"
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )
    return f"{SHOWN_METRICS.get(name, name)} {text}"


def _status(values: dict[str, Any]) -> str:
    return "  ".join(_shown(k, values[k]) for k in ("loss", "learning_rate", "tokens_per_second") if k in values)


def _progress(accelerator: Accelerator, plan: TrainingPlan, first_step: int) -> Progress | None:
    """A live bar on a terminal; nothing in a log file, where the lines say it all."""
    if not (accelerator.is_main_process and console.is_terminal):
        return None
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task("train", total=plan.total_steps, completed=first_step, status="")
    progress.start()
    return progress


def _json_line(values: dict[str, Any]) -> str:
    """One line of metrics.jsonl; JSON has no NaN and no infinity, so a sick number is written as null."""
    sick = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(values | sick, allow_nan=False) + "\n"


def _forget_after(file: Path, step: int) -> int:
    """Drop the lines of steps that a resumed run does again; returns the supervised tokens counted up to `step`."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
            continue
        if values["step"] <= step:
            kept.append(values)
    write_atomically(file, "".join(map(_json_line, kept)))
    return max((values.get("supervised_tokens", 0) for values in kept), default=0)


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
