"""The verbs of the training loop: count the targets, move a batch, undo averaging, clip, decide whether to step."""

import math

import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_hosts
from accel_llm.data.batches import Batch, total_weight


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> float:
    """Clip the gradient of the whole step to `max_grad_norm` (0: measure only) and return its norm before clipping.

    The norm is that of all processes together, so all of them see it when one has a NaN. DeepSpeed has clipped and stepped
    inside `backward` by now; its own figure is returned.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if norm is None:
        raise RuntimeError("no gradient norm came back from the engine")
    return float(norm)


def may_step(accelerator: Accelerator, grad_norm: float) -> bool:
    """Whether to step the optimizer: not with a gradient that is not finite, unless it is asked to find that out itself.

    fp16's loss scaler is: it skips the step and learns from it. DeepSpeed has skipped or stepped already.
    """
    return math.isfinite(grad_norm) or accelerator.scaler is not None


def undo_averaging(accelerator: Accelerator) -> int:
    """What a loss must be multiplied by so that gradients of a step are summed.

    DDP, FSDP2 and DeepSpeed average gradients over processes; `backward` divides by the accumulation steps.
    """
    return accelerator.num_processes * accelerator.gradient_accumulation_steps


def total_targets(accelerator: Accelerator, micro_batches: list[Batch]) -> float:
    """What the loss of a whole optimizer step is divided by: its labelled targets over all processes, each times its
    weight (one all-reduce); 0 where nothing is to be learnt."""
    return sum_on_hosts(accelerator, [float(sum(total_weight(batch) for batch in micro_batches))])[0]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; what is not a tensor stays as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
