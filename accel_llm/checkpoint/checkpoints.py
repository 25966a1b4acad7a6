"""Saves checkpoints and decides when. A checkpoint folder exists complete or not at all, and a resumed run is bit-equal.

A checkpoint is the folder `checkpoints/step-XXXXXXXX`:

    state.json                 step, position in the data, options and fingerprints, shared by all processes
    rank-00000.json            one process's random generators, its sums since the last metrics line, optimizer counters
    rank-00000.safetensors     this process's ranges of the trained weights and of the optimizer's state (see pieces.py)
    manifest.json              size and SHA-256 of every file; written last, then one rename makes the folder appear
"""

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from accel_llm.backend.collectives import agree_on_requests, max_over_processes, new_cpu_group, wait_for_all
from accel_llm.checkpoint.files import copy_tensors, write_rank_files
from accel_llm.checkpoint.load import load_run_state, load_trained_weights
from accel_llm.checkpoint.randomness import generator_states
from accel_llm.checkpoint.rehearsal import LossOfBatch, rehearse
from accel_llm.checkpoint.resume import remove_obsolete_files
from accel_llm.checkpoint.shares import (
    fixed_tensors,
    local_shares,
    loss_scale_state,
    share_tensors,
)
from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import TrainOptions
from accel_llm.data.stream import Stream, TrainingPlan
from accel_llm.errors import ConfigError
from accel_llm.report.metrics import Meter
from accel_llm.system.disk import disk_errno, disk_failure
from accel_llm.system.exit import DISK_ADVICE
from accel_llm.system.folders import hidden_sibling
from accel_llm.system.manifest import find_damage, find_parts, remove_folder, seal_folder
from accel_llm.system.progress import shown
from accel_llm.system.signals import Preempted, ignore_further_signals, signal_requests, stop_deferring_signals
from accel_llm.system.tensors import find_nonfinite
from accel_llm.training.bad_steps import BadSteps
from accel_llm.training.check_steps import timed_steps
from accel_llm.training.evaluation import Evaluation
from accel_llm.training.intervals import SaveClock
from accel_llm.training.start import Start


