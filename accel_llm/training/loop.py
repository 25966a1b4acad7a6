"""The parts of one training step: count the targets, move a batch, undo averaging, clip, decide whether to step."""

import math

import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_cpus
from accel_llm.data.batches import Batch, count_targets, total_weight
from accel_llm.model.attention import document_lengths


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> float:
    """Clip the gradient of the whole step to `max_grad_norm` (0: do not clip) and return its norm before clipping.

    The norm is taken over all processes, so a NaN on one of them reaches all. Under DeepSpeed the clipping has happened
    inside `backward`, and the returned norm is DeepSpeed's.

    Raises:
        RuntimeError: the engine returned no norm.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if norm is None:
        raise RuntimeError("The engine returned no gradient norm.")
    return float(norm)


def may_step(accelerator: Accelerator, grad_norm: float) -> bool:
    """Return whether to call `optimizer.step`: only with a finite gradient, or with a loss scaler (fp16).

    The scaler skips such a step itself and then lowers its scale. DeepSpeed has stepped or skipped inside `backward`.
    """
    return math.isfinite(grad_norm) or accelerator.scaler is not None


def undo_averaging(accelerator: Accelerator) -> int:
    """Return the factor on each loss that makes summed from averaged gradients: processes times accumulation steps.

    DDP, FSDP2 and DeepSpeed average gradients over the processes, and `accelerator.backward` divides the loss by the
    accumulation steps.
    """
    return accelerator.num_processes * accelerator.gradient_accumulation_steps


def total_targets(accelerator: Accelerator, micro_batches: list[Batch]) -> float:
    """Return the number of labeled targets in an optimizer step, over all processes, each times its weight.

    The losses of the step are divided by it; 0 means that there is nothing to learn. Costs one all-reduce.
    """
    return sum_on_cpus(accelerator, [float(sum(total_weight(batch) for batch in micro_batches))])[0]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a batch to `device`; other values stay as they are.

    Numbers that the host needs in the forward pass are noted first, so that it need not wait for the device there: the
    number of targets, `num_targets`, and the lengths of packed documents.
    """
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if "labels" in batch:
        moved["num_targets"] = int(count_targets(batch["labels"]))
    if "cu_seqlens" in batch:
        moved["cu_seqlens"].lengths = document_lengths(batch["cu_seqlens"])  # type: ignore[attr-defined]
    return moved
