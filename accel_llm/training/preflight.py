"""What is really in force once all is prepared, checked before and in the first step, and kept in run.json."""

import json
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from accel_llm.backend.accelerator import local_part, unwrap_model, unwrap_optimizer
from accel_llm.backend.collectives import sum_over_processes
from accel_llm.backend.strategy import compute_dtype, resolve_precision, strategy
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import check_isolation, unwrap_causal_lm
from accel_llm.model.loss import check_loss
from accel_llm.model.vocabulary import NEW_ROWS

INTEGERS_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def preflight(accelerator: Accelerator, model: nn.Module, optimizer: Any, options: TrainOptions) -> dict[str, Any]:
    """Check the prepared model before it trains, and its gradients in the first step: what is trained is what was asked
    for, in the engine that the launch YAML names, sharded where it says so, with equal weights on all ranks, with the
    family's own loss, and with packed documents apart.

    Returns what is in force, for run.json; the first step adds to it. A collective.

    Raises:
        ConfigError: no exact loss could be had, packed documents see each other, or (in the first step) some of what is
            trained gets no gradient.
        RuntimeError: a library has set up something else than it was told.
    """
    # What matrix products run in: autocast's dtype, or the one DeepSpeed has cast the weights to.
    dtype = torch.int8 if options.load_in_8bit else compute_dtype(options)
    _check_engine(model)
    _check_trained(unwrap_model(accelerator, model), options)
    facts: dict[str, Any] = {}
    # Before the first forward: FSDP2 leaves what stands outside the layers whole until a backward pass.
    _watch_first_step(accelerator, model, optimizer, facts)
    parameters = parameter_counts(model)
    held = [0] * accelerator.num_processes
    held[accelerator.process_index] = parameters["this_process"]
    if accelerator.num_processes > 1:
        _check_sharded(model)
    facts |= {
        "strategy": strategy(),
        "distributed_type": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "accumulation": accelerator.gradient_accumulation_steps,
        "device": str(accelerator.device),
        "precision": resolve_precision(options),
        "engine": type(model).__name__,
        "loss_path": check_loss(model, accelerator.device, dtype),
        "parameters": parameters | {"each_process": sum_over_processes(accelerator, torch.tensor(held)).tolist()},
        "dtypes": {"trained": _dtypes(model, True), "frozen": _dtypes(model, False)},
        "weights_hash": _equal_hash(accelerator, model),
        "attention": unwrap_causal_lm(model).config._attn_implementation,
    }
    if options.packing:
        check_isolation(model, accelerator.device, dtype)
    if strategy().startswith("zero"):
        plugin: Any = accelerator.state.deepspeed_plugin
        facts["deepspeed"] = json.loads(json.dumps(plugin.deepspeed_config, default=str))
    return {"accelerate": facts}


def _check_engine(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    wanted, stage = strategy(), getattr(model, "zero_optimization_stage", lambda: None)()
    right = {
        # A launcher's single process is a group of one.
        "single": stage is None and not isinstance(model, FSDPModule),
        "ddp": isinstance(model, DistributedDataParallel),
        "fsdp2": isinstance(model, FSDPModule),
    }.get(wanted, wanted == f"zero{stage}")
    if not right:
        raise RuntimeError(f"the launch YAML asks for {wanted}, but the model was prepared as {type(model).__name__}")


def _check_trained(model: nn.Module, options: TrainOptions) -> None:
    """All of the model with method full; else the adapter, and what was named to be trained beside it."""
    parts = ["lora_", ".modules_to_save.", f".{NEW_ROWS}", *([".bias"] if options.lora_bias != "none" else [])]
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad != (options.method == "full" or any(part in name for part in parts))
        and (options.method == "full" or parameter.requires_grad)
    ]
    if wrong:
        state = "frozen" if options.method == "full" else "trained"
        raise RuntimeError(f"method {options.method}: {len(wrong)} parameters are {state} ({', '.join(wrong[:3])})")


