"""Pretraining on several sources, materialised or streamed: the loss of each, and a resume that is bit-equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support import STOP, Stopped, equal_tensors, metrics, run_json, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import accel_llm.data.text_stream as text_stream
from accel_llm.errors import ConfigError

ROOT = Path(__file__).parents[2]
BASE = ROOT / "accel_llm" / "demo_base"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for two sources with weights, and one of each to evaluate on."""
    words = {"sums": "What is 3 + 4? It is 7.", "sentences": "The quick brown fox jumps over the lazy dog."}
    for name, text in words.items():
        lines = [" ".join(text.split()[: 3 + k % 8]) + f" {k}" for k in range(200)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
        (tmp_path / f"{name}_eval.txt").write_text("\n".join(line + "!" for line in lines[:9]), encoding="utf-8")
    values = {
        "model_name_or_path": str(BASE),
        "train_files": [{"path": str(tmp_path / f"{name}.txt"), "weight": k + 1} for k, name in enumerate(words)],
        "eval_files": [str(tmp_path / f"{name}_eval.txt") for name in words],
        "max_length": 64,
        "max_steps": 6,
        "total_batch_size": 4,
        "logging_steps": 1,
        "save_steps": STOP,
        "learning_rate": 1e-3,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_and_resumed_run_is_bit_equal(script, recipe, interrupt, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(text_stream, "BUFFER_ROWS", 4)
    more = ("--config", recipe, "--streaming", str(streaming).lower())
    script("pretrain", *more, "--output_dir", tmp_path / "whole")
    interrupt(STOP)
    with pytest.raises(Stopped):
        script("pretrain", *more, "--output_dir", tmp_path / "stopped")
    script("pretrain", *more, "--output_dir", tmp_path / "stopped")
    assert equal_tensors(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    whole = metrics(tmp_path / "whole")
    assert whole == metrics(tmp_path / "stopped")
    counted = run_json(tmp_path / "stopped")["ledger"]["inputs"]
    assert counted == run_json(tmp_path / "whole")["ledger"]["inputs"]
    rows = sum(amount["rows"] for amount in counted.values())
    assert 0 < rows < 400 if streaming else rows == 400
    assert {"loss/sums.txt", "loss/sentences.txt", "epoch/sums.txt", "epoch/sentences.txt"} <= set(whole[0])


def test_the_loss_of_each_source_is_that_of_plain_transformers(script, recipe, tmp_path):
    script("pretrain", "--config", recipe, "--max_steps", 1, "--eval_on_start", "--output_dir", tmp_path / "out")
    first = metrics(tmp_path / "out")[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    total, count = 0.0, 0
    for name in ("sums", "sentences"):
        sums, targets = 0.0, 0
        for line in (tmp_path / f"{name}_eval.txt").read_text(encoding="utf-8").splitlines():
            ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                sums += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            targets += ids.shape[1] - 1
        assert first[f"eval/loss/{name}_eval.txt"] == pytest.approx(sums / targets, rel=1e-5)
        total, count = total + sums, count + targets
    assert first["eval/loss"] == pytest.approx(total / count, rel=1e-5)


def test_another_file_under_the_same_name_is_another_run(script, recipe, interrupt, tmp_path):
    more = ("--config", recipe, "--streaming", "true", "--output_dir", tmp_path / "out")
    interrupt(STOP)
    with pytest.raises(Stopped):
        script("pretrain", *more)
    path = tmp_path / "sums.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("What", "Whom"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train_files: .* was saved with the rows"):
        script("pretrain", *more)
    with pytest.raises(ConfigError, match="train_files: a stream goes on at a place in its files"):
        script("pretrain", *more, "--allow_changed", "train_files")


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_go_on_with_the_run_of_one(script, recipe, interrupt, tmp_path, strategy, streaming):
    """With the same rows: all losses, those of each source too, are the same to rounding."""
    more = ("--config", recipe, "--streaming", str(streaming).lower())
    script("pretrain", *more, "--output_dir", tmp_path / "whole")
    interrupt(STOP)
    with pytest.raises(Stopped):
        script("pretrain", *more, "--output_dir", tmp_path / "stopped")
    config = ROOT / "accelerate_configs" / f"{strategy}.yaml"
    words = ["accelerate", "launch", "--config_file", config, "--num_processes", 2, "launch/pretrain.py", *more]
    process = subprocess.run(
        [*map(str, words), "--output_dir", str(tmp_path / "stopped")],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert "saved by 1 processes, continued by 2" in process.stdout
    whole, stopped = metrics(tmp_path / "whole"), metrics(tmp_path / "stopped")
    assert len(whole) == len(stopped) == 7
    for left, right in zip(whole, stopped, strict=True):
        assert left == pytest.approx(right, rel=2e-5)
