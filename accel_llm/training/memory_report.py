"""What a run will take of its device's memory, known before any weight is read, and what to change if it is too much."""

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from accel_llm.config.options import TrainOptions
from accel_llm.data.rows import Rows
from accel_llm.model.loading import short_reason
from accel_llm.system.launcher import local_world_size
from accel_llm.training.memory_estimate import GB, MemoryEstimate, describe_terms, estimate_memory, memory_savings
from accel_llm.training.method_tryout import check_method_computes, needs_data

MB = 2**20
SAVINGS_SHOWN = 4


@dataclass(frozen=True)
class RunMemory:
    """The estimate of a run (None: there is none, for the `reason`), and the bytes that one process can have.

    `owner` are the words for who has them. `tensors` are the estimated bytes of what the metric `peak_memory_mb` counts:
    on a GPU tensors alone.
    """

    available: int
    owner: str
    estimate: MemoryEstimate | None = None
    reason: str = ""
    tensors: int = 0

    def describe(self) -> str:
        """Return the terms beside what the device has, in one sentence."""
        if self.estimate is None:
            return f"no estimate: {self.reason}; {self.owner} {self.available / GB:.1f} GB"
        return f"{self.estimate.describe()}; {self.owner} {self.available / GB:.1f} GB"

    def describe_host(self) -> str:
        """Return the same for the memory of the host, of all processes of this machine; empty if it is little."""
        host = self.estimate.host if self.estimate else {}
        if len(host) <= 1:  # Python alone
            return ""
        count, has = local_world_size(), psutil.virtual_memory().total / GB
        each = f" for each of {count} processes" if count > 1 else ""
        return f"{describe_terms(host)}{each}; the host has {has:.1f} GB"

    def facts(self) -> dict[str, Any]:
        """Return what run.json keeps; `peak_memory_mb` is the estimate of the metric of this name."""
        if self.estimate is None:
            return {}
        terms, host = (
            {name: size // MB for name, size in part.items()} for part in (self.estimate.terms, self.estimate.host)
        )
        facts = {"device_mb": self.available // MB, "estimated_mb": terms, "peak_memory_mb": self.tensors // MB}
        return {"memory": facts | ({"estimated_host_mb": host} if host else {})}


def find_memory(accelerator: Accelerator, options: TrainOptions, config: PreTrainedConfig, rows: Rows) -> RunMemory:
    """Estimate the memory of a run. It is advice, however little memory there is.

    Raises:
        ConfigError: the method cannot compute on this model, or not with these options.
    """
    options, device_type = with_longest_row(options, rows), accelerator.device.type
    arguments = accelerator.num_processes, device_type
    available, owner = _device_memory(accelerator)
    try:
        estimate = estimate_memory(options, config, *arguments)
    except Exception as error:  # a family or a method (BOFT, FRoD, SHiRA) that cannot be followed without data
        check_method_computes(error, options, config, lambda o, c: estimate_memory(o, c, *arguments))
        reason = "it needs the data of the weights" if needs_data(error) else short_reason(error)
        return RunMemory(
            available, owner, reason=f"method {options.method} on this model cannot be followed ({reason})"
        )
    context = estimate.terms["context"] if device_type == "cuda" else 0
    return RunMemory(available, owner, estimate, tensors=estimate.total - context)


def memory_problem(
    accelerator: Accelerator, options: TrainOptions, config: PreTrainedConfig, rows: Rows, memory: RunMemory
) -> str:
    """Return a sentence with the settings that save most, if it may not fit; else an empty one."""
    if memory.estimate is None or memory.estimate.total <= memory.available:
        return ""
    arguments = with_longest_row(options, rows), config, accelerator.num_processes, accelerator.device.type
    savings = [f"{setting} ({size / GB:.1f} GB)" for setting, size in memory_savings(*arguments)]
    return f"memory: it may not fit; what saves most: {', '.join(savings[:SAVINGS_SHOWN]) or 'a smaller model'}"


def with_longest_row(options: TrainOptions, rows: Rows) -> TrainOptions:
    """Return the options with `max_length` lowered to the longest row, if rows are not packed."""
    if options.packing or not len(rows) or rows.streamed is not None:  # nobody knows the rows of a stream
        return options
    longest = int(rows.lengths.max()) + options.virtual_tokens
    return options.model_copy(update={"max_length": min(options.max_length, longest)})


def _device_memory(accelerator: Accelerator) -> tuple[int, str]:
    """Return the bytes that one process can have, and the words for who has them."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory, "this GPU has"
    count = local_world_size()
    host = "the host has" if count == 1 else f"for each of {count} processes the host has"
    return psutil.virtual_memory().total // count, f"no GPU here, {host}"
