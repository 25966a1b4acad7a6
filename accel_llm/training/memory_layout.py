"""How a launch YAML spreads weights, gradients and state over devices and host: the rules of each strategy.

They are compared with what real processes allocate by tests/proofs/plan_peaks.py.
"""

from dataclasses import dataclass, field
from typing import Any

from accel_llm.backend.strategy import strategy
from accel_llm.backend.zero import DEFAULT_BUCKET, deepspeed_settings
from accel_llm.config.options import TrainOptions
from accel_llm.system.launcher import launcher_flag
from accel_llm.training.optimizers import effective_optimizer


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

    @property
    def by_gloo(self) -> bool:
        """Whether gloo connects the processes: it gathers into a copy, and scatters from one (torch 2.13)."""
        return self.device_type == "cpu"


@dataclass
class Shares:
    """Bytes that one process holds of what grows with the model alone, not with the rows of a batch.

    `weights` and `kept` (state, masters, shared gradients) stay on the device; `gradients` are shared ones that are there
    only after they were exchanged. The others are there for a moment:
    `during` the forward and backward pass (weights that are whole while they are used, buffers for gradients),
    `exchange` after it, when the last gradients are exchanged and no activation waits any more, and `step` while the
    optimizer steps. `host` is the memory of the host, by name.
    """

    weights: int
    kept: int = 0
    during: int = 0
    exchange: int = 0
    step: int = 0
    gradients: int = 0
    host: dict[str, int] = field(default_factory=dict)


def launched_layout(processes: int, device_type: str) -> Layout:
    """Return the layout that the launcher's environment variables ask for."""
    launched = strategy()
    if launched in ("single", "ddp"):
        launched = "ddp" if processes > 1 else "single"
    zero = deepspeed_settings()["zero_optimization"] if launched.startswith("zero") else {}
    return Layout(launched, processes, device_type, zero, launcher_flag("FSDP_OFFLOAD_PARAMS"))


def shares(options: TrainOptions, layout: Layout, figures: dict[str, int], accumulated: bool = False) -> Shares:
    """Return what one process holds; `figures` are those of `follow_step`.

    With `accumulated` there are gradients of earlier micro-batches.
    """
    weights, name = figures["weights"], effective_optimizer(options, layout.device_type)
    state, paged = figures[name], figures[f"{name} paged"]
    embedding = figures["embedding"]
    on_gpu = layout.device_type == "cuda"
    outside = {"paged state": paged}
    if options.offload_embeddings and on_gpu and not layout.sharded:
        weights -= embedding
        outside["embedding"] = embedding
    if layout.strategy in ("single", "ddp"):
        found = Shares(weights, state, step=figures[f"{name} step"])
    elif layout.strategy == "fsdp2":
        found = _fsdp2_shares(options, layout, figures, state, accumulated)
    else:
        found = _zero_shares(layout, figures, weights, state, accumulated)
    if not on_gpu:  # there is one memory for both
        moved, found.host = found.host, {}
        found.weights += moved.pop("weights", 0)
        found.kept += sum(moved.values())
        return found
    saved = figures["trained"] if options.master_weights != "float32" else 4 * figures["trainable"]
    if options.save_async:
        found.host["copies for save_async"] = (saved + state + paged) // (layout.processes if layout.sharded else 1)
    found.host = {name: size for name, size in (found.host | outside).items() if size}
    return found


