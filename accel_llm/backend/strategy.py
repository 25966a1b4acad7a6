"""Strategy, precision and batch sizes of the run, from launcher and recipe, before an Accelerator exists."""

from typing import Literal

import torch

from accel_llm.backend.zero import deepspeed_settings
from accel_llm.config.options import ModelOptions, RunOptions
from accel_llm.config.tool_options import AskOptions
from accel_llm.system.launcher import launcher_flag, world_size

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_cpu() -> bool:
    """Return whether this process trains on the CPU: the launch YAML says so, or there is no GPU."""
    return launcher_flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def training_device() -> torch.device:
    """Return the device of this process: the CPU, or the GPU that Accelerate has chosen for its rank."""
    return torch.device("cpu") if use_cpu() else torch.device("cuda", torch.cuda.current_device())


def strategy() -> str:
    """Return the strategy of the launch YAML: `single`, `ddp`, `fsdp2` or `zero1` to `zero3`."""
    if launcher_flag("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{deepspeed_settings()['zero_optimization'].get('stage', 0)}"
    sharded = launcher_flag("ACCELERATE_USE_FSDP")
    # One process on a CPU has no other process to share with; on a GPU FSDP2 also runs with a single rank.
    if sharded and (world_size() > 1 or not use_cpu()):
        return "fsdp2"
    return "ddp" if world_size() > 1 else "single"


def resolve_precision(options: ModelOptions | AskOptions) -> str:
    """Return `precision`, with `auto` resolved: bf16 if the GPU supports it, fp16 on an older GPU, fp32 on a CPU."""
    if options.precision != "auto":
        return options.precision
    if use_cpu():
        # A CPU without AMX multiplies float32 three times faster than bfloat16.
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compute_dtype(options: ModelOptions | AskOptions) -> torch.dtype:
    """Return the dtype of matrix products."""
    return PRECISION_DTYPES[resolve_precision(options)]


def accumulation_steps(options: RunOptions) -> int:
    """Return the number of micro-batches of one optimizer step on each process."""
    if options.total_batch_size is None:
        return options.gradient_accumulation_steps or 1
    # Rounded up: the last micro-batch of a step may have empty slots.
    return -(-options.total_batch_size // (options.per_device_train_batch_size * world_size()))


def rows_per_step(options: RunOptions) -> int:
    """Return the rows of one optimizer step over all processes; slots beyond `total_batch_size` stay empty."""
    slots = options.per_device_train_batch_size * accumulation_steps(options) * world_size()
    return options.total_batch_size or slots


def engine() -> Literal["none", "deepspeed", "fsdp"]:
    """Return the library that steps the optimizer. Not every optimizer works with each."""
    if strategy().startswith("zero"):
        return "deepspeed"
    return "fsdp" if strategy() == "fsdp2" else "none"
