"""The parts of one training step: fetch batches, count the targets, undo averaging, clip, decide whether to step."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from accelerate import Accelerator

from accel_llm.backend.accelerator import local_part
from accel_llm.backend.collectives import sum_on_cpus, sum_over_processes
from accel_llm.backend.strategy import engine
from accel_llm.data.batches import Batch, to_device
from accel_llm.data.stream import Stream


def clip_gradients(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> float:
    """Clip the gradient of the whole step to `max_grad_norm` (0: do not clip) and return its norm before clipping.

    The norm is taken over all processes, so a NaN on one of them reaches all. The gradient is scaled by
    `max_grad_norm / (norm + 1e-6)`, as by `torch.nn.utils.clip_grad_norm_`. Under DeepSpeed this has happened inside
    `backward`, and the returned norm is DeepSpeed's.

    Raises:
        RuntimeError: the engine returned no norm.
    """
    if engine() == "deepspeed":
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        if norm is None:
            raise RuntimeError("The engine returned no gradient norm.")
        return float(norm)
    accelerator.unscale_gradients()
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    norm = _gradient_norm(accelerator, gradients)
    if 0 < max_grad_norm < norm:
        # Not `_foreach_mul_`: on a CPU torch 2.13 rounds its factor to the dtype of the gradients, which may be bfloat16.
        torch._foreach_div_(gradients, (norm + 1e-6) / max_grad_norm)  # type: ignore[reportPrivateImportUsage]
    return norm


def _gradient_norm(accelerator: Accelerator, gradients: list[torch.Tensor]) -> float:
    """Return the norm of all gradients together; under FSDP2 each process has its own part of them.

    `torch.nn.utils.clip_grad_norm_` is not exact: on a CPU torch 2.13 adds the squares of a tensor one after the other
    in its own dtype, which loses 1e-5 of the norm for a million float32 numbers and 1% for 100 million.
    """
    dtype = torch.float64 if gradients[0].device.type == "cpu" else torch.float32
    norms = torch._foreach_norm(gradients, 2, dtype)  # type: ignore[reportPrivateImportUsage]
    squares = torch.stack(norms).double().square().sum()
    return math.sqrt(sum_over_processes(accelerator, squares) if engine() == "fsdp" else squares)


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
    return sum_on_cpus(accelerator, [sum(batch["total_weight"] for batch in micro_batches)])[0]


def begin_step(accelerator: Accelerator, stream: Stream, step: int) -> int:
    """Return the number of micro-batches that step `step` (from 1) takes, and let Accelerate end the step with the last.

    A step of the batch warmup has fewer than the others. Accelerate divides each loss by the number of all, as
    DeepSpeed does, so the missing ones count as done: the factor of `undo_averaging` stays right.
    """
    count = stream.micro_batches_in(step - 1)
    accelerator.step = stream.accumulation - count
    return count


def prefetch_to_device(batches: Iterator[Batch], device: torch.device, ahead: int) -> Iterator[Batch]:
    """Yield the batches of an endless iterator on `device`; the next `ahead` of them are made and copied meanwhile."""
    # A new thread begins on the first GPU: pinning memory there would open a context on it for every process.
    choose_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=choose_device) as thread:

        def fetch() -> Future[Batch]:
            return thread.submit(lambda: to_device(next(batches), device))

        waiting = deque(fetch() for _ in range(ahead))
        while True:
            waiting.append(fetch())
            yield waiting.popleft().result()
