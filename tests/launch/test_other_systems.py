"""Windows and macOS lack signals, modules and calls that Linux has. Everything but the launch files works without them.

No such machine is at hand: `pretend.py` takes away on Linux what Python does not have there.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT, equal_tensors, run_json, saved_steps, weights

from accel_llm.report.metrics import peak_memory_mb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")
SCRIPTS = sorted(f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py"))


def pretend(system: str, *commands: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run scripts one after the other as on another system."""
    words = [str(word) for command in commands for word in ("+", *command)][1:]
    return subprocess.run(
        [sys.executable, "tests/launch/pretend.py", system, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNDEFAULTENCODING": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.long
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_a_run_is_stopped_resumed_merged_and_asked_as_on_linux(system, script, tiny, chats, tmp_path):
    def run(folder: Path) -> list[object]:
        words = ["--model_name_or_path", tiny, "--train_files", chats, "--eval_files", chats, "--max_length", 128]
        words += ["--max_steps", 4, "--save_steps", 2, "--total_batch_size", 4, "--output_dir", folder]
        return [*words, "--per_device_train_batch_size", 4]

    out, merged = tmp_path / "out", tmp_path / "merged"
    train = ["launch/sft.py", *run(out), "--cache_dir", tmp_path / "cache"]
    first = pretend(system, *([name, "--help"] for name in SCRIPTS), [*train, "--dry_run"], train, PRETEND_STOP="3")
    assert first.returncode == 128 + 15, first.stderr
    assert first.stdout.count("usage: ") == len(SCRIPTS)
    assert "preempted by SIGTERM: stopped after step 3; run the same command to continue" in first.stderr
    assert run_json(out)["status"] == "preempted" and saved_steps(out) == [2, 3]

    merge = ["launch/merge.py", "--adapter", out, "--output_dir", merged]
    chat = ["launch/chat.py", "--model", merged, "--prompt", "What is 3 + 4?", "--max_new_tokens", 4]
    second = pretend(system, train, merge, chat)
    assert second.returncode == 0, second.stderr
    assert "[merged. On cpu, weights in float32. Greedy.]" in second.stderr
    assert run_json(out)["status"] == "done" and (merged / "model.safetensors").is_file()
    script("sft", *run(tmp_path / "whole"))
    assert equal_tensors(weights(out), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_the_unit_of_the_system(system, unit, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert peak_memory_mb(torch.device("cpu")) == 3 * 2**10
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert 10 < peak_memory_mb(torch.device("cpu")) < 2**20
