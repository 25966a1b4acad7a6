"""Sums, maxima and barriers over all processes.

Numbers that only decide what happens next go through a gloo group of the CPUs, beside the device's own NCCL group.
"""

from functools import cache
from typing import Any

import torch
from accelerate import Accelerator

from accel_llm.system.launcher import world_size
from accel_llm.system.signals import signal_requests


def agree_on_requests(accelerator: Accelerator, save_now: bool = False) -> tuple[bool, bool]:
    """Return (stop, save): whether a signal asked any process for it. All processes get the same answer.

    `save_now` asks for a checkpoint too.
    """
    requests = signal_requests.stop > 0, signal_requests.save or save_now
    stop, save = sum_on_cpus(accelerator, [float(request) for request in requests])
    return stop > 0, save > 0


def sum_on_cpus(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return the sums of `values` over all processes. CPUs add them up, so no GPU has to finish its work first."""
    if accelerator.num_processes == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(sums, group=_cpu_group())
    return sums.tolist()


def wait_for_all() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier(group=_cpu_group())


def max_over_processes(number: int, group: Any) -> int:
    """Return the largest `number` over all processes, through the CPU group `group` (None: the shared one)."""
    if world_size() == 1:
        return number
    maximum = torch.tensor(number)
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX, group=group or _cpu_group())
    return int(maximum)


def new_cpu_group() -> Any:
    """Create a CPU group for a thread, whose collectives must not mix with the main thread's; None for one process."""
    return torch.distributed.new_group(backend="gloo") if world_size() > 1 else None


@cache
def _cpu_group() -> Any:
    """Return the CPU group that all collectives of the main thread share."""
    return new_cpu_group()


def sum_over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all processes, on the device (one all-reduce)."""
    values = values.to(accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values


def gather_on_main(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return `value` of each process, in the order of ranks, on the main process; an empty list on the others."""
    if accelerator.num_processes == 1:
        return [value]
    values = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object(value, values, group=_cpu_group())
    return values or []


def value_of_main(accelerator: Accelerator, value: Any) -> Any:
    """Return the `value` of the main process, on all processes."""
    values = [value]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(values, group=_cpu_group())
    return values[0]
