"""The estimate of memory, beside what real steps take: measured by torch's profiler on a CPU, and once on an H200."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import memory
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support import (
    FAMILIES,
    SCALED,
    SIZES,
    UNFUSED_FAMILIES,
    UNPACKABLE,
    make_rows,
    materialize,
    random_rows,
    scaled_model,
)
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from accel_llm.adapters import sums_over_rows
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.data_starts import start_from_rows
from accel_llm.backend.strategy import compute_dtype
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.data.stream import Position, Stream
from accel_llm.model.loading import load_model, load_model_config
from accel_llm.model.loss import next_token_loss
from accel_llm.training import memory_estimate
from accel_llm.training.memory_estimate import GB, Layout, estimate_memory, memory_savings
from accel_llm.training.optimizer_state import optimizer_bytes, optimizer_names
from accel_llm.training.optimizers import build_optimizer

# Both come from peft 0.21.2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]

# Large enough that tensors, and not single numbers, are what is counted; five layers, of which three are followed.
SHAPE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LENGTH = 256
CHECKPOINTED = {"gradient_checkpointing": True}
PADDED = {"packing": False}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full, packed": ("llama", {}, {"method": "full"}),
    "full, 8-bit moments, checkpointed, accumulated": (
        "llama",
        {"tie_word_embeddings": True},
        {"method": "full", "optim": "adamw_8bit", "gradient_accumulation_steps": 2, **CHECKPOINTED},
    ),
    "lora, packed": ("qwen3", {"head_dim": 32}, {"per_device_train_batch_size": 2}),
    "lora, padded, checkpointed": ("llama", {}, {"per_device_train_batch_size": 4, **PADDED, **CHECKPOINTED}),
    "lora, scores with a soft-cap": ("gemma2", {"head_dim": 32, "sliding_window": 64}, {}),
    "lora, experts": ("mixtral", {"num_local_experts": 4}, {}),
    "qlora in bf16, checkpointed": (
        "llama",
        {},
        {"method": "qlora", "precision": "bf16", "per_device_train_batch_size": 4, **CHECKPOINTED},
    ),
}


def options_of(folder: Path, values: dict[str, Any]) -> TrainOptions:
    return TrainOptions(**({"model_name_or_path": str(folder), "max_length": LENGTH} | values))


def saved_model(folder: Path, family: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SHAPE, **sizes})).save_pretrained(folder)


def real_training(options: TrainOptions) -> tuple[Any, torch.optim.Optimizer, Callable[[], None]]:
    """Return the model, its optimizer, and a function that takes one step as the training loop does."""
    model: Any = load_model(options)
    model = materialize(model if options.method == "full" else attach_adapter(model, options), options)
    optimizer = build_optimizer(model, options, "cpu", "none")
    row = np.arange(3, 3 + options.max_length, dtype=np.int32)
    rows = [(row, row.copy())] * options.per_device_train_batch_size
    dtype = compute_dtype(options)

    def step() -> None:
        for _ in range(options.gradient_accumulation_steps or 1):
            batch = collate_packed(rows) if options.packing else collate_padded(rows, 0)
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                loss = next_token_loss(model, batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def most_allocated(step: Callable[[], None]) -> int:
    """Return the most bytes that `step` has allocated at one time, as torch's allocator reports to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return the bytes of the weights with the scales of 4-bit ones, and those of the optimizer's state."""
    parameters = list(model.parameters())
    states = [p.quant_state for p in parameters if getattr(p, "quant_state", None) is not None]  # type: ignore
    scales = [tensor for s in states for tensor in (s.absmax, s.code, s.state2.absmax, s.state2.code)]
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    shared = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in kept}
    return sum(tensor.nbytes for tensor in [*parameters, *scales]), sum(shared.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_the_estimate_is_what_a_real_step_takes(case, tmp_path):
    family, sizes, values = CASES[case]
    saved_model(tmp_path, family, sizes)
    options = options_of(tmp_path, values)
    estimate = estimate_memory(options, load_model_config(options), 1, "cpu")
    terms = estimate.terms

    # The first step builds the state, the second one is measured.
    model, optimizer, step = real_training(options)
    step()
    weights, state = held_bytes(model, optimizer)
    measured = weights + state + most_allocated(step)
    assert terms["weights"] == pytest.approx(weights, rel=2e-3)
    assert terms["trained"] >= 0.99 * state
    assert estimate.total - terms["context"] == pytest.approx(measured, rel=0.10)

    # The measurement tells settings apart.
    other = options.model_copy(update={"gradient_checkpointing": not options.gradient_checkpointing})
    different = estimate_memory(other, load_model_config(options), 1, "cpu")
    assert different.total - terms["context"] != pytest.approx(measured, rel=0.10)


QLORA: dict[str, Any] = {"method": "qlora", "gradient_checkpointing": True}
LLAMA, QWEN = (memory.SHAPES[name] for name in ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B"))
SMALL_QWEN = memory.Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True, 0.6)


@pytest.mark.long
@pytest.mark.parametrize("init, most", [("corda", 1.15), ("lora_ga", 1.3)])
def test_the_estimate_knows_what_first_values_from_rows_take(init, most, tmp_path, monkeypatch):
    """Measured by torch's profiler; `most` is how much larger the estimate may be."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 3, "vocab_size": 256}
    saved_model(tmp_path, "llama", sizes)
    fixed = {"max_length": 64, "packing": False, "train_files": ["-"], "lora_r": 4, "method_options": {"init_rows": 2}}
    options = options_of(tmp_path, fixed | {"init_lora_weights": init})
    rows = make_rows((k, list(ids), list(labels)) for k, (ids, labels) in enumerate(random_rows(4, 64)))
    for module in (memory_estimate, sums_over_rows):
        monkeypatch.setattr(module, "SUMS_AT_ONCE", 8 * 2**20)
    estimate = estimate_memory(options, load_model_config(options), 1, "cpu")
    model = materialize(attach_adapter(load_model(options), options), options)
    stream = Stream(rows, options, Position(), 0)
    measured = most_allocated(lambda: start_from_rows(Accelerator(cpu=True), model, options, stream))
    assert measured < estimate.terms["first values"] < most * measured
    # All sums at the same time would take more than that.
    monkeypatch.setattr(memory_estimate, "SUMS_AT_ONCE", 2**40)
    assert estimate_memory(options, load_model_config(options), 1, "cpu").terms["first values"] > 1.3 * measured
    assert dict(memory_savings(options, load_model_config(options), 1, "cpu"))["init_lora_weights: true"] > measured


