"""An export is loaded by plain transformers or PEFT before it appears; what is not whole, or another model, is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import FAMILIES, SIZES, tiny_model
from transformers import AutoModelForCausalLM

from accel_llm.adapters.saved import save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.training import export, read_back

# peft 0.21.2
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = TrainOptions(model_name_or_path="unused", method="full")


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def write(tmp_path, accelerator):
    """`write(model)` writes a full export; returns (folder, model, state, logits), which `read_export_back` takes."""

    def call(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Path, Any, dict[str, torch.Tensor], torch.Tensor]:
        state = export._model_state(model, {name: t.to(dtype) for name, t in trained_state(model).items()})
        logits = read_back.sample_logits(accelerator, model)
        export._save_model(model, tmp_path / ".model.partial", state, dtype)
        model.generation_config.save_pretrained(tmp_path / ".model.partial")
        return tmp_path / ".model.partial", model, state, logits

    return call


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_back_bit_by_bit(write, family):
    facts = read_back.read_export_back(*write(tiny_model(family)), OPTIONS)
    assert facts["loaded_by"] == "transformers" and facts["tensors"] > 3 and facts["parameters"] > 1000
    assert facts["logits"]["tokens"] == 32 and facts["logits"]["relative_error"] < 1e-5


def test_16_bit_files_round_the_logits_but_not_beyond_what_is_allowed(write):
    facts = read_back.read_export_back(*write(tiny_model("llama"), torch.bfloat16), OPTIONS)
    assert 1e-4 < facts["logits"]["relative_error"] < 0.1


def edit(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(state)
    save_file(state, file, {"format": "pt"})


def double(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"] *= 2


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: edit(folder, lambda state: state.clear()), "but its files hold 0 numbers in 0 tensors for"),
        (lambda folder: edit(folder, lambda state: state.pop("model.norm.weight")), " numbers in 20 tensors for "),
        (
            lambda folder: edit(folder, lambda state: state.update(other=state.pop("model.norm.weight"))),
            "1 weights are missing (model.norm.weight)",
        ),
        (lambda folder: edit(folder, double), "1 weights have other values (model.norm.weight)"),
        (lambda folder: set_config(folder, num_hidden_layers=3), "9 weights are missing (model.layers.2."),
        (
            lambda folder: set_config(folder, num_key_value_heads=4),
            "4 weights have another shape, such as model.layers.0",
        ),
        (lambda folder: set_config(folder, rms_norm_eps=0.3), "the logits of a row differ by"),
        (lambda folder: (folder / "config.json").write_text("{"), "it cannot be loaded ("),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "it cannot be loaded ("),
    ],
)
def test_a_bad_export_is_refused(write, damage, message):
    """An export with too few, too many or other weights, or with another config, is none; and whole it is one."""
    folder, *rest = write(tiny_model("llama"))
    read_back.read_export_back(folder, *rest, OPTIONS)
    damage(folder)
    with pytest.raises(ConfigError) as error:
        read_back.read_export_back(folder, *rest, OPTIONS)
    sentence = str(error.value)
    assert sentence.startswith(f"output_dir: {folder.with_name('model')} was written and read back, but ")
    assert message in sentence


@pytest.fixture
def adapter(tmp_path, accelerator):
    """A trained adapter on a base in files: (folder, model, state, logits, options)."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    folder, state = tmp_path / ".adapter.partial", trained_state(model)
    save_adapter(model, folder, state, str(tmp_path / "base"))
    base.generation_config.save_pretrained(folder)
    options = TrainOptions(model_name_or_path=str(tmp_path / "base"), method="lora")
    return folder, model, state, read_back.sample_logits(accelerator, model), options


def test_an_adapter_is_compared_on_its_base(adapter):
    facts = read_back.read_export_back(*adapter)
    assert facts["loaded_by"] == "peft" and facts["tensors"] == 2 * 7 * SIZES["num_hidden_layers"]
    assert facts["logits"]["relative_error"] < 1e-5


def test_an_adapter_without_tensors_or_with_others_is_refused(adapter):
    file = adapter[0] / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: tensor * 2 for name, tensor in state.items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="but the logits of a row differ by"):
        read_back.read_export_back(*adapter)
    save_file({}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="28 of 28 weights are missing"):
        read_back.read_export_back(*adapter)


def test_what_is_too_large_is_not_computed_once_more(write, monkeypatch):
    arguments = write(tiny_model("llama"))
    monkeypatch.setattr(read_back, "MAX_PARAMETERS", 10_000)
    assert read_back.read_export_back(*arguments, OPTIONS)["logits"].startswith("not compared: the model has ")
