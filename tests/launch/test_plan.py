"""launch/plan.py: what it prints, from a config alone, and how long it takes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import memory
import pytest
from support import ROOT

from accel_llm.errors import ConfigError

LLAMA, QWEN = (memory.SHAPES[name] for name in ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B"))
SECONDS = 30.0  # of CPU; 20 were measured on two cores that eight other programs used, half of them for imports


def write_shape(folder: Path, shape: memory.Shape) -> Path:
    shape.config().save_pretrained(folder)
    return folder


def test_a_plan_needs_a_config_alone(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing may be written
    model = write_shape(tmp_path / "model", memory.SHAPES["Qwen/Qwen2.5-3B-Instruct"])
    assert [path.name for path in model.iterdir()] == ["config.json"]
    words = ["--model_name_or_path", model, "--max_length", 2048, "--method", "qlora", "--gpu", "24GB", "x", "2"]
    script("plan", "sft", *words)
    output = capsys.readouterr().out
    (parameters,) = re.findall(r"([\d,]+) parameters", output)
    assert 3.09e9 < int(parameters.replace(",", "")) < 3.15e9  # 3.09 billion in the model card, and the adapter
    for name in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"):
        rows = re.findall(rf"^{name} +(.+)$", output, re.M)
        assert len(rows) == 3, name  # the terms, the largest micro-batch, the largest row
        total, *terms, host = (float(word) for word in rows[0].split())
        assert total == pytest.approx(sum(terms), abs=0.3) and host > 0
        sizes = [int(word.replace(",", "").replace("-", "0")) for word in rows[1].split()]
        assert len(sizes) == 8 and sizes == sorted(sizes)
    assert re.search(r"^fits +ddp: [\d.]+ of 24 GB; start it with `accelerate launch --config_file ", output, re.M)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_that_does_not_fit_says_what_to_change(script, tmp_path, capsys):
    model = write_shape(tmp_path / "model", memory.SHAPES["Qwen/Qwen2.5-3B-Instruct"])
    words = ["--model_name_or_path", model, "--method", "full", "--gpu", "8GB"]
    script("plan", "sft", *words, "--config_file", ROOT / "accelerate_configs" / "single_gpu.yaml")
    output = capsys.readouterr().out
    assert re.search(r"^too large +single_gpu: [\d.]+ of 8 GB$", output, re.M)
    assert re.search(r"^saves most +(.*\()?method: lora \([\d.]+ GB\)", output, re.M)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "many"], "gpu: 'many' is not understood; give the memory of a card, such as 24GB, and how many"),
        ([], "gpu: is missing, and there is none here; give the memory of a card, such as 24GB"),
        (["--gpu", "24GB", "--config_file", "none.yaml"], "config_file: none.yaml cannot be read: No such file"),
        (["--gpu", "24GB", "--max_length", "999999"], "max_length: 999999 is beyond the model's 8192 positions"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(script, tmp_path, words, sentence):
    model = write_shape(tmp_path / "model", memory.SHAPES["Qwen/Qwen2.5-3B-Instruct"])
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        script("plan", "sft", "--model_name_or_path", model, *words)


@pytest.mark.long
@pytest.mark.parametrize("script_name", ["pretrain", "dpo", "kto", "reward", "classify"])
def test_every_training_script_can_be_planned(script, tmp_path, capsys, script_name):
    model = write_shape(tmp_path / "model", memory.SHAPES["Qwen/Qwen2.5-3B-Instruct"])
    script("plan", f"launch/{script_name}.py", "--model_name_or_path", model, "--max_length", 512, "--gpu", "80GB")
    output = capsys.readouterr().out
    assert re.search(rf"^fits +single_gpu: .*/?launch/{script_name}\.py \.\.\.`", output, re.M)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "method"), [(LLAMA, "qlora"), (QWEN, "full")])
def test_a_plan_of_8b_takes_seconds(tmp_path, shape, method):
    """Imports included. CPU seconds, because a busy machine says nothing about the program."""
    model = write_shape(tmp_path / "model", shape)
    words = ["--model_name_or_path", str(model), "--max_length", "4096", "--method", method, "--gpu", "24GB x 2"]
    begun = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = os.times()
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "plan.py"), "sft", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    print(json.dumps({"cpu seconds": used, "seconds": time.perf_counter() - begun}))
    assert "Largest row" in ended.stdout and used < SECONDS
