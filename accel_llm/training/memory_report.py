"""Prints what a run will take of its device's memory, before any weight is read, and what to change if it is too much."""

from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from accel_llm.config.options import TrainOptions
from accel_llm.data.rows import Rows
from accel_llm.model.loading import short_reason
from accel_llm.system.progress import console
from accel_llm.training.memory_estimate import GB, estimate_memory, memory_savings
from accel_llm.training.method_tryout import check_method_computes, needs_data

MB = 2**20
SAVINGS_SHOWN = 4


def show_memory(
    accelerator: Accelerator, options: TrainOptions, config: PreTrainedConfig, rows: Rows
) -> dict[str, Any]:
    """Print the estimate on the main process, and return it for run.json. It is advice, however little memory there is.

    In run.json `peak_memory_mb` is the estimate of the metric of this name, which on a GPU counts tensors alone.

    Raises:
        ConfigError: the method cannot compute on this model, or not with these options.
    """
    if not accelerator.is_main_process:
        return {}
    options = _with_longest_row(options, rows)
    arguments = options, config, accelerator.num_processes, accelerator.device.type
    try:
        estimate = estimate_memory(*arguments)
    except Exception as error:  # a family or a method (BOFT, FRoD, SHiRA) that cannot be followed without data
        check_method_computes(
            error, options, config, lambda *changed: estimate_memory(changed[0], changed[1], *arguments[2:])
        )
        reason = "it needs the data of the weights" if needs_data(error) else short_reason(error)
        console.print(
            f"memory: there is no estimate for this model with method {options.method} ({reason})", soft_wrap=True
        )
        return {}
    available, owner = _device_memory(accelerator)
    sentence = f"memory of one process, estimated: {estimate.describe()}; {owner} {available / GB:.1f} GB"
    console.print(sentence, soft_wrap=True, markup=False)
    if estimate.total > available:
        console.print("memory: it may not fit; looking for what saves most", style="yellow")
        savings = [f"{setting} ({size / GB:.1f} GB)" for setting, size in memory_savings(*arguments)]
        remedy = ", ".join(savings[:SAVINGS_SHOWN]) or "a smaller model"
        console.print(f"memory: what saves most: {remedy}", style="yellow", soft_wrap=True, markup=False)
    tensors = estimate.total - (estimate.terms["context"] if accelerator.device.type == "cuda" else 0)
    estimated = {name: size // MB for name, size in estimate.terms.items()}
    return {"memory": {"device_mb": available // MB, "estimated_mb": estimated, "peak_memory_mb": tensors // MB}}


def _with_longest_row(options: TrainOptions, rows: Rows) -> TrainOptions:
    """Return the options with `max_length` lowered to the longest row, if rows are not packed."""
    if options.packing or not len(rows):
        return options
    longest = int(rows.lengths.max()) + options.virtual_tokens
    return options.model_copy(update={"max_length": min(options.max_length, longest)})


def _device_memory(accelerator: Accelerator) -> tuple[int, str]:
    """Return the bytes that one process can have, and the words for who has them."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory, "this GPU has"
    return psutil.virtual_memory().total // accelerator.num_processes, "it can have"
