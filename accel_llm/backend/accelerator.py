"""Builds the Accelerator. Every difference between backends is settled here, each with its reason."""

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch.distributed.fsdp.wrap import always_wrap_policy

from accel_llm.backend.compilation import compile_layers, compile_problems
from accel_llm.backend.launch_settings import launch_problems
from accel_llm.backend.strategy import accumulation_steps, resolve_precision, strategy, use_cpu
from accel_llm.backend.zero import build_deepspeed_plugin, deepspeed_settings, fit_buckets, prepare_deepspeed_on_cpu
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.system.launcher import launcher_flag, local_world_size, process_rank, world_size
from accel_llm.system.progress import shown
from accel_llm.system.run_lock import lock_output_dir, share_lock
from accel_llm.system.signals import listen_for_signals

MAX_CPU_PROCESSES = 8


def _prepare_fsdp_on_cpu() -> None:
    """Make Accelerate use FSDP on the CPU, with gloo."""
    # Accelerate 1.15 silently ignores the FSDP plugin unless the state has a type such as MULTI_GPU. torch's
    # fully_shard itself works with gloo.
    state = PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")
    state.device = torch.device("cpu")


def _check_launch(options: TrainOptions) -> None:
    """Check that the launch YAML and the environment ask for nothing that cannot be in force or contradicts the recipe.

    Raises:
        ConfigError: with one sentence for each setting.
    """
    precision, cpu = resolve_precision(options), use_cpu()
    problems = launch_problems() + compile_problems(strategy(), cpu)
    yaml_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if yaml_precision not in ("no", precision):
        allowed = ("bf16",) if cpu else ("bf16", "fp16")
        remedy = f", or set precision: {yaml_precision} in the recipe" if yaml_precision in allowed else ""
        problems.append(
            f"mixed_precision: `accelerate launch` says {yaml_precision}, but precision is {precision} here; remove it "
            f"from its YAML or flags{remedy}."
        )
    if precision == "fp16" and cpu:
        # Accelerate 1.15 leaves it out, or leaves out the scaling of the loss, or stops, depending on the strategy.
        problems.append("precision: fp16 needs a GPU, because nothing scales the loss on a CPU; use fp32 or bf16.")
    if cpu and launcher_flag("ACCELERATE_USE_FSDP") and launcher_flag("FSDP_OFFLOAD_PARAMS"):
        problems.append(
            "fsdp_offload_params: true needs a GPU; without one all parameters are on the CPU: set it to false."
        )
    raise_problems(problems)
    # Layers are read one by one (model/placement.py). If these were true, transformers would leave the weights empty on
    # all ranks but one, or shard them while it reads.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"


@shown("start processes")
def build_accelerator(options: TrainOptions) -> Accelerator:
    """Build the Accelerator of a training script (devices, precision, strategy), and start to handle signals.

    Raises:
        ConfigError: too many CPU processes, a tracker that is not installed, or a launch YAML or DeepSpeed file that is
            broken or contradicts the recipe; or another run lives in `output_dir`.
    """
    listen_for_signals(None)
    cpu, launched_strategy, precision = use_cpu(), strategy(), resolve_precision(options)

    # Problems that can be found before anything starts.
    if cpu and world_size() > MAX_CPU_PROCESSES:
        raise ConfigError(
            f"num_processes: {world_size()} processes without a GPU, but at most {MAX_CPU_PROCESSES} are allowed; "
            f"add --num_processes {MAX_CPU_PROCESSES} after `accelerate launch`."
        )
    if missing := [name for name in options.report_to if find_spec(name) is None]:
        raise ConfigError(*(f"report_to: {name} is not installed; run pip install {name}." for name in missing))
    _check_launch(options)

    # The main process refuses a folder in which another run lives. It does so before any process group exists: the
    # others meet it in there, so they cannot get past it. From then on a signal may write to the folder.
    folder = None if options.dry_run else Path(options.output_dir)
    if folder and process_rank() == 0:
        lock_output_dir(folder)
        listen_for_signals(folder)

    if not cpu and _optimizer_runs_on_cpu(launched_strategy):
        use_all_cores()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        step_scheduler_with_optimizer=False,
        dynamo_backend="no",  # see compilation.py
        project_config=ProjectConfiguration(
            project_dir=options.output_dir, logging_dir=str(Path(options.output_dir) / "logs")
        ),
        **_strategy_arguments(options, launched_strategy, precision, cpu),
    )
    _check_accelerator(accelerator, launched_strategy)
    if folder:
        share_lock(folder)
        listen_for_signals(folder)
    return accelerator


