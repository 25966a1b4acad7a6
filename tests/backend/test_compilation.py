"""torch.compile by the launch YAML: numbers, names and files are those of the uncompiled model, the oracle here."""

import functools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import checkpoint_path, run_json, tiny_model, weights
from torch.utils.checkpoint import checkpoint

from accel_llm.backend.compilation import (
    compile_layers,
    compile_problems,
    compile_settings,
    compiled_graphs,
    decoder_layers,
)
from accel_llm.data.batches import collate_packed
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.training.census import compilation_facts


@pytest.fixture
def compiler(monkeypatch):
    """Ask for a compiler as the launcher does, one that traces and writes no code. Each test starts without graphs."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    yield monkeypatch
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def packed(lengths: list[int], seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return collate_packed([(ids, ids) for ids in (rng.integers(3, 97, n) for n in lengths)])


def gradients(model, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = next_token_loss(model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("backend", "checkpointing"), [("eager", False), pytest.param("aot_eager", True, marks=pytest.mark.long)]
)
@pytest.mark.long
def test_gradients_of_packed_rows_of_any_length_are_those_without_a_compiler(compiler, backend, checkpointing, quiet):
    """Also under activation checkpointing, and in few graphs: not one for each layer or each set of documents."""
    compiler.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    model = tiny_model("llama", num_hidden_layers=2).train()
    attach_loss(model, 64)
    enable_packing(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    if checkpointing:
        for layer in decoder_layers(model):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    batches = [packed(lengths, seed) for seed, lengths in enumerate([[20, 12], [7, 9, 14], [5, 5, 11]])]
    expected = [gradients(model, batch) for batch in batches]
    names = [name for name, _ in model.named_parameters()]

    compile_layers(model)
    for batch, (loss, slopes) in zip(batches, expected, strict=True):
        compiled_loss, compiled_slopes = gradients(model, batch)
        assert compiled_loss == pytest.approx(loss, rel=1e-6)
        for name, slope in slopes.items():
            torch.testing.assert_close(compiled_slopes[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))
    assert [name for name, _ in model.named_parameters()] == names
    assert 3 <= compiled_graphs() <= 12
    before = compiled_graphs()
    with torch.no_grad():
        next_token_loss(model, packed([3, 4], 9))
    assert compiled_graphs() == before, "evaluation runs uncompiled"


@pytest.mark.long
def test_a_compiled_run_exports_what_an_uncompiled_one_does_and_continues(script, tiny, chats, tmp_path, compiler):
    """Published: an adapter without tensors, because all names began with `_orig_mod.`, and status done."""
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--eval_files", chats, "--max_length", 128]
    words += ["--method", "lora", "--gradient_checkpointing", "--eval_generate", 2, "--max_steps", 4, "--save_steps", 2]

    def run(name: str, *more: object) -> dict[str, torch.Tensor]:
        script("sft", *words, "--output_dir", tmp_path / name, *more)
        return weights(tmp_path / name)

    compiled = run("compiled")
    facts = run_json(tmp_path / "compiled")["accelerate"]
    assert facts["compiled"]["backend"] == "eager" and facts["compiled"]["graphs"] > 0
    assert facts["recomputed_in_backward"] and facts["environment"]["ACCELERATE_DYNAMO_BACKEND"] == "eager"
    continued = run("continued", "--resume_from_checkpoint", checkpoint_path(tmp_path / "compiled", 2))
    compiler.delenv("ACCELERATE_DYNAMO_BACKEND")
    plain = run("plain")
    assert run_json(tmp_path / "plain")["accelerate"]["compiled"] is None
    assert compiled.keys() == continued.keys() == plain.keys() and len(plain) > 0
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(continued[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_compiler_that_compiles_nothing_is_an_error(compiler):
    with pytest.raises(RuntimeError, match="eager compiled nothing in the first step"):
        compilation_facts()
    compiler.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert compilation_facts() is None


def test_the_settings_of_the_launcher(compiler):
    compiler.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune-no-cudagraphs")
    compiler.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "True")
    assert compile_settings() == {"backend": "eager", "dynamic": True, "mode": "max-autotune-no-cudagraphs"}
    compiler.setenv("ACCELERATE_DYNAMO_MODE", "default")
    compiler.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
    assert compile_settings() == {"backend": "eager", "dynamic": None}
    compiler.setenv("ACCELERATE_DYNAMO_BACKEND", "FX2TRT")
    assert compile_problems("single", cpu=True) == [
        "dynamo_backend: fx2trt is not installed; use inductor, or remove it from the launch YAML."
    ]
    compiler.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    compiler.setenv("PATH", "")
    compiler.delenv("CXX", raising=False)
    assert compile_problems("single", cpu=True)[0].startswith("dynamo_backend: inductor needs a C++ compiler on a CPU")
    compiler.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    assert compile_problems("zero2", cpu=True) == []
    assert compile_problems("zero3", cpu=True)[0].endswith("use fsdp2.yaml.")
    compiler.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    assert compile_problems("single", cpu=False)[0].startswith(
        "dynamo_backend: eager with dynamo_mode: reduce-overhead"
    )
