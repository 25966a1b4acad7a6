"""Checks of the prepared model, before and in the first step; their results are kept in run.json."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accel_llm.system.chatter

import torch
from accelerate import Accelerator
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from accel_llm.adapters.partial import PARTIAL_METHODS, parameters_of_part
from accel_llm.backend.accelerator import local_part, unwrap_model, unwrap_optimizer
from accel_llm.backend.collectives import sum_over_processes
from accel_llm.backend.compilation import decoder_layers
from accel_llm.backend.launch_settings import launch_yaml, recorded_environment
from accel_llm.backend.strategy import compute_dtype, resolve_precision, strategy
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.language_part import parts_beside_language
from accel_llm.model.offloaded_embedding import host_matrices
from accel_llm.model.vocabulary import NEW_ROWS
from accel_llm.system.progress import shown
from accel_llm.training.census import ProductCensus, compilation_facts, dtype_name, watch_layers
from accel_llm.training.model_checks import check_model

# For a hash, tensors are read as integers of the same size in bytes.
INTEGERS_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# An adapter that trains more of the weights than this changes the model from the beginning; a copy would be large.
MOVED_SHARE = 0.2
BASE_PRODUCTS = 4  # a decoder layer has at least so many products: queries with keys and values, output, feed-forward


@shown("check model")
def preflight(accelerator: Accelerator, model: nn.Module, optimizer: Any, options: TrainOptions) -> dict[str, Any]:
    """Check the prepared model before it trains, and hook up a check of its gradients in the first step.

    The checks: the engine is the one of the launch YAML; matrix products run in the precision that was asked for;
    exactly the parameters of the method are trained; parameters are sharded where the engine shards; all ranks hold
    equal weights; the loss equals that of the model family; packed documents do not see each other; and in the first
    step every trained parameter gets a gradient. All processes must call it.

    Returns:
        The settings in force, for run.json. The first optimizer step adds `first_step` and more dtypes to this dict.

    Raises:
        ConfigError: the loss cannot be computed exactly, packed documents see each other, or (in the first step) a
            trained parameter gets no gradient.
        RuntimeError: a library did not set up what it was told to.
    """
    # Matrix products run in autocast's dtype, or in the one that DeepSpeed has cast the weights to.
    dtype = torch.int8 if options.load_in_8bit else compute_dtype(options)

    # Checks that need no forward pass. They come first: after a forward pass FSDP2 keeps the parameters outside the
    # layers unsharded until the next backward pass, as copies in the dtype of the matrix products.
    _check_engine(model)
    _check_trainable_parameters(unwrap_model(accelerator, model), options)
    facts: dict[str, Any] = {}
    _watch_first_step(accelerator, model, optimizer, facts)
    parameters = parameter_counts(model)
    dtypes = {"trained": _dtypes(model, True), "frozen": _dtypes(model, False)}
    held = [0] * accelerator.num_processes
    held[accelerator.process_index] = parameters["this_process"]
    if accelerator.num_processes > 1:
        _check_sharding(model)

    # Checks that run the model.
    with ProductCensus() as census, _counted_forwards(model) as forwards:
        move = parameters["trainable"] < MOVED_SHARE * parameters["total"]
        loss_path = check_model(model, accelerator.device, dtype, options, move)
    _check_products(census, dtype, sum(forwards) if options.has_adapter else None)
    each_process = sum_over_processes(accelerator, torch.tensor(held)).tolist()
    facts |= _settings_in_force(accelerator, model, optimizer, options) | {
        "loss_path": loss_path,
        "parameters": parameters | {"each_process": each_process},
        "dtypes": dtypes,
        "weights_hash": _check_equal_weights(accelerator, model),
        "products": dict(census.products),
        "attention_kernels": dict(census.attention_kernels),
    }
    return {"accelerate": facts}


def _settings_in_force(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, options: TrainOptions
) -> dict[str, Any]:
    """Return the settings as the libraries have them."""
    facts = {
        "strategy": strategy(),
        "distributed_type": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "accumulation": accelerator.gradient_accumulation_steps,
        "device": str(accelerator.device),
        "precision": resolve_precision(options),
        "engine": type(model).__name__,
        "optimizer": _class_name(unwrap_optimizer(optimizer)),
        "in_host_memory": list(host_matrices(model)),
        "attention": unwrap_causal_lm(model).config._attn_implementation,
        "launch_yaml": launch_yaml(),
        "environment": recorded_environment(),
    }
    if strategy().startswith("zero"):
        plugin: Any = accelerator.state.deepspeed_plugin
        facts["deepspeed"] = json.loads(json.dumps(plugin.deepspeed_config, default=str))
    return facts


def _check_engine(model: nn.Module) -> None:
    """Raise RuntimeError unless the model was prepared by the engine that the launch YAML names."""
    from torch.distributed.fsdp import FSDPModule

    expected, zero_stage = strategy(), getattr(model, "zero_optimization_stage", lambda: None)()
    matches = {
        # A single process may be wrapped in DDP or not: under a launcher it is a process group of one.
        "single": zero_stage is None and not isinstance(model, FSDPModule),
        "ddp": isinstance(model, DistributedDataParallel),
        "fsdp2": isinstance(model, FSDPModule),
    }.get(expected, expected == f"zero{zero_stage}")
    if not matches:
        raise RuntimeError(
            f"The launch YAML asks for {expected}, but the model was prepared as {type(model).__name__}."
        )


@contextmanager
def _counted_forwards(model: nn.Module) -> Iterator[list[int]]:
    """Return a list to which a 1 is added for each forward of a decoder layer in the block."""
    forwards: list[int] = []
    hooks = [layer.register_forward_pre_hook(lambda *_: forwards.append(1)) for layer in decoder_layers(model)]
    try:
        yield forwards
    finally:
        for hook in hooks:
            hook.remove()


def _check_products(census: ProductCensus, dtype: torch.dtype, forwards: int | None) -> None:
    """Raise RuntimeError unless most matrix products of the model run in `dtype`. 8-bit products are not checked.

    With an adapter it is enough that they are BASE_PRODUCTS for each of the `forwards` of a layer: PEFT 0.21 computes
    what DEFT and RandLoRA add in float32, in several products for one of the base.
    """
    most = max(census.products, key=lambda name: census.products[name], default=None)
    if forwards and census.products[str(dtype).removeprefix("torch.")] >= BASE_PRODUCTS * forwards:
        return
    if most is not None and dtype != torch.int8 and f"torch.{most}" != str(dtype):
        raise RuntimeError(f"The products should run in {dtype}, but most run in {most} ({dict(census.products)}).")


def _check_trainable_parameters(model: nn.Module, options: TrainOptions) -> None:
    """Raise RuntimeError unless the method trains what it should: all, a part of the model, or the adapter alone.

    Also trainable: `modules_to_save`, the rows of added tokens and, if the adapter has them, biases. Parts that no text
    passes through are always frozen.
    """
    text_free = tuple(f"{name}." for name in parts_beside_language(model))
    parts = [".modules_to_save.", f".{NEW_ROWS}"]
    for config in getattr(model, "peft_config", {}).values():
        # PEFT names all parameters of a method alike; prompts have an encoder beside the model.
        tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        parts += [".trainable_tokens_", "prompt_encoder." if config.is_prompt_learning else f".{tuner.prefix}"]
        parts += [".bias"] if getattr(config, "bias", "none") != "none" else []
    full = options.method == "full"
    if options.method in PARTIAL_METHODS:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if wrong := sorted(trained ^ parameters_of_part(model, options)):
            raise RuntimeError(f"method {options.method}: {len(wrong)} parameters should not be so ({wrong[0]}).")
        return
    names = [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith(text_free)
        and (not parameter.requires_grad if full else parameter.requires_grad and not any(p in name for p in parts))
    ]
    if names:
        state = "frozen" if full else "trained"
        raise RuntimeError(f"method {options.method}: {len(names)} parameters are {state} ({', '.join(names[:3])}).")


def _check_sharding(model: nn.Module) -> None:
    """Raise RuntimeError if ZeRO-3 or FSDP2 left a parameter unsharded.

    Parameters below ZeRO-3's persistence threshold stay whole on purpose.
    """
    from torch.distributed.tensor import DTensor

    unsharded: list[str] = []
    parameters: Any = model.named_parameters()  # Any, because DeepSpeed adds attributes that no type knows
    for name, parameter in parameters:
        if strategy() == "fsdp2":
            whole = not isinstance(parameter, DTensor)
        else:
            whole = (
                strategy() == "zero3"
                and not parameter.ds_persist
                and parameter.ds_tensor.numel() >= parameter.ds_numel > 1
            )
        unsharded += [name] if whole else []
    if unsharded:
        names = ", ".join(unsharded[:3])
        raise RuntimeError(f"{len(unsharded)} parameters are not sharded under {strategy()} ({names}).")


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count the parameters: trainable, in total, and held by this process.

    A 4-bit tensor counts as the weights that it encodes, but in `this_process` as the elements that it stores.
    """
    from torch.distributed.tensor import DTensor

    counts = {"trainable": 0, "total": 0, "this_process": 0}
    parameters: Any = [*model.parameters(), *host_matrices(model).values()]
    for parameter in parameters:
        size = held = parameter.numel()
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_numel
            # Small tensors stay whole on every process: stage3_param_persistence_threshold.
            held = size if parameter.ds_persist else parameter.ds_tensor.numel()
        elif isinstance(parameter, DTensor):
            held = local_part(parameter).numel()
        elif type(parameter).__name__ == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
            size = parameter.quant_state.shape.numel()
        counts["total"] += size
        counts["trainable"] += size if parameter.requires_grad else 0
        counts["this_process"] += held
    return counts


