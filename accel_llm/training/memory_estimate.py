"""Estimates the memory of one device before any weight is read, and what other settings would save."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from accel_llm.adapters.lora_options import looks_at_rows
from accel_llm.adapters.quantized_base import problem_on_quantized_base
from accel_llm.adapters.sums_over_rows import MATRICES_AT_WORK, SUMS_AT_ONCE
from accel_llm.backend.strategy import PRECISION_DTYPES, compute_dtype, use_cpu
from accel_llm.config.options import TrainOptions
from accel_llm.training.empty_model import StepSettings
from accel_llm.training.empty_step import PARTS, follow_step
from accel_llm.training.memory_layout import Layout, launched_layout, shares
from accel_llm.training.optimizers import UNSUPPORTED, effective_optimizer

GB = 2**30  # a "24 GB" GPU has 24 of these
# On a GPU: CUDA's context, workspaces of libraries, and gaps between tensors. On a CPU: Python and its libraries.
CONTEXT = {"cuda": GB, "cpu": 7 * GB // 10}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device at the fullest moment of a step, by name, in this order.

    `weights` are all weights as they are stored, with those of an adapter. `trained` is what training adds for each
    trained weight: gradients, the optimizer's state, and DeepSpeed's float32 copies. `activations` are those that wait
    for the backward pass, `peak` is what is computed at the moment, and `context` what is no tensor. If no step is as
    full as the computation of a LoRA's first values from rows, this is in place of them, as `first values`. `trainable`
    is the number of trained weights of the whole model, `parameters` that of all weights. `host` are the bytes in the
    memory of the host, by name, for one process beside a GPU. `checkpoint` are the bytes that all processes together
    write into a checkpoint.
    """

    terms: dict[str, int]
    trainable: int = 0
    parameters: int = 0
    host: dict[str, int] = field(default_factory=dict)
    checkpoint: int = 0

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(self.terms.values())

    def describe(self) -> str:
        """Return the total and the terms, as `6.9 GB = 5.5 weights + ...`; in MB if it is little."""
        return describe_terms(self.terms)


def describe_terms(terms: dict[str, int]) -> str:
    """Return the sum of `terms` (bytes by name) and each of them, as `6.9 GB = 5.5 weights + ...`; in MB if it is little."""
    unit, name, digits = (GB, "GB", 1) if sum(terms.values()) >= 2 * GB else (2**20, "MB", 0)
    rounded = {term: round(size / unit, digits) for term, size in terms.items()}  # so that they add up
    parts = " + ".join(f"{size:.{digits}f} {term}" for term, size in rounded.items())
    return f"{sum(rounded.values()):.{digits}f} {name} = {parts}"


def estimate_memory(
    options: TrainOptions, config: PreTrainedConfig, processes: int, device_type: str = "cuda"
) -> MemoryEstimate:
    """Return the estimate for one of `processes` devices that train a model of this config as the launch YAML says.

    The micro-batch is the largest that the options allow. On `cpu` it is host memory of one process.
    """
    layout = launched_layout(processes, device_type)
    return estimate_from(options, layout, _figures(options, config, layout))


def memory_savings(
    options: TrainOptions,
    config: PreTrainedConfig,
    processes: int,
    device_type: str = "cuda",
    known: dict[str, int] | None = None,
) -> list[tuple[str, int]]:
    """Return changes of settings that save memory, each as a person types it, with the bytes it saves, largest first.

    Each gain is that of one change alone; those below 1% of all tensors are left out. Shorter rows come last, because
    longer documents would be lost. A caller with `known` figures of the step knows of other sizes and launch YAMLs too:
    they are not tried.
    """
    layout = launched_layout(processes, device_type)
    figures = known or _figures(options, config, layout)
    estimate = estimate_from(options, layout, figures)
    total, least = estimate.total, (estimate.total - estimate.terms["context"]) // 100
    savings: list[tuple[str, int]] = []
    for name, value in _other_settings(options, layout):
        if known and name in ("max_length", "per_device_train_batch_size"):
            continue
        changed = options.model_copy(update={name: value} | ({"method_options": {}} if value == "lora" else {}))
        same_step = name in ("optim", "offload_embeddings")
        try:
            new = estimate_from(changed, layout, figures if same_step else _figures(changed, config, layout)).total
        except Exception:  # what cannot be followed with this change is no advice
            continue
        savings.append((f"{name}: {str(value).lower() if isinstance(value, bool) else value}", total - new))
    for name, other in () if known else _other_layouts(options, layout):
        new = estimate_from(options, other, _figures(options, config, other)).total
        savings.append((f"--config_file accelerate_configs/{name}.yaml", total - new))
    return sorted((s for s in savings if s[1] > least), key=lambda s: (s[0].startswith("max_length"), -s[1]))


