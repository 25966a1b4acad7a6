"""vLLM 51063 (and 6758, NeMo Automodel 2511): config.json says that embedding and head are tied, the files hold two.

transformers 5 keeps both and only warns; vLLM and transformers 4 believe config.json, drop the head and write nonsense.
Right is that a model trained from such files keeps its head, and that its config.json says so.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from accel_llm.model.config_file import save_config
from accel_llm.model.loading import load_complete_model


def _save(folder: Path, same: bool) -> Path:
    """Save a model whose config says that embedding and head are tied; `same` says whether the weights agree."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if same else 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_head_of_its_own_is_kept_and_the_config_says_so(tmp_path: Path, capsys) -> None:
    model = load_complete_model(str(_save(tmp_path / "base", same=False)))
    assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)
    assert "tie_word_embeddings: config.json says true, but the files hold a head" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "export")
    save_config(model.config, tmp_path / "export")
    assert AutoConfig.from_pretrained(tmp_path / "export").tie_word_embeddings is False
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "export"), torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_copy_of_the_embedding_stays_tied(tmp_path: Path, capsys) -> None:
    model = load_complete_model(str(_save(tmp_path, same=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings is True
    assert not capsys.readouterr().out
