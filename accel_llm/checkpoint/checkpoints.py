"""Checkpoints: whole or absent, written while training waits or goes on, rotated, and continued to the last bit.

A checkpoint is the folder `checkpoints/step-XXXXXXXX`:

    state.json                 step, position in the data, options and fingerprints: the same on all processes
    rank-00000.json            one process's generators, its sums since the last line of metrics, single optimizer values
    rank-00000.safetensors     what this process holds of the trained weights and of the optimizer's state (`pieces`)
    manifest.json              size and SHA-256 of every file; written last, then one rename makes the folder appear
"""

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from accel_llm.backend.collectives import agree_on_requests, max_over_processes, new_host_group, wait_for_all
from accel_llm.checkpoint.pieces import PieceReader, Share
from accel_llm.checkpoint.randomness import randomness, set_randomness
from accel_llm.checkpoint.resume import make_room, rank_file
from accel_llm.checkpoint.shares import fill_weights, load_shares, local_shares, share_tensors
from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.report.metrics import Meter
from accel_llm.system.disk import disk_errno, disk_failure, sha256, sync_to_disk
from accel_llm.system.exit import DISK_ADVICE
from accel_llm.system.manifest import find_damage, read_parts, remove_folder, seal_folder, write_part
from accel_llm.system.signals import Preempted, note_all_saved, note_nothing_to_lose, requested
from accel_llm.system.tensors import names_not_finite, write_tensors
from accel_llm.training.bad_steps import BadSteps
from accel_llm.training.evaluation import LOWER_IS_BETTER, Evaluation
from accel_llm.training.start import Start


