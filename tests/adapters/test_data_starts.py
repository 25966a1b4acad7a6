"""EVA, CorDA and LoRA-GA begin with the values that PEFT computes from the same rows; LoftQ with the best ones.

The oracles are PEFT's own functions on plain transformers models, and the Eckart-Young theorem.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from support import equal_tensors, make_rows, materialize, random_rows, relative_distance, reset, saved_bases
from transformers import AutoModelForCausalLM

from accel_llm.adapters import data_starts, sums_over_rows
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.data_starts import _groups_with_labels, start_from_rows
from accel_llm.adapters.initial import linear_lora_layers, lora_layers
from accel_llm.adapters.methods import check_method
from accel_llm.adapters.saved import check_saved_adapter, save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate
from accel_llm.data.stream import Position, Stream
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model
from accel_llm.model.placement import place_weights

pytestmark = pytest.mark.usefixtures("quiet")
IDS = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(3))
ROWS = make_rows((k, list(ids), list(labels)) for k, (ids, labels) in enumerate(random_rows(24, 20)))
FIRST = 12  # rows that are looked at
TAU = 0.5  # EVA has its directions after a few passes
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return saved_bases(tmp_path_factory, ("llama", "gpt2"))


def settings(base: Path, init: str, more: dict[str, Any] | None = None, **options: Any) -> TrainOptions:
    fixed = {"model_name_or_path": str(base), "packing": False, "max_length": 64, "max_steps": 3, "seed": 1}
    fixed |= {"train_files": ["-"], "lora_r": 4, "lora_alpha": 6, "method_options": {"init_rows": FIRST} | (more or {})}
    return TrainOptions(**{**fixed, "init_lora_weights": init, **options})


def started(options: TrainOptions, position: Position | None = None, accelerator: Any = None) -> Any:
    """A model whose adapter has its first values."""
    check_method(options)
    accelerator = accelerator or Accelerator(cpu=True)
    torch.manual_seed(0)
    model = attach_adapter(load_model(options), options)
    place_weights(accelerator, model, options)
    start_from_rows(accelerator, model, options, Stream(ROWS, options, position or Position(), 0))
    return model


def batches(options: TrainOptions, groups: list[list[int]] | None = None) -> list[dict[str, Any]]:
    stream = Stream(ROWS, options, Position(), 0)
    return [collate(ROWS, rows, False, 0) for rows in groups or [stream.documents(k) for k in range(FIRST)]]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.double()


def oracle_config(model: Any, init: str, **options: Any) -> LoraConfig:
    targets = sorted({name.rsplit(".", 1)[-1] for name in lora_layers(model)})
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, **options
    )  # type: ignore[arg-type]


def forward(model: Any, batch: dict[str, Any]) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])


def factors(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in lora_layers(model).items()
    }


@pytest.mark.parametrize("family, kind", [("llama", "ipm"), pytest.param("llama", "kpm", marks=LONG), ("gpt2", "ipm")])
def test_corda_takes_what_peft_takes(bases, monkeypatch, family, kind):
    # PEFT 0.21 needs `attrs` here for a decorator alone, and does not install it.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    options = settings(bases[family], "corda", {"corda_config": {"corda_method": kind}})
    model = started(options)
    plain: Any = AutoModelForCausalLM.from_pretrained(bases[family])
    assert relative_distance(logits(model), logits(plain)) < 2e-6
    config = oracle_config(model, "corda", corda_config=CordaConfig(corda_method=kind))  # type: ignore[arg-type]
    preprocess_corda(plain, config, lambda: [forward(plain, batch) for batch in batches(options)] and None)
    expected = factors(get_peft_model(plain, config))
    for name, (a, b) in factors(model).items():
        assert relative_distance(b @ a, expected[name][1] @ expected[name][0]) < 2e-3, name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # those of PEFT
@pytest.mark.parametrize("scale", ["stable", pytest.param("unit", marks=LONG)])
def test_lora_ga_takes_what_peft_takes(bases, scale):
    options = settings(bases["llama"], "lora_ga", {"lora_ga_config": {"scale": scale}})
    model = started(options)
    plain: Any = AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert relative_distance(logits(model), logits(plain)) < 2e-6
    rows = batches(options)
    labels = sum(batch["num_targets"] for batch in rows)

    def step() -> None:
        for batch in rows:
            # PEFT divides the gradient by the number of calls.
            (forward(plain, batch).loss * batch["num_targets"] / labels * len(rows)).backward()

    config = oracle_config(model, "lora_ga", lora_ga_config=LoraGAConfig(scale=scale))  # type: ignore[arg-type]
    preprocess_loraga(plain, config, step)
    expected = factors(get_peft_model(plain, config))
    for name, found in factors(model).items():
        # Each direction may have another sign, because PEFT's decomposition draws random numbers.
        for actual, peft in zip(found, expected[name], strict=True):
            assert relative_distance(actual.abs(), peft.abs()) < 0.02, name
    others = started(settings(bases["llama"], "lora_ga", {"lora_ga_config": {"scale": scale}, "init_rows": 3}))
    name = next(iter(expected))
    assert relative_distance(factors(others)[name][0].abs(), expected[name][0].abs()) > 0.1
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used")  # PEFT's
@pytest.mark.parametrize(
    "family, more",
    [
        ("llama", {"eva_config": {"tau": TAU}}),
        pytest.param("llama", {"eva_config": {"rho": 1.0, "tau": TAU}}, marks=LONG),
        pytest.param("gpt2", {"eva_config": {"tau": TAU}}, marks=LONG),
    ],
)
def test_eva_takes_directions_and_ranks_of_peft(bases, family, more):
    options = settings(bases[family], "eva", more)
    model = started(options)
    plain: Any = AutoModelForCausalLM.from_pretrained(bases[family])
    assert torch.equal(logits(model), logits(plain))
    rho = more.get("eva_config", {}).get("rho", 2.0)
    oracle: Any = get_peft_model(plain, oracle_config(model, "eva", eva_config=EvaConfig(rho=rho, tau=TAU)))
    stream = Stream(ROWS, options, Position(), 0)
    groups = _groups_with_labels(stream, [stream.documents(k) for k in range(FIRST)], oracle)
    keys = ("input_ids", "attention_mask", "labels")
    rows = [{key: batch[key] for key in keys} for batch in batches(options, groups)]
    initialize_lora_eva_weights(oracle, rows, show_progress_bar=False)
    expected = factors(oracle)
    assert model.peft_config["default"].rank_pattern == oracle.peft_config["default"].rank_pattern
    assert bool(model.peft_config["default"].rank_pattern) == (rho > 1)
    assert {n: k.scaling for n, k in lora_layers(model).items()} == {
        n: k.scaling for n, k in lora_layers(oracle).items()
    }
    for name, (a, _) in factors(model).items():
        assert torch.equal(a, expected[name][0]), name


@pytest.mark.parametrize("init", [pytest.param("eva", marks=LONG), "corda", pytest.param("lora_ga", marks=LONG)])
def test_first_values_do_not_depend_on_the_process_and_are_exported(bases, tmp_path, init):
    options = settings(bases["llama"], init, {"eva_config": {"tau": TAU}} if init == "eva" else {})
    torch.manual_seed(5)
    model, other = started(options), started(options, Position(rank=1, world=2))
    for name, found in factors(model).items():
        assert all(map(torch.equal, found, factors(other)[name])), name
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in state.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(model, tmp_path / "adapter", {n: p.detach().clone() for n, p in state.items()}, str(bases["llama"]))
    check_saved_adapter(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"])
    base = logits(plain)
    loaded = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert relative_distance(loaded, logits(model)) < 5e-6 < 0.1 < relative_distance(loaded, base)


def test_loftq_begins_with_the_best_approximation_of_what_4_bits_lose(bases):
    options = settings(bases["llama"], "loftq", load_in_4bit=True, method_options={})
    check_method(options)
    model = materialize(attach_adapter(load_model(options), options), options)
    weights = AutoModelForCausalLM.from_pretrained(bases["llama"]).state_dict()
    for name, layer in lora_layers(model).items():
        lost = weights[f"{name}.weight"] - dequantize_module_weight(layer.get_base_layer())
        a, b = factors(model)[name]
        left = lost - layer.scaling["default"] * (b @ a)
        # Eckart and Young: no matrix of rank 4 leaves less than the other singular values.
        torch.testing.assert_close(left.norm(), torch.linalg.svdvals(lost)[4:].norm(), rtol=1e-4, atol=0)
    assert model.peft_config["default"].init_lora_weights is True


def test_eva_refuses_too_few_labels(bases):
    options = settings(bases["llama"], "eva", {"init_rows": 1}, lora_r=16)
    with pytest.raises(ConfigError, match=r"eva computes 32 directions .* have only .* labels; raise init_rows"):
        started(options)


def test_what_needs_rows_is_refused_where_weights_are_split_before(bases, monkeypatch):
    monkeypatch.setattr("accel_llm.adapters.lora_options.strategy", lambda: "zero3")
    with pytest.raises(ConfigError, match=r"init_lora_weights: corda runs the model .* zero3 has split"):
        check_method(settings(bases["llama"], "corda"))


@pytest.mark.parametrize("init", ["corda", "lora_ga", pytest.param("eva", marks=LONG)])
def test_nothing_is_decomposed_in_16_bits(bases, monkeypatch, init):
    """Autocast of a CPU would make float32 of such a matrix; that of CUDA does not, and CUDA cannot decompose it."""
    dtypes = set()

    def recorded(function: Any) -> Any:
        return lambda matrix, *args, **kwargs: (dtypes.add(matrix.dtype), function(matrix, *args, **kwargs))[1]

    monkeypatch.setattr(torch.linalg, "svd", recorded(torch.linalg.svd))
    monkeypatch.setattr(torch.linalg, "qr", recorded(torch.linalg.qr))
    more = {"eva_config": {"tau": TAU}} if init == "eva" else {}
    reset()  # the Accelerator of another test has another precision
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        started(settings(bases["llama"], init, more, precision="bf16"), accelerator=accelerator)
    finally:
        reset()
    assert dtypes and dtypes <= {torch.float32, torch.float64}


@pytest.mark.parametrize("init, times", [("corda", 4), ("lora_ga", 5)])
def test_sums_of_a_few_layers_at_a_time_give_the_same_numbers(bases, monkeypatch, capsys, init, times):
    """Also where activations are recomputed, which transformers does in training mode only."""
    whole = factors(started(settings(bases["llama"], init)))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sums_over_rows, "SUMS_AT_ONCE", 14_000)
    parts = factors(started(settings(bases["llama"], init, gradient_checkpointing=True)))
    assert f"init_lora_weights: {init} runs the base {times} times through {FIRST} rows" in capsys.readouterr().out
    for name, found in parts.items():
        assert all(map(torch.equal, found, whole[name])), name


def test_layers_with_the_same_input_share_its_covariance(bases):
    model = attach_adapter(load_model(settings(bases["llama"], "corda")), settings(bases["llama"], "corda"))
    layers = linear_lora_layers(model)
    alike = sums_over_rows._layers_by_input(layers, lambda: logits(model))
    kinds = [[name.rpartition(".")[2] for name in names] for names in alike.values()]
    assert kinds == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


@pytest.mark.long
@pytest.mark.parametrize("init", ["corda", "lora_ga", "eva"])
def test_a_resumed_run_does_not_compute_its_first_values_again(script, tiny, chats, tmp_path, monkeypatch, init):
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--learning_rate", 1e-2]
    words += ["--init_lora_weights", init, "--lora_r", 4, "--max_steps", 4, "--save_steps", 2, "--eval_generate", 0]
    words += ["--method_options", "{init_rows: 4, eva_config: {tau: 0.3}}" if init == "eva" else "init_rows=4"]
    script("sft", *words, "--output_dir", tmp_path / "whole")
    monkeypatch.delattr(data_starts, "_compute")
    script(
        "sft",
        *words,
        *("--output_dir", tmp_path / "parts"),
        *("--resume_from_checkpoint", tmp_path / "whole" / "checkpoints" / "step-00000002"),
    )
    whole, parts = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert equal_tensors(whole, parts)
    if init == "eva":
        assert len({tensor.shape[0] for name, tensor in whole.items() if "lora_A" in name}) > 1


@pytest.mark.parametrize("rows", [0, -1, "many"])
def test_the_number_of_rows_to_look_at_is_checked(bases, rows):
    with pytest.raises(ConfigError, match=rf"init_rows {rows!r} is not allowed; give a whole number of at least 1"):
        check_method(settings(bases["llama"], "corda", {"init_rows": rows}))