def _dtypes(model: nn.Module, trained: bool) -> dict[str, int]:
    """Return the number of trained or frozen tensors by dtype."""
    names = (str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad == trained)
    return dict(Counter(names))


def _check_equal_weights(accelerator: Accelerator, model: nn.Module) -> str | None:
    """Return a hash of all weights, 16 hexadecimal digits; None under ZeRO-3 and FSDP2, where each rank holds a part.

    Raises:
        RuntimeError: the ranks hold different weights.
    """
    if strategy() in ("zero3", "fsdp2"):
        return None
    total = torch.zeros((), dtype=torch.int64)
    for number, parameter in enumerate([*model.parameters(), *host_matrices(model).values()]):
        bits = torch.hash_tensor(parameter.detach().contiguous().view(INTEGERS_BY_SIZE[parameter.element_size()]))
        # The factor makes the order of the tensors count. int64 wraps around on overflow: for a hash that is fine.
        total += bits.cpu().view(torch.int64) * (2 * number + 1)

    # If all n ranks have the same hash h, the two sums are n*h and n*h*h.
    sums = sum_over_processes(accelerator, torch.stack([total, total * total]))
    expected = [int(total * accelerator.num_processes), int(total * total * accelerator.num_processes)]
    if sums.cpu().tolist() != expected:
        raise RuntimeError(f"The ranks hold different weights; rank {accelerator.process_index} has {int(total):x}.")
    return f"{int(total) & (2**64 - 1):016x}"


