"""A few cells of tests/proofs/preference.py: a step, and an evaluation, of one process and of two on hard backends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Pairs and single answers, by one process and by two; and what is hardest: weights in 4 bits, sharded.
ALONE = ("sum_other-cpu-full-shared-4-ckpt-fp32", "kto_other-cpu-lora-packed-4-plain-fp32")
TOGETHER = ("sum_other-fsdp2-full-shared-odd-plain-fp32", "kto_other-ddp-lora-packed-odd-plain-fp32")
HARD = "wpo_other-zero3-qlora-shared-4-ckpt-fp32"


def run_proof(*words: str) -> str:
    """In a process that has no threads yet, because it forks."""
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "proofs" / "preference.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_steps_are_those_of_float64_and_evaluations_do_not_depend_on_the_processes(tmp_path):
    output = run_proof("--controls", "--work", str(tmp_path), "--only", ",".join([*ALONE, *TOGETHER, HARD]))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results.keys() == {*ALONE, *TOGETHER, HARD}
    for alone, together in zip(ALONE, TOGETHER, strict=True):
        assert results[together]["evaluated"] == pytest.approx(results[alone]["evaluated"], rel=1e-9)
    assert output.count("different") == output.count("control ") == 5  # each mistake made on purpose is noticed