def _check_sharded(model: nn.Module) -> None:
    """Under ZeRO-3 and FSDP2 every parameter is cut, but for those that ZeRO-3 keeps whole by its persistence threshold."""
    from torch.distributed.tensor import DTensor

    whole: list[str] = []
    named: Any = model.named_parameters()
    for name, parameter in named:
        if strategy() == "fsdp2":
            uncut = not isinstance(parameter, DTensor)
        else:
            uncut = (
                strategy() == "zero3"
                and not parameter.ds_persist
                and parameter.ds_tensor.numel() >= parameter.ds_numel > 1
            )
        whole += [name] if uncut else []
    if whole:
        raise RuntimeError(f"{len(whole)} parameters are not sharded under {strategy()} ({', '.join(whole[:3])})")


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: trainable, in total, and held by this process under the sharding in force.

    A 4-bit tensor counts the weights that it stands for, except in what this process holds.
    """
    from torch.distributed.tensor import DTensor

    counts = {"trainable": 0, "total": 0, "this_process": 0}
    every: Any = model.parameters()
    for parameter in every:
        size = held = parameter.numel()
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_numel
            # Small tensors stay whole on every process: stage3_param_persistence_threshold.
            held = size if parameter.ds_persist else parameter.ds_tensor.numel()
        elif isinstance(parameter, DTensor):
            held = parameter.to_local().numel()
        elif type(parameter).__name__ == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
            size = parameter.quant_state.shape.numel()
        counts["total"] += size
        counts["trainable"] += size if parameter.requires_grad else 0
        counts["this_process"] += held
    return counts


def _dtypes(model: nn.Module, trained: bool) -> dict[str, int]:
    """Number of tensors by dtype."""
    found: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.requires_grad == trained:
            name = str(parameter.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + 1
    return found


def _equal_hash(accelerator: Accelerator, model: nn.Module) -> str | None:
    """A hash of the weights that every rank holds whole, the same on all; None where none is whole.

    Under ZeRO-3 and FSDP2 each weight came from one rank or from the same file, and its parts differ by design.
    """
    if strategy() in ("zero3", "fsdp2"):
        return None
    total = torch.zeros((), dtype=torch.int64)
    for number, parameter in enumerate(model.parameters()):
        bits = torch.hash_tensor(parameter.detach().contiguous().view(INTEGERS_BY_SIZE[parameter.element_size()]))
        # The order counts; int64 wraps around.
        total += bits.cpu().view(torch.int64) * (2 * number + 1)
    everywhere = sum_over_processes(accelerator, torch.stack([total, total * total]))
    mean, squares = total * accelerator.num_processes, total * total * accelerator.num_processes
    if everywhere.cpu().tolist() != [int(mean), int(squares)]:
        raise RuntimeError(f"the ranks hold different weights; rank {accelerator.process_index} has {int(total):x}")
    return f"{int(total) & (2**64 - 1):016x}"


def _watch_first_step(accelerator: Accelerator, model: nn.Module, optimizer: Any, facts: dict[str, Any]) -> None:
    """See to it that the first step finds a gradient for all that is trained, and note in what dtypes it is taken."""
    trained = [(name, p) for name, p in unwrap_model(accelerator, model).named_parameters() if p.requires_grad]
    seen = torch.zeros(len(trained), 2, dtype=torch.int64)  # 1 where there is a gradient, 1 where it is not all zero
    hooks = []
    if strategy().startswith("zero"):
        # DeepSpeed takes each gradient away as soon as it is there.
        for k, (_, parameter) in enumerate(trained):
            hooks.append(parameter.register_hook(lambda gradient, k=k: _note(seen, k, gradient)))

    def before(*_: Any) -> None:
        for k, (_, parameter) in enumerate(trained):
            if parameter.grad is not None:
                _note(seen, k, parameter.grad)
        found = sum_over_processes(accelerator, seen).cpu()
        without = [name for (name, _), (some, _) in zip(trained, found.tolist(), strict=True) if not some]
        zero = [name for (name, _), (some, more) in zip(trained, found.tolist(), strict=True) if some and not more]
        facts["first_step"] = {"gradients": len(trained) - len(without), "all_zero": len(zero), "without": without[:20]}
        if without:
            raise ConfigError(
                f"model_name_or_path: {len(without)} of {len(trained)} trained parameters got no gradient in the first "
                f"step ({', '.join(without[:3])}); train an adapter on other modules with lora_target_modules."
            )

    def after(inner: Any, *_: Any) -> None:
        kinds = {str(t.dtype).removeprefix("torch.") for state in inner.state.values() for t in _moments(state)}
        stepped = {str(parameter.dtype).removeprefix("torch.") for parameter in inner.state}
        facts["dtypes"] |= {"stepped": sorted(stepped), "optimizer_state": sorted(kinds)}
        for hook in hooks:
            hook.remove()

    base = unwrap_optimizer(optimizer)
    hooks += [base.register_step_pre_hook(before), base.register_step_post_hook(after)]


def _note(seen: torch.Tensor, k: int, gradient: Any) -> None:
    seen[k, 0] = 1
    seen[k, 1] |= int(local_part(gradient).any())


def _moments(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
