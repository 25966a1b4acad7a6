"""Loss and throughput: one line per logging step on the screen, in metrics.jsonl and in the trackers."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_cpus
from accel_llm.config.options import RunOptions
from accel_llm.data.batches import Batch
from accel_llm.data.stream import TrainingPlan
from accel_llm.report.answers_file import drop_answers_after, keep_answers
from accel_llm.report.likelihood import ChosenLikelihood
from accel_llm.report.record import Record
from accel_llm.report.sharing import share_run
from accel_llm.report.trackers import RunTrackers
from accel_llm.report.update_ratio import UpdateRatio, ratio_of
from accel_llm.system.disk import write_atomically
from accel_llm.system.progress import Bar, console, format_seconds


class Meter:
    """Sums the loss on the device, and reads the sum once per logging step.

    So the meter makes the loop wait for the device in those steps only. Tokens are counted on the host.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: RunOptions,
        plan: TrainingPlan,
        record: Record,
        step: int = 0,
        state: Sequence[float] = (0.0,) * 5,
        optimizer: Any = None,
    ):
        """Start the sums of a run. `step` and `state` are those of the checkpoint that a run resumes from.

        With the `optimizer` its updates are measured in the steps that are logged.
        """
        self.accelerator, self.options, self.plan, self.record = accelerator, options, plan, record
        self.file = Path(options.output_dir) / "metrics.jsonl"
        self.supervised = 0  # labeled targets up to the last line of metrics, over all processes
        self.trackers, self.likelihood = RunTrackers(accelerator, options, record, step), ChosenLikelihood(options)
        self.step = step  # the last one that was taken
        self.updates = UpdateRatio(optimizer, lambda: self._is_due(self.step + 1)) if optimizer else None
        self.status = ""  # beside the bar: where the run is and how it goes
        self._reset(state)
        if accelerator.is_main_process and step:
            lines = _drop_lines(self.file, lambda line: line["step"] > step)  # what this run does again
            self.supervised = max((line.get("supervised_tokens", 0) for line in lines), default=0)
            drop_answers_after(self.file.parent, step)
            if any(map(self.likelihood.add, lines)):  # the warning was printed then
                record.update(warning=self.likelihood.warning)
        record.begin_after(step)
        self.bar = None if options.check_only else Bar("train", plan.total_steps, step, logged=False)
        record.stop_progress = self.close

    def _reset(self, state: Sequence[float] = (0.0,) * 5) -> None:
        # The sums of loss and weight of the targets, without losses that are not finite; then targets and tokens.
        self.sums = torch.tensor(state[:2], dtype=torch.float64, device=self.accelerator.device)
        self.targets, self.tokens = state[2:4]
        self.since = time.perf_counter() - state[4]
        # What a loss measured beside: the sum and the number of the values of each metric. The names come with the
        # first batch.
        measured = torch.tensor(state[5:], dtype=torch.float64, device=self.accelerator.device)
        self.measured, self.measured_names = measured.view(-1, 2), ()

    def state(self) -> list[float]:
        """Return the sums of this process since the last line of metrics, the seconds since then, what losses measured."""
        seconds = time.perf_counter() - self.since
        return [*self.sums.tolist(), self.targets, self.tokens, seconds, *self.measured.flatten().tolist()]

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Add one micro-batch of this process: its summed loss, labeled targets, and tokens without padding.

        A loss that is not finite is left out of the mean; `BadSteps` decides whether its step is skipped. `measured` in
        the batch are further metrics: for each a tensor [2], the sum of its values and their number.
        """
        loss = loss.detach().double()
        finite = loss.isfinite()
        self.sums[0] += torch.where(finite, loss, 0.0)
        self.sums[1] += finite.double() * batch["total_weight"]
        if measured := batch.get("measured"):
            self.measured_names = tuple(measured)
            values = torch.where(finite, torch.stack(list(measured.values())), 0.0)
            self.measured = self.measured + values if len(self.measured) else values
        self.targets += batch["num_targets"]
        # A batch without targets only fills a slot of the last step: it has no real tokens. Virtual tokens are none.
        real = sum(batch["lengths"]) - len(batch.get("virtual_positions", ()))
        self.tokens += real if batch["num_targets"] else 0

    def _is_due(self, step: int) -> bool:
        """Return whether metrics are logged at `step`: every `logging_steps`, first and last step.

        A run that may stop early writes them before each evaluation too, since it can be the last one.
        """
        options = self.options
        may_be_last = options.early_stopping_patience and options.eval_steps and step % options.eval_steps == 0
        return bool(step % options.logging_steps == 0 or step in (1, self.plan.total_steps) or may_be_last)

    def log(self, step: int, learning_rate: float, grad_norm: float, skipped: int = 0) -> None:
        """Write the metrics of step `step` (from 1) if they are due. `skipped` steps up to it have changed no weight."""
        self.step = step
        if self.bar:
            self.bar.update(step, self.status)
        if not self._is_due(step):
            return
        device = self.accelerator.device
        updates = self.updates.take(device) if self.updates else torch.zeros(2, dtype=torch.float64, device=device)
        values = torch.cat([self.sums, updates, self.measured.flatten()]).tolist()  # the host waits for the device
        sums = sum_on_cpus(self.accelerator, [self.targets, self.tokens, *values])
        targets, tokens, loss, weight, changes, weights, *measured = sums
        ratio = ratio_of(changes, weights)
        seconds = time.perf_counter() - self.since
        self.supervised += int(targets)
        if self.plan.streamed_ledger:
            self.record.update(ledger=self.plan.streamed_ledger(self.plan.rows_at(step)).to_dict())
        self.write(
            step,
            {
                "loss": loss / weight if weight else float("nan") if targets else 0.0,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                **({} if ratio is None else {"update_ratio": ratio}),
                **({"skipped_steps": skipped} if skipped else {}),
                "tokens_per_second": round(tokens / seconds, 1),
                "supervised_tokens": self.supervised,
                "epoch": self.plan.epoch(step),
                "peak_memory_mb": peak_memory_mb(self.accelerator.device),
            }
            | {f"epoch/{name}": epochs for name, epochs in self.plan.source_epochs(step).items()}
            | measured_means(self.measured_names, measured),
        )
        self._reset()

    def write(self, step: int, values: dict[str, Any], answers: Sequence[dict[str, Any]] = ()) -> None:
        """Write `values` as one JSON object to metrics.jsonl, and send them to the trackers and the screen.

        `answers` are those of an evaluation, for report.html, which is written anew if it is due, or after an evaluation.
        """
        self.trackers.log(values, step)
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_json_line({"step": step} | values))
            file.flush()
            # A checkpoint may follow, and a resumed run takes these lines as written: they must survive a crash.
            os.fsync(file.fileno())
        if "epoch" in values:
            self.status = _status(values)
        shown = [_format_metric(k, v) for k, v in values.items() if _on_screen(k)]
        if self.bar and "epoch" in values and not console.is_terminal and step < self.plan.total_steps:
            shown.append(f"left {format_seconds(self.bar.seconds_left())}")  # on a terminal the bar says it
        self._print(f"step {step}/{self.plan.total_steps}  {'  '.join(shown)}")
        if self.likelihood.add({"step": step} | values):
            self.record.update(warning=self.likelihood.warning)
            self._print(f"warning: {self.likelihood.warning}")
        with self.pause_clock():
            keep_answers(self.file.parent, step, list(answers))
            self.record.refresh_page(now="eval/loss" in values)

    def keep(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """Keep the answers of `step` for report.html, in place of those that it had."""
        if self.accelerator.is_main_process:
            keep_answers(self.file.parent, step, list(answers))
            self.record.refresh_page(now=True)

    def _print(self, line: str) -> None:
        if console.is_terminal:
            console.print(line, markup=False, emoji=False)
        else:
            print(line, flush=True)

    def drop_evaluation(self, step: int) -> None:
        """Remove the evaluation of `step` from metrics.jsonl, if a run that this one continues had written it."""
        if self.accelerator.is_main_process and self.file.is_file():
            _drop_lines(self.file, lambda line: line["step"] == step and "eval/loss" in line)

    def pause_clock(self) -> "_PausedClock":
        """Return a context whose time (evaluating, saving) does not count in tokens per second."""
        return _PausedClock(self)

    def close(self) -> None:
        """Remove the progress bar."""
        if self.bar:
            self.bar.close()

    def end_run(self) -> None:
        """Close the trackers and upload the export, if that was asked for, as the last things that a script does.

        The process groups are not destroyed, as by `Accelerator.end_training`: run_script ends the process at once, and
        torch 2.13 can deadlock there (pytorch 56297). The destructor of a gloo group waits for a lock while it holds
        Python's, and the group's own thread, which frees the tensors of its last sum, waits for Python's.

        Raises:
            ConfigError: the run is done and its weights are there, but something beside the training failed.
        """
        self.trackers.finish()
        share_run(self.accelerator, self.options, self.record)
        self.record.raise_problems()


def _on_screen(name: str) -> bool:
    """Return whether a line on the screen has room for a metric; metrics.jsonl has all of them."""
    if name.startswith(("loss/", "epoch/", "eval/perplexity/", "eval/bits_per_byte/")):  # of single sources
        return False
    of_one_side = name.endswith(("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"))
    return name in SCREEN_NAMES or ("/" in name and not of_one_side)


def measured_means(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Return the mean of each of the metrics `names`; `sums` has for each the sum of its values and their number.

    The margin is the difference of the mean rewards. A metric without any value is left out: KTO has none of chosen
    answers in a step with rejected ones alone.
    """
    totals, counts = sums[0::2], sums[1::2]
    means = {name: a / n for name, a, n in zip(names, totals, counts, strict=True) if n}
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