def _other_settings(options: TrainOptions, layout: Layout) -> list[tuple[str, Any]]:
    """Return the options that may save memory, with the value to set, as far as they can be set here."""
    changes: list[tuple[str, Any]] = []
    if not options.gradient_checkpointing:
        changes.append(("gradient_checkpointing", True))
    if options.per_device_train_batch_size > 1:
        changes.append(("per_device_train_batch_size", options.per_device_train_batch_size // 2))
    if options.max_length >= 256 and options.max_length // 2 > options.virtual_tokens:
        changes.append(("max_length", options.max_length // 2))
    if not options.has_adapter:
        changes.append(("method", "lora"))
    elif not (options.load_in_8bit or options.in_4_bits):
        in_4_bits = ("method", "qlora") if options.method == "lora" else ("load_in_4bit", True)
        if problem_on_quantized_base(options.model_copy(update=dict([in_4_bits])), False) is None:
            changes.append(in_4_bits)
    if looks_at_rows(options):
        changes.append(("init_lora_weights", True))
    if options.optim == "adamw":
        library = (
            "deepspeed" if layout.strategy.startswith("zero") else "fsdp" if layout.strategy == "fsdp2" else "none"
        )
        smaller = ["adamw_8bit", *(["paged_adamw_8bit"] if layout.device_type == "cuda" else [])]
        changes += [("optim", name) for name in smaller if name not in UNSUPPORTED[library]]
    may_offload = options.has_adapter and layout.device_type == "cuda" and not layout.sharded
    if may_offload and not options.offload_embeddings:
        changes.append(("offload_embeddings", True))
    return changes


def _other_layouts(options: TrainOptions, layout: Layout) -> list[tuple[str, Layout]]:
    """Return the launch YAMLs that share the weights among the processes, by name."""
    if layout.processes == 1 or layout.sharded or options.load_in_8bit:
        return []
    others = {"fsdp2": {}, "zero3": {"stage": 3}}
    if options.optim in UNSUPPORTED["fsdp"] or options.master_weights == "stochastic_rounding":
        del others["fsdp2"]
    if options.optim in UNSUPPORTED["deepspeed"] or options.master_weights == "stochastic_rounding":
        del others["zero3"]
    return [(name, replace(layout, strategy=name, zero=zero)) for name, zero in others.items()]


def _figures(options: TrainOptions, config: PreTrainedConfig, layout: Layout) -> dict[str, int]:
    """Follow a step of these options on one device that has all weights."""
    settings = step_settings(options, layout)
    return follow_step(options, config, settings) | {"layers": config.get_text_config().num_hidden_layers}


def step_settings(options: TrainOptions, layout: Layout) -> StepSettings:
    """Return what decides about the memory of a step on one device, besides options and config."""
    in_float32 = options.master_weights == "float32" and layout.strategy in ("single", "ddp")
    rows = options.per_device_train_batch_size * layout.processes
    accumulation = math.ceil(options.total_batch_size / rows) if options.total_batch_size else 1
    return StepSettings(
        device_type=layout.device_type,
        compute=_compute_dtype(options, layout.device_type),
        masters=in_float32,
        autocast=not layout.strategy.startswith("zero"),
        # DDP keeps gradients in its buckets, from the beginning (backend/accelerator.py).
        accumulated=max(accumulation, options.gradient_accumulation_steps or 1) > 1 or layout.strategy == "ddp",
    )


def _compute_dtype(options: TrainOptions, device_type: str) -> torch.dtype:
    """Return the dtype of matrix products on a device that this machine may not have."""
    if options.precision != "auto":
        return PRECISION_DTYPES[options.precision]
    if device_type == "cpu":
        return torch.float32
    return torch.bfloat16 if use_cpu() else compute_dtype(options)


def estimate_from(options: TrainOptions, layout: Layout, figures: dict[str, int]) -> MemoryEstimate:
    """Return the estimate by the figures of `follow_step`, and `layers`, the number of them."""
    held = shares(options, layout, figures, step_settings(options, layout).accumulated)
    # With shares of their own, gradients are in `kept` from the beginning.
    own = layout.strategy in ("single", "ddp")
    moments = []
    for part in PARTS:
        if f"{part}: added" in figures:
            gradients, stored, added = (figures[f"{part}: {name}"] for name in ("gradients", "stored", "added"))
            if not own:  # under FSDP2 they come layer by layer
                gradients = held.gradients if layout.strategy == "fsdp2" and part in PARTS[-2:] else 0
            moments.append((held.kept + gradients, stored, added + held.during))
    gradients = figures["trained"] if own else held.gradients
    moments += [(held.kept + gradients, 0, passing) for passing in (held.exchange, held.step)]
    trained, activations, peak = max(moments, key=sum)
    terms = {"weights": held.weights, "trained": trained, "activations": activations, "peak": peak}
    start = _first_values(figures)
    if start > trained + activations + peak:
        terms = {"weights": held.weights, "first values": start}
    if layout.device_type == "cuda":
        held.host |= {"Python": CONTEXT["cpu"]}
    counts = figures["trainable"], figures["parameters"]
    terms["context"] = CONTEXT.get(layout.device_type, GB)
    return MemoryEstimate(terms, *counts, held.host, _checkpoint_bytes(options, layout, figures))


def _checkpoint_bytes(options: TrainOptions, layout: Layout, figures: dict[str, int]) -> int:
    """Return the bytes of the trained weights, of their masters where there are any, and of the optimizer's state."""
    name = effective_optimizer(options, layout.device_type)
    masters = options.master_weights == "float32"
    trained = 4 * figures["trainable"] if masters else figures["trained"]
    return trained + figures[name] + figures[f"{name} paged"]


def _first_values(figures: dict[str, int]) -> int:
    """Return what first values from rows take besides the weights, 0 if there are none: see adapters/data_starts.py."""
    if "start largest" not in figures:
        return 0
    sums, largest = figures["start sums"], figures["start largest"]
    at_once = min(sums, max(SUMS_AT_ONCE, largest))
    step = max(figures[f"{part}: stored"] + figures[f"{part}: added"] for part in PARTS if f"{part}: added" in figures)
    return at_once + max(step, MATRICES_AT_WORK * largest)
