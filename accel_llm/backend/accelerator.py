"""Builds the Accelerator. Every difference between backends is settled here, each with its reason."""

import logging
import math
import os
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch.distributed.fsdp.wrap import always_wrap_policy

from accel_llm.backend import zero
from accel_llm.config.options import ModelOptions, RunOptions, TrainOptions
from accel_llm.errors import ConfigError, check
from accel_llm.model import loss as losses
from accel_llm.system import signals as interrupts

MAX_CPU_PROCESSES = 8


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def use_cpu() -> bool:
    """Whether this process trains on the CPU: the launch YAML says so, or there is no GPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.cuda.is_available()


def strategy() -> str:
    """`single`, `ddp`, `fsdp2` or `zero1` .. `zero3`: what the launch YAML asked for, read from the launcher's environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"zero{zero.settings_in_force()['zero_optimization'].get('stage', 0)}"
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    # One process on a CPU has nobody to share with; on a GPU FSDP2 runs with a single rank as well.
    if sharded and (world_size() > 1 or not use_cpu()):
        return "fsdp2"
    return "ddp" if world_size() > 1 else "single"


def precision_of(options: ModelOptions) -> str:
    """`auto` resolved: bf16 where the device is good at it, fp16 on an older GPU, fp32 on a CPU."""
    if options.precision != "auto":
        return options.precision
    if use_cpu():
        # A CPU without AMX multiplies float32 three times faster than bfloat16.
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def accumulation_steps(options: RunOptions) -> int:
    """Micro-batches of one optimizer step on each process."""
    if options.total_batch_size is None:
        return options.gradient_accumulation_steps or 1
    return -(-options.total_batch_size // (options.per_device_train_batch_size * world_size()))


def rows_per_step(options: RunOptions) -> int:
    """Rows of one optimizer step over all processes; slots beyond `total_batch_size` are filled with nothing."""
    slots = options.per_device_train_batch_size * accumulation_steps(options) * world_size()
    return options.total_batch_size or slots


def quiet() -> None:
    """Silence what libraries say about themselves; warnings about a run are ours to give."""
    if use_cpu():
        # DeepSpeed otherwise says at import that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes", "httpx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|accelerate|torch|bitsandbytes|peft|transformers)\b")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _prepare_cpu_fsdp() -> None:
    # Accelerate 1.15 knows FSDP only for devices it calls MULTI_GPU and others, and ignores the plugin on a CPU
    # without a word; torch's fully_shard itself runs over gloo.
    state = PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")
    state.device = torch.device("cpu")


def _check_recipe_decides(options: TrainOptions) -> None:
    """What the launch YAML says of the recipe's part must be what the recipe says, or it would not be what is done."""
    said, problems = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), []
    if said not in ("no", precision_of(options)):
        problems.append(
            f"mixed_precision: the launch YAML says {said}, the recipe's precision is {precision_of(options)}; remove it "
            f"there, or set precision: {said} in the recipe."
        )
    if strategy() == "fsdp2":
        if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
            problems.append(
                "fsdp_activation_checkpointing: the launch YAML sets it; remove it there and use gradient_checkpointing in "
                "the recipe."
            )
        policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        if policy != "TRANSFORMER_BASED_WRAP":
            problems.append(f"fsdp_auto_wrap_policy: {policy} is not supported, only TRANSFORMER_BASED_WRAP is.")
    # Each layer is read when its turn comes. Told of this, transformers would leave the weights of all ranks but one empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    check(problems)


def build_accelerator(options: TrainOptions) -> Accelerator:
    """The Accelerator of a training script: devices, precision, strategy and trackers; from here on signals are heeded.

    Raises:
        ConfigError: too many CPU processes, a DeepSpeed file that contradicts the recipe, a strategy the host cannot run.
    """
    interrupts.listen(None if options.dry_run else Path(options.output_dir))
    cpu, wanted, accumulation = use_cpu(), strategy(), accumulation_steps(options)
    if cpu and world_size() > MAX_CPU_PROCESSES:
        raise ConfigError(
            f"num_processes: {world_size()} processes on a machine without a GPU, at most {MAX_CPU_PROCESSES} help; "
            f"add --num_processes {MAX_CPU_PROCESSES} after `accelerate launch`."
        )
    if missing := [name for name in options.report_to if find_spec(name) is None]:
        raise ConfigError(
            *(f'report_to: {name} is not installed; pip install -e ".[track]" brings it.' for name in missing)
        )
    _check_recipe_decides(options)
    arguments: dict[str, Any] = {}
    if wanted.startswith("zero"):
        if cpu:
            zero.prepare_cpu()
            # Without a named backend Accelerate 1.15 believes on every rank that it is alone.
            arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        arguments["deepspeed_plugin"] = zero.plugin(options, accumulation, cpu)
    elif wanted == "fsdp2":
        if cpu:
            _prepare_cpu_fsdp()
        arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        if arguments["fsdp_plugin"].fsdp_version != 2:
            raise ConfigError("fsdp_version: only 2 is supported; FSDP1 is deprecated in PyTorch.")
    elif cpu:
        arguments["cpu"] = True
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision_of(options), precision_of(options)),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        log_with=list(options.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=options.output_dir, logging_dir=str(Path(options.output_dir) / "logs")
        ),
        **arguments,
    )
    _check_launched(accelerator, wanted)
    return accelerator