class _PausedClock:
    def __init__(self, meter: Meter):
        self.meter = meter

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.meter.since += time.perf_counter() - self.start


# Metrics that are printed, with their names on the screen; those of an evaluation are printed too.
SCREEN_NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "tokens_per_second": "tok/s",
    "kl": "kl",
    "accuracy": "accuracy",
}


def _format_metric(name: str, value: Any) -> str:
    text = (
        f"{value:.2e}"
        if name == "learning_rate"
        else f"{value:,.0f}"
        if name == "tokens_per_second"
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )
    return f"{SCREEN_NAMES.get(name, name)} {text}"


def _status(values: dict[str, Any]) -> str:
    metrics = [_format_metric(k, values[k]) for k in ("loss", "tokens_per_second") if k in values]
    return "  ".join([f"epoch {values['epoch']:.2f}", *metrics])


def _json_line(values: dict[str, Any]) -> str:
    """Return one line of metrics.jsonl. JSON has neither NaN nor infinity, so such a number is written as null."""
    nulls = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(values | nulls, allow_nan=False) + "\n"


def _drop_lines(file: Path, is_dropped: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Remove lines of metrics.jsonl; return the others. A line that a killed run wrote in part goes too."""
    remaining = []
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        with suppress(json.JSONDecodeError):
            values = json.loads(line)
            remaining += [] if is_dropped(values) else [values]
    write_atomically(file, "".join(map(_json_line, remaining)))
    return remaining


def peak_memory_mb(device: torch.device) -> int:
    """Return the peak memory of this process in MiB: allocated on the GPU, or, without one, resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) // 2**20
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) // 2**20
