"""Builds the Accelerator. Every difference between backends is settled here, each with its reason."""

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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

from accel_llm.backend.strategy import accumulation_steps, resolve_precision, strategy, use_cpu
from accel_llm.backend.zero import build_deepspeed_plugin, prepare_deepspeed_on_cpu
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.system.launcher import process_rank, world_size
from accel_llm.system.signals import listen_for_signals

MAX_CPU_PROCESSES = 8


def quiet_libraries() -> None:
    """Silence what libraries say about themselves; warnings about a run are ours to give."""
    if use_cpu():
        # DeepSpeed otherwise says at import that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes", "httpx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if process_rank() == 0 else logging.ERROR)
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
    if said not in ("no", resolve_precision(options)):
        problems.append(
            f"mixed_precision: the launch YAML says {said}, the recipe's precision is {resolve_precision(options)}; remove it "
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
    raise_problems(problems)


def build_accelerator(options: TrainOptions) -> Accelerator:
    """The Accelerator of a training script: devices, precision, strategy and trackers; from here on signals are heeded.

    Raises:
        ConfigError: too many CPU processes, a DeepSpeed file that contradicts the recipe, a strategy the host cannot run.
    """
    listen_for_signals(None if options.dry_run else Path(options.output_dir))
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
            prepare_deepspeed_on_cpu()
            # Without a named backend Accelerate 1.15 believes on every rank that it is alone.
            arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        arguments["deepspeed_plugin"] = build_deepspeed_plugin(options, accumulation, cpu)
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
        mixed_precision={"fp32": "no"}.get(resolve_precision(options), resolve_precision(options)),
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


def unwrap_model(accelerator: Accelerator, model: torch.nn.Module) -> Any:
    """The model itself, out of what `prepare` and PEFT did not make: the wrappers of DDP and DeepSpeed."""
    return accelerator.unwrap_model(model)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer that steps, without the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def local_part(tensor: Any) -> torch.Tensor:
    """What this process holds of a tensor that FSDP2 has sharded; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather_weights(accelerator: Accelerator, model: torch.nn.Module, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Whole parameters by name, on the CPU of the main process (an empty dict on the others).

    One parameter at a time, so no device ever holds more than one whole tensor beyond its own share. A collective: every
    process must call it.
    """
    from torch.distributed.tensor import DTensor

    state = {}
    for name, parameter in unwrap_model(accelerator, model).named_parameters():
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