def _check_launched(accelerator: Accelerator, wanted: str) -> None:
    """Accelerate can train N copies that never meet, or plain DDP instead of what the YAML says: better no run."""
    kinds = {
        # A launcher's single process is a group of one.
        "single": {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU},
        "ddp": {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU},
        "fsdp2": {DistributedType.FSDP},
    }.get(wanted, {DistributedType.DEEPSPEED})
    if accelerator.num_processes != world_size() or accelerator.distributed_type not in kinds:
        raise RuntimeError(
            f"launched as {wanted} with {world_size()} processes, but Accelerate set up "
            f"{accelerator.distributed_type} with {accelerator.num_processes}"
        )


def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Accelerate's `prepare` of a model whose weights are where they belong, and of the optimizer over them."""
    groups = [list(group["params"]) for group in optimizer.param_groups]
    if strategy() == "fsdp2":
        # What Accelerate would wrap is wrapped, and under other class names than those it would look for.
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = always_wrap_policy
    model, prepared = accelerator.prepare(model, optimizer)
    if strategy() == "fsdp2":
        # Accelerate 1.15 finds each parameter again by its address, and all empty shards of a rank have the same one.
        for group, parameters in zip(prepared.param_groups, groups, strict=True):
            group["params"] = parameters
    return model, prepared


def clip(accelerator: Accelerator, model: torch.nn.Module, max_grad_norm: float) -> float:
    """Clip the gradient of the whole step to `max_grad_norm` (0: measure only) and return its norm before clipping.

    The norm is that of all processes together, so all of them see it when one has a NaN. DeepSpeed has clipped and stepped
    inside `backward` by now; its own figure is returned.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if norm is None:
        raise RuntimeError("no gradient norm came back from the engine")
    return float(norm)


def healthy(accelerator: Accelerator, grad_norm: float) -> bool:
    """Whether to step the optimizer: not with a gradient that is not finite, unless it is asked to find that out itself.

    fp16's loss scaler is: it skips the step and learns from it. DeepSpeed has skipped or stepped already.
    """
    return math.isfinite(grad_norm) or accelerator.scaler is not None


def undo_averaging(accelerator: Accelerator) -> int:
    """What a loss must be multiplied by so that gradients of a step are summed.

    DDP, FSDP2 and DeepSpeed average gradients over processes; `backward` divides by the accumulation steps.
    """
    return accelerator.num_processes * accelerator.gradient_accumulation_steps


def global_count(accelerator: Accelerator, micro_batches: list[dict[str, Any]]) -> float:
    """What the loss of a whole optimizer step is divided by: its labelled targets over all processes, each times its
    weight (one all-reduce); 0 where nothing is to be learnt."""
    return on_host(accelerator, [float(sum(losses.total_weight(batch) for batch in micro_batches))])[0]


def asked_to(accelerator: Accelerator) -> tuple[bool, bool]:
    """Whether any process was asked to stop, and to save: all get the same answer (one all-reduce)."""
    stop, save = on_host(accelerator, [float(interrupts.wishes.stop > 0), float(interrupts.wishes.save)])
    return stop > 0, save > 0


def on_host(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sums of `values` over all processes, added up by the CPUs: no device has to finish its work first."""
    if accelerator.num_processes == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(summed, group=_host_group())
    return summed.tolist()


def meet() -> None:
    """Wait until all processes are here."""
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier(group=_host_group())


def largest(number: int, group: Any) -> int:
    """The largest of all processes' numbers, among the CPUs of `group` (None: of the one that all use in turn)."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group or _host_group())
    return int(found)


def another_group() -> Any:
    """For a thread whose collectives must not meet those of the main one; None where a process is alone."""
    return torch.distributed.new_group(backend="gloo") if world_size() > 1 else None


@cache
def _host_group() -> Any:
    return another_group()


def global_sum(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes (one all-reduce)."""
    values = values.to(accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values


def bare(accelerator: Accelerator, model: torch.nn.Module) -> Any:
    """The model itself, out of what `prepare` and PEFT did not make: the wrappers of DDP and DeepSpeed."""
    return accelerator.unwrap_model(model)


def gather_state(accelerator: Accelerator, model: torch.nn.Module, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Whole parameters by name, on the CPU of the main process (an empty dict on the others).

    One parameter at a time, so no device ever holds more than one whole tensor beyond its own share. A collective: every
    process must call it.
    """
    from torch.distributed.tensor import DTensor

    state = {}
    for name, parameter in bare(accelerator, model).named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            whole = parameter.full_tensor().detach()
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone() if accelerator.is_main_process else parameter
        else:
            whole = parameter.detach()
        if accelerator.is_main_process:
            # A copy: a later training step must not change what is being written.
            state[name] = whole.to("cpu", copy=True).contiguous()
    return state


def engine() -> Literal["none", "deepspeed", "fsdp"]:
    """What will step the optimizer; not every optimizer can be stepped by each."""
    if strategy().startswith("zero"):
        return "deepspeed"
    return "fsdp" if strategy() == "fsdp2" else "none"
