"""Pretraining as a person starts it: a trained model goes on from where it is, a fresh one begins where chance does."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_llm.errors import ConfigError

SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "weights" / "stories260K_hf"
TEXT = SHARED / "pretrain" / "tinystories.txt"
CHARACTERS = (
    14_700  # of the beginning of the text, which this model tells with a loss of about 1.42; of all of it: 1.84
)
real = pytest.mark.skipif(not TEXT.exists(), reason="the real data are not beside the project")


def metrics(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """The beginning of the text as one document."""
    path = tmp_path / "stories.jsonl"
    path.write_text(json.dumps({"text": TEXT.read_text(encoding="utf-8")[:CHARACTERS]}), encoding="utf-8")
    return path


def plain_loss(stories: Path) -> float:
    """The mean loss of the document by plain transformers, in pieces of 512 tokens, the end token being its last."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    text = json.loads(stories.read_text(encoding="utf-8"))["text"]
    ids = torch.tensor([*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id])
    total, count = 0.0, 0
    for piece in ids.split(512):
        with torch.no_grad():
            loss = model(input_ids=piece[None], labels=piece[None]).loss
        total, count = total + float(loss) * (len(piece) - 1), count + len(piece) - 1
    return total / count


@real
def test_continued_pretraining_begins_at_the_loss_of_the_model_and_does_not_rise(script, stories, tmp_path, quiet):
    output = tmp_path / "run"
    words = ["--model_name_or_path", STORIES, "--train_files", stories, "--eval_files", stories, "--max_length", 512]
    words += ["--total_batch_size", 4, "--max_steps", 16, "--learning_rate", 2e-4, "--eval_on_start", "--eval_steps", 4]
    script("pretrain", *words, "--logging_steps", 1, "--output_dir", output)
    losses = metrics(output, "eval/loss")
    assert losses[0] == pytest.approx(1.42, abs=0.02)
    assert losses[0] == pytest.approx(plain_loss(stories), abs=2e-5)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


@real
def test_a_family_from_scratch_begins_at_chance_and_learns(script, stories, tmp_path, capsys):
    output = tmp_path / "run"
    words = ["--config_name", "llama", "--tokenizer_name", STORIES, "--train_files", stories, "--max_length", 512]
    words += ["--config_overrides", "hidden_size=64", "num_hidden_layers=2", "num_attention_heads=4"]
    words += ["intermediate_size=128", "tie_word_embeddings=true", "--total_batch_size", 4, "--max_steps", 8]
    script("pretrain", *words, "--learning_rate", 3e-3, "--logging_steps", 1, "--output_dir", output)
    losses, screen = metrics(output, "loss"), capsys.readouterr().out
    assert losses[0] == pytest.approx(math.log(512), abs=0.1) and losses[-1] < losses[0] - 0.3
    assert "model          random weights, llama: 115,008 parameters (82,240 without embeddings), all trained" in screen
    exported = AutoModelForCausalLM.from_pretrained(output / "model")
    assert exported.num_parameters() == 115_008 and exported.config.vocab_size == 512
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert run["parameters"] == {"total": 115_008, "body": 82_240, "active": None}

    # The same shape is continued; another one is refused.
    again = [*words, "--learning_rate", 3e-3, "--resume_from_checkpoint", next((output / "checkpoints").glob("step-*"))]
    with pytest.raises(ConfigError, match=r"^config_overrides: .* was saved with "):
        script("pretrain", *again, "--config_overrides", "hidden_size=32", "--output_dir", tmp_path / "other")


@real
def test_lora_in_pretraining_is_not_advised(script, stories, tmp_path, capsys):
    words = ["--model_name_or_path", STORIES, "--train_files", stories, "--max_length", 512, "--method", "lora"]
    script("pretrain", *words, "--dry_run", "--output_dir", tmp_path / "run")
    screen = " ".join(capsys.readouterr().out.split())
    assert (
        "method lora: it learns little new knowledge, so it is not advised for pretraining; use method full." in screen
    )
    with pytest.raises(
        ConfigError, match=r"^method: lora trains an adapter beside random weights, which nothing keeps"
    ):
        script("pretrain", "--config_name", STORIES, "--train_files", stories, "--method", "lora")


def test_the_shape_of_the_model_is_checked_before_any_data(script: Callable[..., None], tiny, tmp_path):
    words = ["--tokenizer_name", tiny, "--train_files", "missing.jsonl", "--output_dir", tmp_path / "run"]
    for name, problem in (("lama", "config_name: lama is neither a folder nor a family"), ("llama", "train_files: ")):
        with pytest.raises(ConfigError, match=f"^{problem}"):
            script("pretrain", "--config_name", name, *words)
