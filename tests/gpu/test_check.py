"""The proof on a GPU also runs without one: a small part of it, and it says what it left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*words: str) -> subprocess.CompletedProcess:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/gpu/check.py", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_what_needs_no_gpu_passes_without_one(tmp_path: Path) -> None:
    words = ["--results", str(tmp_path), "--logs", str(tmp_path / "logs"), "--workers", "1"]
    ended = check(*words, "--patience", "4", "--minutes", "20")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = tmp_path.glob("*-cpu.json")
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    outcomes = {letter: {cell["ok"] for cell in part["cells"]} for letter, part in parts.items()}
    assert outcomes == {letter: {letter in "abcg" or None} for letter in "abcdefg"}


def test_an_unknown_part_is_refused() -> None:
    ended = check("a", "z")
    assert ended.returncode == 2 and "unknown parts: z; known are a, d, c, b, g, e, f" in ended.stderr