def _strategy_arguments(options: TrainOptions, launched_strategy: str, precision: str, cpu: bool) -> dict[str, Any]:
    """Return the arguments of the Accelerator that depend on the strategy.

    Raises:
        ConfigError: the settings of DeepSpeed or FSDP in the launch YAML cannot be used.
    """
    accumulation = accumulation_steps(options)
    # Without `sync_each_batch` FSDP2 adds up whole gradients of all trained parameters on each process until the last
    # micro-batch. Those of an adapter are small, and reducing them once saves time.
    whole = not options.has_adapter or bool(options.modules_to_save)
    plugin = GradientAccumulationPlugin(
        num_steps=accumulation, sync_with_dataloader=False, sync_each_batch=launched_strategy == "fsdp2" and whole
    )
    arguments: dict[str, Any] = {"gradient_accumulation_plugin": plugin}
    if launched_strategy.startswith("zero"):
        if cpu:
            prepare_deepspeed_on_cpu()
            # Without the name of a backend, Accelerate 1.15 assumes on every rank that there is only one process.
            arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        arguments["deepspeed_plugin"] = build_deepspeed_plugin(options, accumulation, precision, cpu)
    elif launched_strategy == "fsdp2":
        if cpu:
            _prepare_fsdp_on_cpu()
        arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        if arguments["fsdp_plugin"].fsdp_version != 2:
            raise ConfigError("fsdp_version: only 2 is supported, because PyTorch has deprecated FSDP1; set it to 2.")
    elif cpu:
        arguments["cpu"] = True
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    if launched_strategy == "ddp":
        # Buffers are equal on all processes and never change; DDP would send them all before each forward pass. The
        # gradients lie in the buckets that are sent, see `prepare`.
        arguments["kwargs_handlers"] = [
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ]
    return arguments


def _optimizer_runs_on_cpu(launched_strategy: str) -> bool:
    """Return whether the launch YAML puts the optimizer's state into the memory of the host."""
    if launched_strategy.startswith("zero"):
        offload = deepspeed_settings()["zero_optimization"].get("offload_optimizer") or {}
        return offload.get("device", "none") == "cpu"
    return launched_strategy == "fsdp2" and launcher_flag("FSDP_OFFLOAD_PARAMS")


def use_all_cores() -> None:
    """Let torch compute with this process's share of the machine's cores, unless OMP_NUM_THREADS asks for another number.

    `accelerate launch` and torchrun set OMP_NUM_THREADS to 1 if nobody else has set it, so 1 is no wish.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size()))


def _check_accelerator(accelerator: Accelerator, launched_strategy: str) -> None:
    """Check that Accelerate set up the strategy and the processes of the launch YAML.

    Otherwise it could silently train separate copies of the model, or plain DDP instead of what the YAML says.
    """
    allowed_types = {
        # A launcher's single process is a group of one.
        "single": {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU},
        "ddp": {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU},
        "fsdp2": {DistributedType.FSDP},
    }.get(launched_strategy, {DistributedType.DEEPSPEED})
    if accelerator.num_processes != world_size() or accelerator.distributed_type not in allowed_types:
        raise RuntimeError(
            f"launched as {launched_strategy} with {world_size()} processes, but Accelerate set up "
            f"{accelerator.distributed_type} with {accelerator.num_processes}"
        )


@shown("prepare model")
def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Wrap model and optimizer with Accelerate's `prepare`, and compile the layers if the launch YAML asks for it.

    The weights are already on their devices, and sharded.
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    if strategy() == "fsdp2":
        # model/placement.py has already wrapped the layers, and their classes now have other names than Accelerate
        # expects.
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = always_wrap_policy
    elif strategy().startswith("zero"):
        plugin = accelerator.state.deepspeed_plugin
        fit_buckets(plugin.deepspeed_config, optimizer)
    model, prepared = accelerator.prepare(model, optimizer)
    if strategy() == "ddp":
        # DDP sums gradients in its buckets. Zeroed in place they stay there: without it, accumulation would begin in
        # tensors of their own, which take as much memory again.
        prepared.zero_grad = partial(prepared.zero_grad, set_to_none=False)
    if strategy() == "fsdp2":
        # Accelerate 1.15 maps parameters by their address, but all empty shards of a rank have the same address.
        for group, parameters in zip(prepared.param_groups, groups, strict=True):
            group["params"] = parameters
    compile_layers(model)
    return model, prepared


def unwrap_model(accelerator: Accelerator, model: torch.nn.Module) -> Any:
    """Return the model without the wrappers of DDP and DeepSpeed; PEFT's wrapper stays."""
    return accelerator.unwrap_model(model)


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the inner optimizer, without the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def local_part(tensor: Any) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP2 has sharded; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reshard(model: torch.nn.Module) -> None:
    """Free the whole parameters that FSDP2 holds in place of some shards, in the dtype of the matrix products.

    It keeps them after a forward pass without a backward pass. Without FSDP2 there is nothing to do.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_weights(accelerator: Accelerator, model: torch.nn.Module, trainable_only: bool) -> dict[str, torch.Tensor]:
    """Return complete parameters by name, on the CPU of the main process; an empty dict on the others.

    Every process must call it. Parameters are gathered one by one, so a device holds at most one complete tensor beside
    its own share.
    """
    from torch.distributed.tensor import DTensor

    reshard(model)
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
            # A copy: the next training step must not change the tensors while they are written.
            state[name] = whole.to("cpu", copy=True).contiguous()
    return state
