"""A slice of the matrix: every two values of two factors meet in a cell that works, and no sabotage goes unnoticed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CELL = "ddp-qlora-packed-acc4-ckpt-2p-sft"


def matrix(*words: str) -> str:
    """Run tests/matrix.py in a process that has no threads yet; its output."""
    command = [sys.executable, "tests/matrix.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_training_gives_the_same_number_in_every_pair_of_choices_and_sabotage_does_not() -> None:
    said = matrix("--pairwise", "--controls")
    cells = re.findall(r'^\d+/\d+ (\S+) {"status": "(\w+)"', said, re.MULTILINE)
    assert len(cells) >= 31, "31 pairs of strategy and method have to work"
    assert {status for _, status in cells} == {"same"}
    assert len({tuple(name.split("-")[:2]) for name, _ in cells}) == 31
    assert len(re.findall("^control ", said, re.MULTILINE)) == 5


def test_a_fork_trains_as_accelerate_launch_does_to_the_last_bit(tmp_path: Path) -> None:
    for how in ("fork", "launch"):
        matrix("--only", CELL, "--work", str(tmp_path / how), *(["--launch"] if how == "launch" else []))
    forked, launched = (tmp_path / how / "runs" / f"curve-{CELL}" for how in ("fork", "launch"))
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (forked / weights).read_bytes() == (launched / weights).read_bytes()
    losses = [re.findall(r'"loss": ([\d.]+)', (folder / "metrics.jsonl").read_text()) for folder in (forked, launched)]
    assert len(losses[0]) == 20 and losses[0] == losses[1]
