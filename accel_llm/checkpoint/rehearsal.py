"""Tries before the first step what a run does late: what would fail after hours fails now, in one sentence.

Tried are a step on the longest rows, the forward pass of an evaluation on them, a generated answer, a checkpoint that is
written and read back, and the export. What is written goes into a hidden folder and is removed. No weight, gradient or
random number of the run is changed.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from accel_llm.backend.accelerator import unwrap_model
from accel_llm.backend.collectives import max_over_processes, wait_for_all
from accel_llm.backend.strategy import engine
from accel_llm.checkpoint.files import open_checkpoint, write_rank_files
from accel_llm.checkpoint.pieces import WEIGHT, Share
from accel_llm.checkpoint.randomness import generator_states, set_generator_states
from accel_llm.data.batches import Batch, to_device
from accel_llm.data.stream import Stream
from accel_llm.errors import ConfigError
from accel_llm.model.evaluating import evaluating
from accel_llm.system.folders import hidden_sibling
from accel_llm.system.progress import shown
from accel_llm.training.evaluation import Evaluation, exact_match, select_questions
from accel_llm.training.preflight import parameter_counts

MAX_BYTES = 2**30  # what is larger is not written twice: it would take longer than seconds

LossOfBatch = Callable[[nn.Module, Batch], torch.Tensor]


@shown("try what comes later")
def rehearse(
    accelerator: Accelerator,
    model: Any,
    shares: list[Share],
    state: tuple[dict[str, torch.Tensor], dict[str, Any]],
    export: Callable[..., Path],
    evaluation: Evaluation,
    stream: Stream,
    loss: LossOfBatch,
) -> None:
    """Try everything. All processes must call it.

    `shares` and `state` are what this process writes into a checkpoint, `export` writes the result into `folder`, and
    `loss` is that of the loop.

    Raises:
        ConfigError: a checkpoint is not read back as it was written, or what was exported cannot be loaded.
    """
    with _generators_kept(accelerator.device):
        _take_step(accelerator, model, longest_rows(stream, stream.options.per_device_train_batch_size), loss)
        if evaluation.rows is not None:
            _evaluate(accelerator, model, longest_rows(stream, stream.options.per_device_eval_batch_size), loss)
            _generate(accelerator, model, evaluation)
        folder = hidden_sibling(Path(stream.options.output_dir) / "rehearsal", "partial")
        try:
            _save_and_reload(accelerator, folder / "checkpoint", shares, state)
            counts = parameter_counts(unwrap_model(accelerator, model))
            if 4 * counts["total" if evaluation.options.method == "full" else "trainable"] <= MAX_BYTES:
                export(folder=folder / "export")
        finally:
            wait_for_all()
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)


def longest_rows(stream: Stream, count: int) -> Batch:
    """Return a batch of the `count` rows of the first epoch that hold the longest documents, on the CPU."""
    bins, lengths = stream.first_epoch()
    longest = np.maximum.reduceat(lengths, bins.offsets[:-1])
    chosen = np.argsort(-longest, kind="stable")[:count]
    documents = [int(k) for b in chosen for k in bins.order[bins.offsets[b] : bins.offsets[b + 1]]]
    batch = stream.batch(documents)
    if stream.options.prompt_ensemble > 1:
        batch["prompt_numbers"] = torch.zeros(len(documents) * stream.rows.rows_per_unit, dtype=torch.long)
    return batch


def _take_step(accelerator: Accelerator, model: Any, batch: Batch, loss: LossOfBatch) -> None:
    """Run forward and backward, and drop the gradients. DeepSpeed cannot drop them, so there is no backward pass."""
    # Without a sum over the processes, which DDP would begin in each backward pass.
    with accelerator.no_sync(model) if engine() == "ddp" else nullcontext():
        value = loss(model, to_device(batch, accelerator.device))
        if engine() != "deepspeed":
            value.backward()
    for parameter in model.parameters():
        if engine() != "deepspeed":
            parameter.grad = None


def _evaluate(accelerator: Accelerator, model: Any, batch: Batch, loss: LossOfBatch) -> None:
    with evaluating(model):
        loss(model, to_device(batch, accelerator.device))


def _generate(accelerator: Accelerator, model: Any, evaluation: Evaluation) -> None:
    """Generate the first tokens of one answer, if evaluations generate any."""
    questions = select_questions(evaluation.rows, min(evaluation.options.eval_generate, 1))  # type: ignore[arg-type]
    if questions:
        prompt, answer = questions[0]
        exact_match(accelerator, model, evaluation.tokenizer, [(prompt, answer[:1])], 1, evaluation.stop_ids)


def _save_and_reload(
    accelerator: Accelerator, folder: Path, shares: list[Share], state: tuple[dict[str, torch.Tensor], dict[str, Any]]
) -> None:
    """Write the checkpoint that the run would write now, and compare this process's weights with what is read back."""
    tensors, values = state
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if max_over_processes(own, None) * accelerator.num_processes > MAX_BYTES:
        return
    if accelerator.is_main_process:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
    wait_for_all()
    write_rank_files(folder, accelerator.process_index, tensors, values, None)
    wait_for_all()
    reader = open_checkpoint(folder)
    for share in shares:
        read = torch.empty_like(share.flat, device="cpu")
        for piece in share.pieces:
            reader.fill(piece, WEIGHT, read)
            part = slice(piece.offset, piece.offset + piece.size)
            if not torch.equal(read[part], share.flat[part].cpu()):
                place = folder.parents[1]
                raise ConfigError(f"output_dir: {place} gives back other bytes than were written; use another disk.")


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)
