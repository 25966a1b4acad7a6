"""Extracted adapters reproduce the tuned model: exactly at full rank, and as well as possible at lower ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from accel_llm.config.tool_options import ExtractOptions, MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge import extract
from accel_llm.merge.extract import ExtractResult, extract_adapter, low_rank_factors
from accel_llm.merge.merge import merge

pytestmark = pytest.mark.usefixtures("quiet")


def tune(base: Path, target: Path, rank: int | None = None, also: tuple[str, ...] = ()) -> Path:
    """A model whose linear layers have changed, by matrices of a rank, and the weights named in `also`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                rows, columns = parameter.shape
                middle = rank or min(rows, columns)
                parameter += (
                    0.1
                    * torch.randn(rows, middle, generator=generator)
                    @ torch.randn(middle, columns, generator=generator)
                )
            elif name in also:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(target)
    return target


def extract_to_folder(base: Path, model: Path, target: Path, **options) -> ExtractResult:
    return extract_adapter(ExtractOptions(base=str(base), model=str(model), output_dir=str(target), **options))


def merged(base: Path, adapter: Path, target: Path) -> dict[str, torch.Tensor]:
    merge(MergeOptions(adapter=[str(adapter)], base=str(base), output_dir=str(target)))
    return load_file(target / "model.safetensors")


def test_a_change_of_low_rank_is_extracted_exactly(tiny, tmp_path):
    model = tune(tiny, tmp_path / "tuned", rank=4)
    result = extract_to_folder(tiny, model, tmp_path / "adapter", lora_r=4)
    assert len(result.errors) == 14 and max(result.errors.values()) < 1e-5 and not result.uncovered_changes
    again = merged(tiny, tmp_path / "adapter", tmp_path / "merged")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.allclose(again[name], tensor, atol=1e-5), name
    assert {path.name for path in result.folder.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert json.loads((result.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)


def test_errors_equal_those_of_the_best_approximation_of_that_rank(tiny, tmp_path):
    model = tune(tiny, tmp_path / "tuned")
    before, after = load_file(tiny / "model.safetensors"), load_file(model / "model.safetensors")
    last = 2.0
    for rank in (2, 8, 32):
        result = extract_to_folder(tiny, model, tmp_path / f"adapter{rank}", lora_r=rank)
        name = "model.layers.1.mlp.up_proj"
        values = torch.linalg.svdvals(after[f"{name}.weight"] - before[f"{name}.weight"])
        expected = float(values[rank:].norm() / values.norm())
        assert result.errors[name] == pytest.approx(expected, abs=1e-5)
        assert result.errors[name] < last
        last = result.errors[name]
    assert max(result.errors.values()) < 1e-5  # no matrix of the model is of a higher rank


def test_large_matrices_come_near_the_best_approximation(monkeypatch):
    monkeypatch.setattr(extract, "SMALL_MATRIX", 10)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(200, 16, generator=generator) @ torch.randn(16, 150, generator=generator)
    change += 0.1 * torch.randn(200, 150, generator=generator)
    state = torch.random.get_rng_state()
    left, right = low_rank_factors(change, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    best = float(torch.linalg.svdvals(change)[16:].norm())
    assert left.shape == (200, 16) and right.shape == (16, 150)
    assert float((change - left @ right).norm()) < 1.001 * best
    assert all(torch.equal(*pair) for pair in zip(low_rank_factors(change, 16), (left, right), strict=True))


def test_weights_outside_linear_layers_are_reported_or_saved_whole(tiny, tmp_path):
    also = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    model = tune(tiny, tmp_path / "tuned", rank=4, also=also)
    result = extract_to_folder(tiny, model, tmp_path / "adapter", lora_r=4)
    assert result.uncovered_changes.keys() == {"model.embed_tokens.weight", "model.norm.weight"}
    assert "lm_head" in result.errors
    saved = ["embed_tokens", "norm", "lm_head"]
    result = extract_to_folder(tiny, model, tmp_path / "whole", lora_r=4, modules_to_save=saved)
    assert not result.uncovered_changes and "lm_head" not in result.errors
    again = merged(tiny, tmp_path / "whole", tmp_path / "merged")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.allclose(again[name], tensor, atol=1e-5), name


def test_transposed_layers_are_extracted(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight += torch.randn(16, 3) @ torch.randn(3, 48)
    model.save_pretrained(tmp_path / "tuned")
    result = extract_to_folder(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", lora_r=3)
    assert (
        list(result.errors) == ["transformer.h.0.attn.c_attn"] and result.errors["transformer.h.0.attn.c_attn"] < 1e-5
    )
    again = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert torch.allclose(
        again["transformer.h.0.attn.c_attn.weight"], tuned["transformer.h.0.attn.c_attn.weight"], atol=1e-5
    )


def test_models_that_allow_no_extraction_are_refused(tiny, make_model, tmp_path):
    target = tmp_path / "adapter"
    for model, sentence in (
        (tiny, f"model: {tiny} has the weights of {tiny}; there is nothing to extract."),
        (
            tmp_path / "no",
            f"model: {tmp_path / 'no'} does not exist; a model folder or a hub id (owner/name) is allowed.",
        ),
        (make_model(tmp_path / "wide", hidden_size=64), "weights have another shape, such as"),
        (make_model(tmp_path / "deep", num_hidden_layers=3), "model: it has other weights than its base, such as "),
    ):
        with pytest.raises(ConfigError) as error:
            extract_to_folder(tiny, model, target)
        assert sentence in str(error.value).replace("of its weights", "weights")
        assert not target.exists() and not target.with_name(".adapter.partial").exists()


def test_the_script_prints_the_error_of_each_layer(script, tiny, tmp_path, capsys):
    model = tune(tiny, tmp_path / "tuned", also=("model.norm.weight",))
    script("extract", "--base", tiny, "--model", model, "--lora_r", 8, "--output_dir", tmp_path / "adapter")
    output = capsys.readouterr().out
    assert (
        "14 layers at rank 8; share of their change that is lost:" in output and output.count("%  model.layers.") == 10
    )
    assert "not in the adapter, though changed by" in output and "model.norm.weight" in output