def _watch_first_step(accelerator: Accelerator, model: nn.Module, optimizer: Any, facts: dict[str, Any]) -> None:
    """Hook into the first optimizer step: check that every trained parameter has a gradient, and record the dtypes."""
    trained = [(name, p) for name, p in unwrap_model(accelerator, model).named_parameters() if p.requires_grad]
    # For each parameter: 1 if it has a gradient, and 1 if that is not all zero.
    gradient_flags = torch.zeros(len(trained), 2, dtype=torch.int64)
    gradient_dtypes: set[str] = set()
    hooks: list[Any] = watch_layers(unwrap_model(accelerator, model), facts)

    def mark(k: int, gradient: Any) -> None:
        _mark_gradient(gradient_flags, k, gradient)
        gradient_dtypes.add(dtype_name(gradient))

    if strategy().startswith("zero"):
        # DeepSpeed frees each gradient as soon as it is computed, so it must be seen during the backward pass.
        for k, (_, parameter) in enumerate(trained):
            hooks.append(parameter.register_hook(lambda gradient, k=k: mark(k, gradient)))

    def check_gradients(*_: Any) -> None:
        for k, (_, parameter) in enumerate(trained):
            if parameter.grad is not None:
                mark(k, parameter.grad)
        counts = sum_over_processes(accelerator, gradient_flags).cpu().tolist()
        without = [name for (name, _), (present, _) in zip(trained, counts, strict=True) if not present]
        zero = [name for (name, _), (present, value) in zip(trained, counts, strict=True) if present and not value]
        facts["first_step"] = {"gradients": len(trained) - len(without), "all_zero": len(zero), "without": without[:20]}
        if without:
            raise ConfigError(
                f"model_name_or_path: {len(without)} of {len(trained)} trained parameters got no gradient in the first "
                f"step ({', '.join(without[:3])}); train an adapter on other modules with lora_target_modules."
            )

    def record_dtypes(inner: Any, *_: Any) -> None:
        if not hooks:  # the first step is over
            return
        state = {dtype_name(tensor) for values in inner.state.values() for tensor in _moments(values)}
        stepped = {dtype_name(parameter) for parameter in inner.state}
        facts["dtypes"] |= {
            "gradients": sorted(gradient_dtypes),
            "stepped": sorted(stepped),
            "optimizer_state": sorted(state),
        }
        facts["compiled"] = compilation_facts()
        while hooks:
            hooks.pop().remove()

    base = unwrap_optimizer(optimizer)
    hooks.append(base.register_step_pre_hook(check_gradients))
    base.register_step_post_hook(record_dtypes)  # it stays: torch forbids to remove it while others follow


def _mark_gradient(flags: torch.Tensor, k: int, gradient: Any) -> None:
    flags[k, 0] = 1
    flags[k, 1] |= int(local_part(gradient).any())


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def _moments(state: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors of an optimizer's state that are more than a single number."""
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
