"""Sums, maxima and barriers over all processes."""

from functools import cache
from typing import Any

import torch
from accelerate import Accelerator

from accel_llm.system.launcher import world_size
from accel_llm.system.signals import requested


def agree_on_requests(accelerator: Accelerator) -> tuple[bool, bool]:
    """Whether any process was asked to stop, and to save: all get the same answer (one all-reduce)."""
    stop, save = sum_on_hosts(accelerator, [float(requested.stop > 0), float(requested.save)])
    return stop > 0, save > 0


def sum_on_hosts(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sums of `values` over all processes, added up by the CPUs: no device has to finish its work first."""
    if accelerator.num_processes == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(summed, group=_host_group())
    return summed.tolist()


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier(group=_host_group())


def max_over_processes(number: int, group: Any) -> int:
    """The largest of all processes' numbers, among the CPUs of `group` (None: of the one that all use in turn)."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group or _host_group())
    return int(found)


def new_host_group() -> Any:
    """For a thread whose collectives must not meet those of the main one; None where a process is alone."""
    return torch.distributed.new_group(backend="gloo") if world_size() > 1 else None


@cache
def _host_group() -> Any:
    return new_host_group()


def sum_over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes (one all-reduce)."""
    values = values.to(accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values
