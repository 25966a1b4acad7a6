"""vLLM 42624 (and 44158): a model saved by transformers 5 is read by transformers 4 with another rotary embedding.

transformers 5 writes `rope_parameters`, which 4 ignores: it takes a base of 10,000 and no scaling, and says nothing. The
file must hold what transformers 4 reads, `rope_theta`, `rope_scaling` and others, and mean the same in 5. The expected
values are those of the models' own published config.json, which were written for transformers 4.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from accel_llm.model.config_file import save_config

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-8B": ("qwen3", {"rope_theta": 1000000, "rope_scaling": None}),
    "Qwen3-8B with YaRN": (
        "qwen3",
        {"rope_theta": 1000000, "rope_scaling": YARN, "max_position_embeddings": 131072},
    ),
    "Llama-3.1-8B": (
        "llama",
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
    ),
    "Mistral-7B-v0.3": ("mistral", {"rope_theta": 1000000.0}),
    "Gemma-3-4B": (
        "gemma3_text",
        {
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    ),
    "Phi-3-mini-128k": (
        "phi3",
        {
            "rope_theta": 10000.0,
            "rope_scaling": LONGROPE,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Phi-3.5-MoE": (
        "phimoe",
        {
            "rope_theta": 10000.0,
            "rope_scaling": LONGROPE
            | {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 4096},
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "hidden_size": 3072,
            "num_attention_heads": 32,
        },
    ),
    "RedPajama-INCITE-3B": ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 50000}),
    "Phi-2": ("phi", {"rope_theta": 10000.0, "partial_rotary_factor": 0.4}),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_rotary_settings_have_their_old_names_too(tmp_path: Path, model: str) -> None:
    family, published = PUBLISHED[model]
    config = AutoConfig.for_model(family, **deepcopy(published))  # transformers changes the values it gets
    save_config(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written.get(key) for key in published} == published

    # In transformers 5 the file means what it meant before.
    config.save_pretrained(tmp_path / "stock")
    assert "rope_theta" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    again = AutoConfig.from_pretrained(tmp_path / "stock")  # without the old names
    save_config(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written
    ours, stock = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path / "stock")
    assert ours.rope_parameters == stock.rope_parameters == config.rope_parameters


def test_the_language_part_of_a_multimodal_model_has_them_too(tmp_path: Path) -> None:
    save_config(AutoConfig.for_model("gemma3"), tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1000000.0, 10000.0)
