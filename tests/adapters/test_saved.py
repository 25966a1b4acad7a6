"""After an export plain PEFT loads the adapter, and finds everything that was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import materialize

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.saved import check_saved_adapter, save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model
from accel_llm.model.vocabulary import extend_vocabulary

pytestmark = pytest.mark.usefixtures("quiet")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_dora": True, "use_rslora": True, "lora_alpha": 5},
    {"init_lora_weights": "pissa", "lora_target_modules": ["q_proj", "embed_tokens"]},
    {"init_lora_weights": "olora", "method": "qlora"},
    {"modules_to_save": ["lm_head", "norm"], "lora_target_modules": r".*\.0\..*_proj", "lora_bias": "all"},
]


@pytest.fixture
def saved(make_model, tmp_path) -> Callable[..., tuple[Any, Path]]:
    def make(new: range = range(0), **options: Any) -> tuple[Any, Path]:
        base = make_model(tmp_path / "base", attention_bias="lora_bias" in options)
        settings = TrainOptions(**{"model_name_or_path": str(base), "packing": False, "lora_r": 4} | options)
        model = load_model(settings)
        extend_vocabulary(model, new)
        model = materialize(attach_adapter(model, settings, new), settings)
        state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        save_adapter(model, tmp_path / "adapter", state, str(base))
        return model, tmp_path / "adapter"

    return make


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_was_saved_passes(saved, options):
    check_saved_adapter(*saved(**options))


def test_rows_of_new_tokens_pass(saved):
    check_saved_adapter(*saved(range(600, 603)))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight less": (
        lambda folder: change_weights(folder, lambda weights: weights.pop(FIRST)),  # type: ignore[arg-type,return-value]
        f"1 of 28 weights are missing, such as {FIRST}",
    ),
    "a weight more": (
        lambda folder: change_weights(folder, lambda weights: weights.update(x=torch.zeros(2))),
        "1 of 29 weights were not trained, such as x",
    ),
    "no weight at all": (
        lambda folder: change_weights(folder, lambda weights: weights.clear()),
        "28 of 28 weights are missing",
    ),
    "another shape": (
        lambda folder: change_weights(folder, lambda weights: weights.update({FIRST: torch.zeros(4, 63)})),
        f"1 weights have another shape, such as {FIRST} (4, 63), trained is (4, 64)",
    ),
    "another rank": (lambda folder: change_config(folder, r=8), "PEFT cannot load it (Error(s) in loading state_dict"),
    "another alpha": (
        lambda folder: change_config(folder, lora_alpha=9),
        "14 layers are scaled otherwise, such as model.layers.0.mlp.down_proj",
    ),
    "another scale of one layer": (
        lambda folder: change_config(folder, alpha_pattern={"layers.1.mlp.up_proj": 1}),
        "1 layers are scaled otherwise, such as model.layers.1.mlp.up_proj",
    ),
    "fewer targets": (
        lambda folder: change_config(folder, target_modules=["q_proj"]),
        "24 weights have no counterpart after loading",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "PEFT cannot load it ("),
    "a broken config": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type"') and None,  # type: ignore[return-value]
        "PEFT cannot load it (",
    ),
    "a file cut short": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20) and None,  # type: ignore[return-value]
        "PEFT cannot load it (",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_the_folder_is_said(saved, fault):
    model, folder = saved()
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ConfigError) as error:
        check_saved_adapter(model, folder)
    start = f"adapter: {folder} was written, but it does not hold what was trained: {words}"
    assert str(error.value).startswith(start) and str(error.value).endswith(".")


def test_a_model_whose_names_peft_does_not_know_is_said(saved):
    """As torch.compile names them: PEFT saves an adapter of 0 tensors without a word."""
    model, folder = saved()
    compiled = torch.nn.Module()
    compiled._orig_mod = model
    compiled.peft_config, compiled.base_model = model.peft_config, model.base_model
    with pytest.raises(ConfigError, match=r"28 of 28 weights are missing, such as _orig_mod\.base_model"):
        check_saved_adapter(compiled, folder)
