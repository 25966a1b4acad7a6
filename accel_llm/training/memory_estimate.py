"""Estimates the memory of one device before any weight is read, and what other settings would save."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from accel_llm.adapters.lora_options import looks_at_rows
from accel_llm.adapters.quantized_base import problem_on_quantized_base
from accel_llm.adapters.sums_over_rows import MATRICES_AT_WORK, SUMS_AT_ONCE
from accel_llm.backend.strategy import PRECISION_DTYPES, compute_dtype, strategy, use_cpu
from accel_llm.backend.zero import DEFAULT_BUCKET, deepspeed_settings
from accel_llm.config.options import TrainOptions
from accel_llm.system.launcher import launcher_flag
from accel_llm.training.empty_step import PARTS, StepSettings, follow_step
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
    is the number of trained weights of the whole model.
    """

    terms: dict[str, int]
    trainable: int = 0

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(self.terms.values())

    def describe(self) -> str:
        """Return the total and the terms, as `6.9 GB = 5.5 weights + ...`; in MB if it is little."""
        unit, name, digits = (GB, "GB", 1) if self.total >= 2 * GB else (2**20, "MB", 0)
        rounded = {term: round(size / unit, digits) for term, size in self.terms.items()}  # so that they add up
        terms = " + ".join(f"{size:.{digits}f} {term}" for term, size in rounded.items())
        return f"{sum(rounded.values()):.{digits}f} {name} = {terms}"


