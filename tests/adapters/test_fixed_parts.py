"""What PEFT computes by a decomposition of the base stays with an adapter, on machines that find other vectors too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import materialize, moved_adapter, relative_distance, turn_vectors
from transformers import AutoModelForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.compat import read_adapter
from accel_llm.adapters.fixed_parts import fixed_parts, follow_projections
from accel_llm.adapters.saved import check_saved_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.merge.attached import load_adapter
from accel_llm.merge.merge import merge_adapter
from accel_llm.model.loading import load_model

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # torch's, for FRoD's sparse matrix
]
IDS = torch.arange(3, 43)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("method", ["psoft", "frod", pytest.param("tinylora", marks=pytest.mark.long)])
def test_an_adapter_is_the_same_where_the_vectors_are_others(tiny, tmp_path, monkeypatch, method):
    folder, name = tmp_path / "adapter", {"method": method, "adapter_name_or_path": str(tmp_path / "adapter")}
    model = moved_adapter(tiny, folder, method=method, by=0.3)
    check_saved_adapter(model, folder)
    expected = logits(model)
    assert relative_distance(logits(PeftModel.from_pretrained(load(tiny), folder)), expected) < 1e-6
    assert relative_distance(logits(load(tiny)), expected) > 1e-3

    turn_vectors(monkeypatch)
    asked = load_adapter(load(tiny), read_adapter(folder))
    merge_adapter(folder, tmp_path / "merged", base=str(tiny))
    options = TrainOptions(model_name_or_path=str(tiny), packing=False, **name)
    continued = materialize(attach_adapter(load_model(options), options), options)
    for same in (asked, load(tmp_path / "merged"), continued):
        assert relative_distance(logits(same), expected) < 1e-6
    # Plain PEFT computes them anew; TinyLoRA's are in its file.
    plain = relative_distance(logits(PeftModel.from_pretrained(load(tiny), folder)), expected)
    assert plain < 1e-6 if method == "tinylora" else plain > 1e-3


def test_an_adapter_of_plain_peft_without_its_factors_still_loads(tiny, tmp_path):
    model = moved_adapter(tiny, tmp_path / "ours", method="psoft", by=0.3)
    for module in model.modules():
        for name in ("_psoft_A_cache", "_psoft_B_cache"):
            if hasattr(module, name):
                getattr(module, name)._non_persistent_buffers_set.add("default")
    model.save_pretrained(tmp_path / "plain")
    assert not any("cache" in name for name in read_adapter(tmp_path / "plain").weights)
    loaded = load_adapter(load(tiny), read_adapter(tmp_path / "plain"))
    assert relative_distance(logits(loaded), logits(model)) < 1e-6


def test_the_checkpoints_get_what_is_not_trained(tiny, tmp_path, monkeypatch):
    """A checkpoint holds the offsets too, and nothing that every machine computes alike, such as OFT's indices."""
    kinds = {
        "psoft": {"_psoft_A_cache", "_psoft_B_cache"},
        "frod": {"frod_V", "frod_s_indices", "frod_s_size"},
        "vera": {"vera_A", "vera_B"},
        "oft": set(),
    }
    for method, expected in kinds.items():
        model = moved_adapter(tiny, tmp_path / method, method=method)
        parts = fixed_parts(model)
        found = {part for name in parts for part in name.split(".") if part.startswith((f"{method}_", f"_{method}"))}
        assert found == expected and bool(parts) == bool(expected)
        if method == "frod":  # U is computed on the training device: meta tensors have no values that could come back
            with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match="no data"):
                patch.setattr("accel_llm.adapters.fixed_parts.training_device", lambda: torch.device("meta"))
                follow_projections(model)
    pissa = fixed_parts(moved_adapter(tiny, tmp_path / "pissa", init_lora_weights="pissa"))
    assert pissa and all(name.endswith(".offset") for name in pissa)