@pytest.mark.parametrize(
    ("shape", "values", "measured"),
    [
        (LLAMA, QLORA, 6.90),
        (LLAMA, {**QLORA, "optim": "adamw_8bit"}, 6.67),
        (LLAMA, {**QLORA, "offload_embeddings": True}, 5.92),
        (QWEN, QLORA, 7.31),
        (SMALL_QWEN, {"method": "full"}, 14.66),
        (SMALL_QWEN, {"method": "lora"}, 5.07),
    ],
)
def test_the_estimate_is_what_an_h200_measured(shape, values, measured):
    """Peaks of tensors in GiB that tests/gpu/check.py measured: packed rows of 2,048 tokens, all of them targets.

    The GPU had torch 2.11, which repeats heads for the attention, and 64 MiB of cuBLAS' workspace are in each peak.
    """
    options = TrainOptions(**values, max_length=2048, precision="bf16")
    estimate = estimate_memory(options, shape.config(), 1)
    assert (estimate.total - estimate.terms["context"]) / GB == pytest.approx(measured, rel=0.06)
    assert list(estimate.terms) == ["weights", "trained", "activations", "peak", "context"]


@pytest.mark.parametrize("name", optimizer_names())
def test_an_optimizers_state_is_as_large_as_said(name, tmp_path):
    saved_model(tmp_path, "llama", {"num_hidden_layers": 2})
    options = options_of(tmp_path, {"method": "full", "optim": name})
    model, optimizer, step = real_training(options)
    step()
    _, state = held_bytes(model, optimizer)
    # Adam's counter of steps, and the map of 8-bit values, are a few bytes for each weight.
    assert optimizer_bytes(model, "cpu")[name] == pytest.approx(state, rel=0.01, abs=20_000)


def test_a_paged_state_lies_in_host_memory():
    model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(20, 20))
    on_gpu, on_cpu = optimizer_bytes(model, "cuda"), optimizer_bytes(model, "cpu")
    assert on_cpu["paged_adamw"] == on_cpu["adamw"] == on_gpu["adamw"]
    assert on_gpu["paged_adamw"] == 8 * (400 + 20 * 20 + 20)  # bitsandbytes pages no small weights


def test_bitsandbytes_quantizes_after_an_estimate():
    bitsandbytes.functional.name2qmap.clear()
    options = TrainOptions(method="qlora", max_length=32)
    estimate_memory(options, CONFIG_MAPPING["llama"](**SIZES), 1)
    weight = torch.randn(64, 64)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().mean() < 0.1