@dataclass(frozen=True)
class Layout:
    """How the launch YAML spreads the training: its strategy (see `strategy`), processes, and DeepSpeed's settings."""

    strategy: str
    processes: int
    device_type: str
    zero: dict[str, Any]
    offloaded: bool = False  # by FSDP2: weights and state lie in host memory

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its share of the weights."""
        return self.strategy in ("fsdp2", "zero3")


def estimate_memory(
    options: TrainOptions, config: PreTrainedConfig, processes: int, device_type: str = "cuda"
) -> MemoryEstimate:
    """Return the estimate for one of `processes` devices that train a model of this config as the launch YAML says.

    The micro-batch is the largest that the options allow. On `cpu` it is host memory of one process.
    """
    layout = _launched_layout(processes, device_type)
    return _estimate(options, layout, _figures(options, config, layout))


def memory_savings(
    options: TrainOptions, config: PreTrainedConfig, processes: int, device_type: str = "cuda"
) -> list[tuple[str, int]]:
    """Return changes of settings that save memory, each as a person types it, with the bytes it saves, largest first.

    Each gain is that of one change alone; those below 1% of all tensors are left out. Shorter rows come last, because
    longer documents would be lost.
    """
    layout = _launched_layout(processes, device_type)
    figures = _figures(options, config, layout)
    estimate = _estimate(options, layout, figures)
    total, least = estimate.total, (estimate.total - estimate.terms["context"]) // 100
    savings: list[tuple[str, int]] = []
    for name, value in _other_settings(options, layout):
        changed = options.model_copy(update={name: value} | ({"method_options": {}} if value == "lora" else {}))
        same_step = name in ("optim", "offload_embeddings")
        try:
            new = _estimate(changed, layout, figures if same_step else _figures(changed, config, layout)).total
        except Exception:  # what cannot be followed with this change is no advice
            continue
        savings.append((f"{name}: {str(value).lower() if isinstance(value, bool) else value}", total - new))
    for name, other in _other_layouts(options, layout):
        new = _estimate(options, other, _figures(options, config, other)).total
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


def _launched_layout(processes: int, device_type: str) -> Layout:
    launched = strategy()
    if launched in ("single", "ddp"):
        launched = "ddp" if processes > 1 else "single"
    zero = deepspeed_settings()["zero_optimization"] if launched.startswith("zero") else {}
    return Layout(launched, processes, device_type, zero, launcher_flag("FSDP_OFFLOAD_PARAMS"))


def _figures(options: TrainOptions, config: PreTrainedConfig, layout: Layout) -> dict[str, int]:
    """Follow a step of these options on one device that has all weights."""
    in_float32 = options.master_weights == "float32" and layout.strategy in ("single", "ddp")
    rows = options.per_device_train_batch_size * layout.processes
    accumulation = math.ceil(options.total_batch_size / rows) if options.total_batch_size else 1
    settings = StepSettings(
        device_type=layout.device_type,
        compute=_compute_dtype(options, layout.device_type),
        masters=in_float32,
        autocast=not layout.strategy.startswith("zero"),
        accumulated=max(accumulation, options.gradient_accumulation_steps or 1) > 1,
    )
    return follow_step(options, config, settings) | {"layers": config.get_text_config().num_hidden_layers}


def _compute_dtype(options: TrainOptions, device_type: str) -> torch.dtype:
    """Return the dtype of matrix products on a device that this machine may not have."""
    if options.precision != "auto":
        return PRECISION_DTYPES[options.precision]
    if device_type == "cpu":
        return torch.float32
    return torch.bfloat16 if use_cpu() else compute_dtype(options)


def _estimate(options: TrainOptions, layout: Layout, figures: dict[str, int]) -> MemoryEstimate:
    """Return the terms at the fullest moment of a step."""
    weights, kept, passing = _shares(options, layout, figures)
    # With shares of their own, gradients are in `kept` from the beginning.
    own = layout.strategy in ("single", "ddp")
    moments = []
    for part in PARTS:
        if f"{part}: added" in figures:
            gradients, stored, added = (figures[f"{part}: {name}"] for name in ("gradients", "stored", "added"))
            moments.append((kept + (gradients if own else 0), stored, added + passing))
    step = figures[f"{effective_optimizer(options, layout.device_type)} step"]
    moments.append((kept + (figures["trained"] if own else 0), 0, step // (1 if own else layout.processes)))
    trained, activations, peak = max(moments, key=sum)
    terms = {"weights": weights, "trained": trained, "activations": activations, "peak": peak}
    start = _first_values(figures)
    if start > trained + activations + peak:
        terms = {"weights": weights, "first values": start}
    return MemoryEstimate({**terms, "context": CONTEXT.get(layout.device_type, GB)}, figures["trainable"])


def _first_values(figures: dict[str, int]) -> int:
    """Return what first values from rows take besides the weights, 0 if there are none: see adapters/data_starts.py."""
    if "start largest" not in figures:
        return 0
    sums, largest = figures["start sums"], figures["start largest"]
    at_once = min(sums, max(SUMS_AT_ONCE, largest))
    step = max(figures[f"{part}: stored"] + figures[f"{part}: added"] for part in PARTS if f"{part}: added" in figures)
    return at_once + max(step, MATRICES_AT_WORK * largest)


def _shares(options: TrainOptions, layout: Layout, figures: dict[str, int]) -> tuple[int, int, int]:
    """Return what one device holds all the time (weights; state, masters and shared gradients), and for a moment.

    The third number are weights that are whole while they are used, and buffers for the exchange of gradients.
    """
    n, numbers = layout.processes, figures["trainable"]
    weights, state = figures["weights"], figures[effective_optimizer(options, layout.device_type)]
    if options.offload_embeddings and layout.device_type == "cuda" and not layout.sharded:
        weights -= figures["embedding"]
    if layout.strategy in ("single", "ddp"):
        return weights, state, 0
    if layout.strategy == "fsdp2":
        # A layer and the next one are whole in the dtype of products, and all that is in no layer.
        whole = 2 * figures["layer"] + weights - figures["layers"] * figures["layer"]
        exchanged = 6 * numbers // figures["layers"]  # gradients of a layer as computed, and in float32
        masters = 4 * numbers - figures["trained"] if options.master_weights == "float32" else 0
        if layout.offloaded and layout.device_type == "cuda":
            return 0, 0, whole + exchanged
        return (weights + masters) // n, (4 * numbers + state) // n, whole + exchanged
    return _zero_shares(layout, figures, weights, state)


def _zero_shares(layout: Layout, figures: dict[str, int], weights: int, state: int) -> tuple[int, int, int]:
    """Return `_shares` for DeepSpeed, which keeps masters and gradients in float32."""
    n, numbers, zero = layout.processes, figures["trainable"], layout.zero
    stage = zero.get("stage", 0)
    passing = _bucket(zero, numbers) * 4 * (2 if zero.get("overlap_comm", stage == 3) else 1)
    kept = (4 * numbers + state) // n + 4 * numbers // (n if stage > 1 else 1)
    if _is_offloaded(zero, "offload_optimizer"):
        kept = 0 if stage > 1 else 4 * numbers
    if stage == 3:
        # Weights stay whole until so many of them are.
        passing += min(weights, int(_number(zero, "stage3_max_live_parameters", 1e9)) * 2)
        weights = 0 if _is_offloaded(zero, "offload_param") else weights // n
    return weights, kept, passing


def _bucket(zero: dict[str, Any], numbers: int) -> int:
    return min(numbers, int(_number(zero, "reduce_bucket_size", DEFAULT_BUCKET)))


def _number(zero: dict[str, Any], name: str, default: float) -> float:
    value = zero.get(name, default)
    return default if value == "auto" else float(value)


def _is_offloaded(zero: dict[str, Any], part: str) -> bool:
    settings = zero.get(part)
    return isinstance(settings, dict) and settings.get("device", "none") != "none"