def _fsdp2_shares(
    options: TrainOptions, layout: Layout, figures: dict[str, int], state: int, accumulated: bool
) -> Shares:
    """Return the shares under FSDP2, which gathers one layer after the other and keeps gradients in float32."""
    n, numbers, weights, layers = layout.processes, figures["trainable"], figures["weights"], figures["layers"]
    size = figures["trained"] // max(numbers, 1)  # bytes of a number as computed
    masters = 4 * numbers - figures["trained"] if options.master_weights == "float32" else 0
    held, kept = (weights + masters) // n, (4 * numbers + state) // n
    # A layer and the next one are whole in the dtype of products, and what is in no layer: embedding and head are parts of
    # their own unless they are one.
    outside = weights - layers * figures["layer"]
    whole = outside if figures["tied"] else outside // 2
    # Gradients as computed and in float32: of a layer, and, at the end, of embedding and head, one after the other. What
    # the first one has sent goes when the second one is sent.
    in_layer = figures["layer trainable"]
    others = max(0, numbers - layers * in_layer)
    last = others if figures["tied"] else others // 2
    sent = 8 if layout.by_gloo else 4
    during = 2 * figures["layer"] + whole + (size + sent) * in_layer + size * last
    exchange = whole + (size + sent) * last + 4 * (others - last)
    if layout.offloaded and layout.device_type == "cuda":
        return Shares(0, 0, during, exchange, host={"weights": held, "gradients and state": kept})
    late = 0 if accumulated else 4 * numbers // n
    return Shares(held, kept - late, during, exchange, gradients=late)


def _zero_shares(layout: Layout, figures: dict[str, int], weights: int, state: int, accumulated: bool) -> Shares:
    """Return the shares under DeepSpeed 0.19, which keeps masters and gradients in float32."""
    n, numbers, zero = layout.processes, figures["trainable"], layout.zero
    stage, bucket = zero.get("stage", 0), _bucket(zero, numbers)
    size = figures["trained"] // max(numbers, 1)  # bytes of a number as computed
    shared = 4 * numbers // n
    masters = 0 if stage == 3 and size == 4 else shared
    found = Shares(weights, masters + state // n + (shared if stage > 1 else 4 * numbers), step=shared)
    overlaps = layout.device_type == "cuda" and zero.get("overlap_comm", stage == 3)  # see backend/zero.py
    buffer = 4 * bucket
    if stage == 3:  # the buffer is there all the time, and is copied for the exchange
        # Weights stay whole until so many of them are.
        live = min(weights, int(_number(zero, "stage3_max_live_parameters", 1e9)) * size)
        found.weights, found.step = weights // n, shared + buffer
        found.exchange = live + buffer * (3 if overlaps or layout.by_gloo else 2)
        found.during = found.exchange if bucket < numbers else live + buffer
        if layout.by_gloo:  # which gathers into a copy; most of all of what is in no layer
            found.during += max(0, weights - figures["layers"] * figures["layer"])
    elif stage == 2:  # buffers as computed, which are copied, and sent in float32
        one = bucket * size
        found.exchange = one * (3 if overlaps else 2) + (buffer if size < 4 else 0)
        found.during = found.exchange if bucket < numbers else one * (2 if overlaps else 1)
        if not (accumulated or bucket < numbers):
            found.kept, found.gradients = found.kept - shared, shared
    else:  # the gradients, which are in float32, move into the buffer when all of them are there
        found.exchange = buffer * (2 if overlaps else 1) + shared
        found.during = found.exchange if overlaps else 0
    if _is_offloaded(zero, "offload_optimizer"):
        found.host["masters, gradients and state"] = (3 if stage == 3 else 2) * shared + state // n
        found.kept, found.gradients = 0 if stage > 1 else 4 * numbers, 0
        found.step = buffer if stage == 3 else 0
    if stage == 3 and _is_offloaded(zero, "offload_param"):
        found.host["weights"], found.weights = found.weights, 0
    return found


def _bucket(zero: dict[str, Any], numbers: int) -> int:
    return min(numbers, int(_number(zero, "reduce_bucket_size", DEFAULT_BUCKET)))


def _number(zero: dict[str, Any], name: str, default: float) -> float:
    value = zero.get(name, default)
    return default if value == "auto" else float(value)


def _is_offloaded(zero: dict[str, Any], part: str) -> bool:
    settings = zero.get(part)
    return isinstance(settings, dict) and settings.get("device", "none") != "none"
