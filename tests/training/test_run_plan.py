"""The plan of a run: its lines are printed at every start, and what it says of the disk is what the run writes."""

import re
from types import SimpleNamespace

import pytest
from support import checkpoint_path, run_json

from accel_llm.config.options import SftOptions
from accel_llm.data.stream import TrainingPlan
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model_config
from accel_llm.training import run_plan
from accel_llm.training.memory_estimate import estimate_memory
from accel_llm.training.run_plan import disk_needs, export_bytes

NAMES = ["model", "device", "sources", "data", "steps", "learning rate", "evaluations", "checkpoints", "memory", "disk"]
NAMES += ["time", "output", "settings"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_start_says_the_plan_and_the_run_takes_the_disk_that_it_says(script, tiny, chats, tmp_path, capsys, method):
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--method", method]
    script("sft", *words, "--output_dir", tmp_path / "run", "--max_steps", 3, "--save_steps", 1, "--eval_share", 0.2)
    lines = capsys.readouterr().out.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("model "))
    found = [re.split(r"\s{2,}", line, maxsplit=1) for line in lines[first : first + len(NAMES)]]
    assert [name for name, _ in found] == NAMES
    texts = dict(found)
    assert texts["checkpoints"] == "3: every step and at the end; the newest 2 kept"
    settings = set(texts["settings"].split(", "))
    assert settings == {"max_steps=3", "save_steps=1", "eval_share=0.2", "max_length=128", "preflight=false"} | (
        {"method=full"} if method == "full" else set()
    )
    parameters = run_json(tmp_path / "run")["accelerate"]["parameters"]
    assert texts["model"].startswith(f"{tiny}: {parameters['total']:,} parameters, ")
    assert ("all trained" if method == "full" else f"{parameters['trainable']:,} (") in texts["model"]

    options = SftOptions(model_name_or_path=str(tiny), method=method, max_length=128)
    config = load_model_config(options)
    estimate = estimate_memory(options, config, 1, "cpu")
    (written,) = checkpoint_path(tmp_path / "run", 3).glob("*.safetensors")
    assert estimate.checkpoint == pytest.approx(written.stat().st_size, rel=0.15)  # the names take room too
    (weights,) = (tmp_path / "run").glob("*/*model.safetensors")
    assert export_bytes(options, config, estimate) == pytest.approx(weights.stat().st_size, rel=0.15)


def test_a_disk_that_is_too_small_is_said(tiny, tmp_path, monkeypatch):
    options = SftOptions(model_name_or_path=str(tiny), method="full", max_length=128, output_dir=str(tmp_path / "a/b"))
    config = load_model_config(options)
    estimate = estimate_memory(options, config, 1, "cpu")
    plan = TrainingPlan(9, 1, 9, 9)
    text, problem = disk_needs(options, config, plan, estimate)
    assert text.endswith(" free") and not problem
    monkeypatch.setattr(run_plan.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    _, problem = disk_needs(options, config, plan, estimate)
    assert problem.startswith("output_dir: the checkpoints and the export need ") and str(tmp_path) in problem
    assert disk_needs(options, config, plan, None) == ("unknown without an estimate; 1.0 kB free", "")


def test_a_start_is_refused_before_weights_are_read(script, tiny, chats, tmp_path, monkeypatch, capsys):
    """A dry run says it, and `preflight: false` starts all the same."""
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--max_steps", 1]
    words += ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    monkeypatch.setattr(run_plan.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"^output_dir: the checkpoints .* lower save_total_limit\. To start all the"):
        script("sft", *words, "--preflight", "true")
    assert not (tmp_path / "run").exists()
    script("sft", *words, "--preflight", "true", "--dry_run")
    assert "1.0 kB free" in capsys.readouterr().out
    script("sft", *words, "--preflight", "false")
    taken = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    script("sft", *words, "--overwrite_output_dir", "--dry_run")
    assert f"{run_plan.describe_size(1000 + taken)} free" in capsys.readouterr().out