@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE, *UNFUSED_FAMILIES])
def test_every_family_has_an_estimate(family):
    sizes = {**FAMILIES, **UNPACKABLE, **UNFUSED_FAMILIES}[family]
    config = CONFIG_MAPPING[family](**{**SIZES, **sizes})
    options = TrainOptions(method="full", max_length=32, packing=family in FAMILIES)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert estimate_memory(options, config, 1).terms["weights"] >= 4 * numbers


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_embeddings_that_depend_on_lengths_have_an_estimate(kind):
    options = TrainOptions(method="full", max_length=32, packing=False)
    assert estimate_memory(options, scaled_model(kind).config, 1).terms["activations"] > 0


def layout(strategy: str, processes: int, **zero: Any) -> Layout:
    return Layout(strategy, processes, "cuda", zero)


def small_llama() -> LlamaConfig:
    return LlamaConfig(**(SHAPE | {"num_hidden_layers": 2}))


def terms_under(where: Layout, options: TrainOptions) -> dict[str, int]:
    figures = memory_estimate._figures(options, small_llama(), where)
    return memory_estimate.estimate_from(options, where, figures).terms


def test_sharding_divides_what_each_strategy_shares():
    options = TrainOptions(method="full", gradient_checkpointing=True, max_length=64)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(small_llama()).parameters())
    single, zero1, zero2, zero3, fsdp2, offload = (
        terms_under(where, options)
        for where in (
            layout("single", 1),
            layout("zero1", 4, stage=1),
            layout("zero2", 4, stage=2),
            layout("zero3", 4, stage=3),
            layout("fsdp2", 4),
            layout("zero3", 4, stage=3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
        )
    )

    def per_number(terms: dict[str, int], name: str) -> float:
        return round(terms[name] / numbers, 1)

    # Bytes for each parameter. float32 weights, gradients and two moments; DeepSpeed: bf16 weights and float32 masters.
    assert per_number(single, "weights") == 4 and 8 < per_number(single, "trained") <= 12
    assert [per_number(zero1, name) for name in ("weights", "trained")] == [2, 12 / 4 + 4]
    assert [per_number(zero2, name) for name in ("weights", "trained")] == [2, 16 / 4]
    assert [per_number(zero3, name) for name in ("weights", "trained")] == [2 / 4, 16 / 4]
    # Under FSDP2 gradients come with the layers: in the loss, the fullest moment, there are none of this micro-batch yet.
    assert [per_number(fsdp2, name) for name in ("weights", "trained")] == [4 / 4, 8 / 4]
    accumulated = terms_under(layout("fsdp2", 4), options.model_copy(update={"gradient_accumulation_steps": 2}))
    assert per_number(accumulated, "trained") == 12 / 4
    assert offload["weights"] == offload["trained"] == 0 and offload["peak"] == zero3["peak"]


def test_savings_are_settings_that_save_what_they_say():
    config = small_llama()
    options = TrainOptions(method="lora", max_length=512, per_device_train_batch_size=2)
    estimate = estimate_memory(options, config, 1)
    total, tensors = estimate.total, estimate.total - estimate.terms["context"]
    savings = memory_savings(options, config, 1)
    names = [setting.split(":")[0] for setting, _ in savings]
    assert set(names) >= {"gradient_checkpointing", "per_device_train_batch_size", "offload_embeddings"}
    assert names[-1] == "max_length"  # it loses rows
    sizes = [size for setting, size in savings if not setting.startswith("max_length")]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) > tensors / 100 - 1
    assert "gradient_checkpointing: true" in dict(savings) and "per_device_train_batch_size: 1" in dict(savings)
    for setting, size in savings[:2]:
        name, value = setting.split(": ")
        changed = TrainOptions(**(options.model_dump(exclude_unset=True) | {name: value}))
        assert total - estimate_memory(changed, config, 1).total == size


@pytest.mark.long
def test_advice_for_other_methods_fits_them():
    def settings(**options: Any) -> set[str]:
        return {setting for setting, _ in memory_savings(TrainOptions(max_length=32, **options), small_llama(), 1)}

    assert "method: lora" in settings(method="freeze", method_options={"layers": 2})  # an option that LoRA has not
    assert "load_in_4bit: true" in settings(method="ia3")
    assert "load_in_4bit: true" not in settings(method="osf")


def test_what_is_set_already_is_no_saving():
    options = TrainOptions(method="qlora", max_length=200, gradient_checkpointing=True, offload_embeddings=True)
    names = [setting.split(":")[0] for setting, _ in memory_savings(options, small_llama(), 4)]
    assert set(names) <= {
        "optim",
        "--config_file accelerate_configs/fsdp2.yaml",
        "--config_file accelerate_configs/zero3.yaml",
    }