class Checkpoints:
    """All that a run saves and takes up again, and when. Every process makes the same calls."""

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
        self.best, self.saved = start.best, start.step
        self.writer: threading.Thread | None = None
        self.group = new_host_group() if options.save_async else None
        self.failed: BaseException | None = None
        self.buffers: dict[str, torch.Tensor] = {}

    def resume(self) -> None:
        """Bring model, optimizer, schedule and generators to the state of the checkpoint, and make `output_dir` ready."""
        if self.start.folder is not None:
            self._load(self.start.folder)
        wait_for_all()
        if self.accelerator.is_main_process:
            make_room(self.start)
        wait_for_all()

    def when_due(self, meter: Meter, evaluation: Evaluation, health: BadSteps, step: int) -> None:
        """Save every `save_steps`, at the end, when this is the best so far, and when somebody asks for it by a signal.

        Raises:
            Preempted: the run was asked to stop, and is saved.
            ConfigError: a checkpoint could not be written, or would hold a NaN.
        """
        self._check_writer()
        stop, wish = agree_on_requests(self.accelerator)
        better, last = self._is_better(evaluation, step), step == meter.plan.total_steps
        every = self.options.save_steps
        if stop or wish or better or last or (every and step % every == 0):
            requested.save = False
            with meter.pause_clock():
                self._save(
                    meter, evaluation, health, step, in_background=self.options.save_async and not (stop or last)
                )
        if stop:
            meter.close()
            note_all_saved()
            raise Preempted(requested.stop or signal.SIGTERM, step)

    def _is_better(self, evaluation: Evaluation, step: int) -> bool:
        name = self.options.metric_for_best_model
        if name is None or evaluation.step != step:
            return False
        value = evaluation.metrics[name]
        sign = 1 if name in LOWER_IS_BETTER else -1
        if not math.isfinite(value) or (self.best is not None and sign * value >= sign * self.best[1]):
            return False
        self.best = (step, value)
        return True

    def finish(self) -> int:
        """Training is over: take the weights of the best checkpoint, if that was asked for. The step that they are of.

        Raises:
            ConfigError: its files are no longer what was written.
        """
        note_nothing_to_lose()
        if self.best is None or self.best[0] == self.saved:
            return self.saved
        folder = self._folder(self.best[0])
        if problem := find_damage(folder):
            raise ConfigError(f"metric_for_best_model: the best checkpoint, {folder}, {problem}.")
        reader = _reader(folder)
        for owner in local_shares(self.accelerator, self.model, self.optimizer):
            fill_weights(owner, reader)
        self._refresh()
        return self.best[0]

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # --- saving ------------------------------------------------------------------------------------------------------

    def _save(self, meter: Meter, evaluation: Evaluation, health: BadSteps, step: int, in_background: bool) -> None:
        self._finish_writer()
        if step == self.saved:
            return
        folder, main = self._folder(step), self.accelerator.is_main_process
        partial = folder.with_name(f".{folder.name}.partial")
        with self._told(step):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            wait_for_all()
            tensors, values = self._mine()
            values |= {"meter": meter.state(), "randomness": randomness(self.accelerator.device)}
            shared = self._shared(meter, evaluation, health, step) if main else None
            if in_background:
                tensors = self._snapshot(tensors)
        arguments = (step, partial, folder, tensors, values, shared)
        if in_background:
            self.writer = threading.Thread(target=self._write_in_background, args=arguments)
            self.writer.start()
        else:
            with self._told(step):
                self._write(*arguments)
            wait_for_all()
        self.saved = step

    def _mine(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What this process has to write: tensors, and what is not one."""
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP) or (
            self.accelerator.is_main_process
        ):
            found = local_shares(self.accelerator, self.model, self.optimizer)
            tensors, numbers = share_tensors(found, self.optimizer)
        else:  # a copy of what the main process has
            tensors, numbers = {}, {}
        return tensors, {"numbers": numbers, "tensors": list(tensors)}

    def _shared(self, meter: Meter, evaluation: Evaluation, health: BadSteps, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "rows": meter.plan.rows_at(step),
            "processes": self.accelerator.num_processes,
            "options": resolved_options(self.options),
            "identity": self.start.identity,
            "scale": _state_of(self._scale()),
            "best": self.best,
            "evaluate": evaluation.cut_short,
            "skipped": health.skipped,
        }

    def _snapshot(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies that training does not change, in memory that is kept from one checkpoint to the next."""
        for name, tensor in tensors.items():
            if name not in self.buffers:
                pinned = tensor.device.type == "cuda"
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self.buffers[name].copy_(tensor, non_blocking=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return {name: self.buffers[name] for name in tensors}

    def _write(
        self,
        step: int,
        partial: Path,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        values: dict[str, Any],
        shared: dict[str, Any] | None,
    ) -> None:
        """Write this process's files; when all have, the main one makes the folder appear and removes old ones.

        Raises:
            OSError: the disk failed this process or another one; all of them raise it.
            ConfigError: there is a NaN in it.
        """
        if sick := names_not_finite(tensors):
            raise ConfigError(
                f"checkpoints: after step {step} {len(sick)} tensors hold a NaN or an infinity ({', '.join(sick[:3])}), so it "
                "is not saved; the checkpoints before it are whole. Lower learning_rate, or look at the data."
            )
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        number, error = 0, None
        try:
            _write_files(partial, rank, tensors, values, shared)
        except Exception as failed:
            if not (number := disk_errno(failed)):
                raise
            error = failed
        if number := max_over_processes(number, self.group):
            raise error or OSError(number, os.strerror(number))
        if rank:
            return
        while (found := read_parts(partial, world)) is None:
            time.sleep(0.02)
        seal_folder(partial, folder, found)
        best = self.best[0] if self.best else None
        old = sorted(path for path in self.folder.glob("step-*") if path.name <= folder.name)
        for path in old[: -self.options.save_total_limit]:
            if best is None or path != self._folder(best):
                remove_folder(path)

    def _write_in_background(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self.failed = error

    def _check_writer(self) -> None:
        """Raises what went wrong in the background."""
        if self.failed is not None:
            with self._told(self.saved):
                raise self.failed

    def _finish_writer(self) -> None:
        """Wait until what is written in the background is whole, on all processes."""
        if self.writer is not None:
            self.writer.join()
            self._check_writer()
            self.writer = None
            wait_for_all()

    @contextlib.contextmanager
    def _told(self, step: int) -> Any:
        """A disk that fails is told in a sentence; nothing half-written stays where there is any way to remove it."""
        try:
            yield
        except Exception as error:
            # Not by the others: who still writes there would fail by that, and tell it instead of the cause.
            if self.accelerator.is_main_process:
                folder = self._folder(step)
                shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
            if told := disk_failure(error):
                raise ConfigError(
                    f"checkpoints: step {step} could not be written: {DISK_ADVICE.format(told)}"
                ) from error
            raise

    # --- loading -----------------------------------------------------------------------------------------------------

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        reader = _reader(folder)
        found = local_shares(self.accelerator, self.model, self.optimizer)
        _check_same_names(folder, found, reader)
        load_shares(found, self.optimizer, reader)
        self._refresh()
        self._set_schedule(state["step"])
        if self.accelerator.scaler is not None:
            self._scale().load_state_dict(state["scale"])
        elif self._scale() is not None:
            vars(self._scale()).update(state["scale"])
        if self.start.same_processes:
            set_randomness(rank_file(folder, self.accelerator.process_index)["randomness"], self.accelerator.device)
        else:
            set_seed(hash((self.options.seed, self.start.step)) % 2**31, device_specific=True)

    def _set_schedule(self, step: int) -> None:
        """The schedule is a pure function of the options and of the step."""
        self.scheduler.last_epoch = step
        rates = [
            rate * rule(step) for rate, rule in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates

    def _scale(self) -> Any:
        """What scales the loss in fp16: Accelerate's, or DeepSpeed's; None where nothing does."""
        return self.accelerator.scaler or getattr(getattr(self.optimizer, "optimizer", None), "loss_scaler", None)

    def _refresh(self) -> None:
        """Give the weights that DeepSpeed computes with the values of its float32 ones."""
        engine: Any = getattr(self.optimizer, "optimizer", None)
        if hasattr(engine, "single_partition_of_fp32_groups"):
            engine.update_lp_params()
        elif hasattr(engine, "fp32_partitioned_groups_flat"):
            engine._partition_all_parameters()
            for k in range(len(engine.fp32_partitioned_groups_flat)):
                engine._reassign_or_swap_out_partitioned_parameters(k)
            # Small ones are kept whole on every process.
            if engine.persistent_parameters:
                engine.persistent_parameters[0].all_gather(engine.persistent_parameters)


def _state_of(scale: Any) -> dict[str, Any]:
    """What a loss scaler has learnt: torch's tells it, DeepSpeed's has plain attributes."""
    return scale.state_dict() if hasattr(scale, "state_dict") else dict(vars(scale)) if scale is not None else {}


def _write_files(
    partial: Path, rank: int, tensors: dict[str, torch.Tensor], values: dict[str, Any], shared: dict[str, Any] | None
) -> None:
    """What one process has to write, and the list of it."""
    files = {}
    for name, content in {f"rank-{rank:05d}.json": values, "state.json": shared}.items():
        if content is not None:
            files[name] = _write_json(partial / name, content)
    if tensors:
        name = f"rank-{rank:05d}.safetensors"
        files[name] = write_tensors(partial / name, tensors)
    write_part(partial, rank, files)


def _write_json(path: Path, content: dict[str, Any]) -> tuple[int, str]:
    path.write_text(json.dumps(content), encoding="utf-8")
    sync_to_disk(path)
    return path.stat().st_size, sha256(path)


def _reader(folder: Path) -> PieceReader:
    numbers: dict[str, Any] = {}
    expected: list[str] = []
    for path in sorted(folder.glob("rank-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        numbers |= values["numbers"]
        expected += values["tensors"]
    return PieceReader(folder, sorted(folder.glob("rank-*.safetensors")), numbers, expected)


def _check_same_names(folder: Path, found: list[Share], reader: PieceReader) -> None:
    """What is trained here is what was saved: each process sees the names of what it holds."""
    unknown = {piece.name for owner in found for piece in owner.pieces} - reader.names().keys()
    if unknown:
        raise ConfigError(
            f"resume_from_checkpoint: {folder} holds other weights than this run trains ({min(unknown)} is not there); the "
            "method or model differs."
        )