class Checkpoints:
    """Decides when a run saves, writes and rotates checkpoints, and loads one. Every process makes the same calls."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        options: TrainOptions,
        start: Start,
    ):
        self.accelerator, self.model, self.optimizer, self.scheduler = accelerator, model, optimizer, scheduler
        self.options, self.start = options, start
        self.folder = Path(options.output_dir) / "checkpoints"
        self.best, self.saved_step, self.clock, self.step_seconds = start.best, start.step, SaveClock(options), []
        # For save_async: the thread that writes, its error, and the copies that it writes from.
        self.writer: threading.Thread | None = None
        self.writer_error: BaseException | None = None
        self.buffers: dict[str, torch.Tensor] = {}
        # The thread needs a process group of its own: training uses the default one at the same time.
        self.group = new_cpu_group() if options.save_async else None

    def resume(self) -> None:
        """Load the checkpoint that the run starts from, if any, and remove what the run replaces in `output_dir`.

        Before it, each process gets a seed of its own, for dropout and noise.
        """
        set_seed(self.options.seed, device_specific=True)
        load_run_state(self.accelerator, self.model, self.optimizer, self.scheduler, self.start, self.options.seed)
        wait_for_all()
        if self.accelerator.is_main_process:
            remove_obsolete_files(self.start)
        wait_for_all()

    def rehearse(self, export: Callable[..., Path], evaluation: Evaluation, stream: Stream, loss: LossOfBatch) -> None:
        """Try what the run does late, see rehearsal.py; `loss` is that of the loop. All processes must call it."""
        if self.options.preflight:
            shares = local_shares(self.accelerator, self.model, self.optimizer)
            rehearse(self.accelerator, self.model, shares, self._local_state(), export, evaluation, stream, loss)

    def steps_left(self, plan: TrainingPlan, evaluation: Evaluation) -> Iterator[int]:
        """Yield the steps to take: up to the last one of `plan`, until the run stops early, or a few with `check_only`."""
        if self.start.evaluate:  # the evaluation that was interrupted, and done again now
            self._judge(evaluation, self.start.step)
        if self.options.check_only:
            return (yield from timed_steps(plan, self.accelerator.device, self.step_seconds))
        step = self.start.step
        while step < plan.total_steps and not self.stops_early:
            step += 1
            yield step

    @property
    def stops_early(self) -> bool:
        """Whether `early_stopping_patience` evaluations in a row had no new best."""
        patience = self.options.early_stopping_patience
        return patience is not None and self.best.later >= patience

    def _judge(self, evaluation: Evaluation, step: int) -> None:
        """Compare the evaluation of `step`, if there was one, with the best so far.

        It may have no value: the rows do not define each metric, and a model that diverged has none.
        """
        if (metric := self.options.metric_for_best_model) and evaluation.step == step:
            value = evaluation.metrics.get(metric, math.nan)
            if not math.isfinite(value):
                said = f"the evaluation after step {step:,} has no finite {metric}, so it is not the best one"
                self.accelerator.print(f"metric_for_best_model: {said}")
            self.best = self.best.after(step, value, metric)

    def when_due(self, meter: Meter, evaluation: Evaluation, bad_steps: BadSteps, step: int) -> None:
        """Save every `save_steps`, at the last step, at the best evaluation, and when a signal or the clock asks for it.

        Raises:
            Preempted: a signal asked the run to stop; it has been saved.
            ConfigError: a checkpoint could not be written, or would hold a NaN.
        """
        # A thread that failed in the background ends the run here.
        self._check_writer()
        stop, save = agree_on_requests(self.accelerator, self.clock.is_due())
        # All reasons for a save: a signal, the best evaluation so far, the last step, and every save_steps.
        self._judge(evaluation, step)
        best, last = self.best.step == step, step == meter.plan.total_steps or self.stops_early
        every = self.options.save_steps
        if stop or save or best or last or (every and step % every == 0):
            signal_requests.save = False
            with meter.pause_clock():
                self._save(
                    meter, evaluation, bad_steps, step, in_background=self.options.save_async and not (stop or last)
                )
                meter.record.refresh_page(now=True)
        # The state is on the disk: end the run, and let no other signal disturb that.
        if stop:
            meter.close()
            ignore_further_signals()
            raise Preempted(signal_requests.stop or signal.SIGTERM, step)

    def finish(self, export: Callable[[], Path], evaluation: Evaluation, meter: Meter) -> Path:
        """End of training: export, and then evaluate for the last time. Returns the folder of the export.

        The weights are exported first, because an evaluation may fail. With metric_for_best_model these are the best
        so far; if the last ones turn out to be better, they are exported in their place. Why a run stopped early is
        printed and written to run.json.

        Raises:
            RuntimeError: the last evaluation failed. The export is complete.
        """
        stop_deferring_signals()
        meter.close()
        last, record, before = self.saved_step, meter.record, self.best
        if last < meter.plan.total_steps:
            self._explain_early_stop(meter, last)
        exported = self._load_best(meter)
        folder = export()
        record.update(exported_step=exported, last_step=last)
        if exported != last:
            self._load_weights(last)

        evaluation.at_end(self.model, meter, folder, last)
        record.update(samples=evaluation.samples)
        self._judge(evaluation, last)
        if self.best.step == last != before.step:
            if exported != last:
                export()
                record.update(exported_step=last)
            if self.accelerator.is_main_process:
                self._remove_old(self._folder(last))
        metric = self.options.metric_for_best_model
        if metric and self.best.step is None and evaluation.step == last and self.accelerator.is_main_process:
            record.add_problem(
                f"metric_for_best_model: no evaluation had a finite {metric}, so the export has the weights of step "
                f"{last:,}, the last ones."
            )
        return folder

    def _explain_early_stop(self, meter: Meter, step: int) -> None:
        total, reason = meter.plan.total_steps, self.best.describe(str(self.options.metric_for_best_model))
        sentence = f"stopped after step {step:,} of {total:,}: {reason}"
        meter.record.update(early_stopping=sentence)
        self.accelerator.print(
            f"early stopping: {sentence}; the learning rate followed the schedule of {total:,} steps"
        )

    def _load_best(self, meter: Meter) -> int:
        """Load the weights of the best checkpoint so far, if there is one, and return the step of the weights."""
        # Without metric_for_best_model, or if the last checkpoint is the best one, the weights are right already.
        if self.best.step is None or self.best.step == self.saved_step:
            return self.saved_step
        folder = self._folder(self.best.step)
        if problem := find_damage(folder):
            if self.accelerator.is_main_process:
                meter.record.add_problem(
                    f"metric_for_best_model: the best checkpoint, {folder}, {problem}; the export has the weights of "
                    f"step {self.saved_step}, the last ones."
                )
            return self.saved_step
        self._load_weights(self.best.step)
        return self.best.step

    def _load_weights(self, step: int) -> None:
        load_trained_weights(self.accelerator, self.model, self.optimizer, self._folder(step))

    def _folder(self, step: int) -> Path:
        # The checkpoint that the run continues, and those before it, may be in another output_dir.
        start = self.start.folder
        folder = self.folder if start is None or step > self.start.step else start.parent
        return folder / f"step-{step:08d}"

    @shown("save")
    def _save(self, meter: Meter, evaluation: Evaluation, bad_steps: BadSteps, step: int, in_background: bool) -> None:
        self._finish_writer()
        if step == self.saved_step:
            return
        folder, main = self._folder(step), self.accelerator.is_main_process
        partial = hidden_sibling(folder, "partial")

        # Collect everything that is saved while training waits.
        with self._cleaning_up_errors(step):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            wait_for_all()
            tensors, values = self._local_state()
            values |= {"meter": meter.state(), "randomness": generator_states(self.accelerator.device)}
            shared = self._shared_state(meter, evaluation, bad_steps, step) if main else None
            if in_background:
                tensors = copy_tensors(tensors, self.buffers)

        # Write it now, or in a thread while training goes on.
        arguments = (step, partial, folder, tensors, values, shared)
        if in_background:
            self.writer = threading.Thread(target=self._write_in_background, args=arguments)
            self.writer.start()
        else:
            with self._cleaning_up_errors(step):
                self._write(*arguments)
            wait_for_all()
        self.saved_step, self.clock = step, SaveClock(self.options)

    def _local_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors that this process writes, and its values for JSON."""
        sharded = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if sharded or self.accelerator.is_main_process:
            shares = local_shares(self.accelerator, self.model, self.optimizer)
            tensors, numbers = share_tensors(shares, self.optimizer)
        else:  # under DDP the main process has the same tensors and writes them
            tensors, numbers = {}, {}
        if self.accelerator.is_main_process:
            tensors |= fixed_tensors(self.accelerator, self.model)
        return tensors, {"numbers": numbers, "tensors": list(tensors)}

    def _shared_state(self, meter: Meter, evaluation: Evaluation, bad_steps: BadSteps, step: int) -> dict[str, Any]:
        """Return the content of state.json."""
        return {
            "step": step,
            "rows": meter.plan.rows_at(step),
            "total_steps": meter.plan.total_steps,
            "streams": bad_steps.stream.states(step),
            "processes": self.accelerator.num_processes,
            "options": resolved_options(self.options),
            "identity": self.start.identity,
            "scale": loss_scale_state(self.accelerator, self.optimizer),
            "best": astuple(self.best),
            "evaluate": evaluation.cut_short,
        } | bad_steps.state()

    def _write(
        self,
        step: int,
        partial: Path,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        values: dict[str, Any],
        shared: dict[str, Any] | None,
    ) -> None:
        """Write this process's files. The main process then waits for all, shows the folder, and removes old ones.

        Raises:
            OSError: the disk failed on this process or on another one; all of them raise it.
            ConfigError: a tensor holds a NaN or an infinity.
        """
        if nonfinite := find_nonfinite(tensors):
            raise ConfigError(
                f"checkpoints: after step {step} {len(nonfinite)} tensors hold a NaN or an infinity "
                f"({', '.join(nonfinite[:3])}), so it is not saved; the earlier checkpoints are intact. Lower "
                "learning_rate, or look at the data."
            )
        # A disk that fails on one process stops all of them: no rank may wait for files that never come.
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        number, disk_error = 0, None
        try:
            write_rank_files(partial, rank, tensors, values, shared)
        except Exception as error:
            if not (number := disk_errno(error)):
                raise
            disk_error = error
        if number := max_over_processes(number, self.group):
            raise disk_error or OSError(number, os.strerror(number))
        # The main process waits for the list of files of each process, and makes the manifest of them.
        if rank:
            return
        while (parts := find_parts(partial, world)) is None:
            time.sleep(0.02)
        seal_folder(partial, folder, parts)
        self._remove_old(folder)

    def _remove_old(self, newest: Path) -> None:
        """Remove all checkpoints but the last `save_total_limit` ones and the best one."""
        best = None if self.best.step is None else self._folder(self.best.step).name
        folders = sorted(path for path in self.folder.glob("step-*") if path.name <= newest.name)
        for path in folders[: -self.options.save_total_limit]:
            if path.name != best:
                remove_folder(path)

    def _write_in_background(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self.writer_error = error

    def _check_writer(self) -> None:
        """Raise the error of the thread that writes, if it had one."""
        if self.writer_error is not None:
            with self._cleaning_up_errors(self.saved_step):
                raise self.writer_error

    def _finish_writer(self) -> None:
        """Wait until the checkpoint that is being written is complete on all processes."""
        if self.writer is not None:
            self.writer.join()
            self._check_writer()
            self.writer = None
            wait_for_all()

    @contextlib.contextmanager
    def _cleaning_up_errors(self, step: int) -> Any:
        """If the block fails, remove the unfinished checkpoint. An error of the disk becomes a ConfigError."""
        try:
            yield
        except Exception as error:
            # Main process only: removing files under a rank that still writes would hide the real error.
            if self.accelerator.is_main_process:
                shutil.rmtree(hidden_sibling(self._folder(step), "partial"), ignore_errors=True)
            if reason := disk_failure(error):
                raise ConfigError(
                    f"checkpoints: step {step} could not be written: {DISK_ADVICE.format(reason)}"
                ) from error
            raise
