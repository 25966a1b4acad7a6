"""A part of the matrix: a cell for every pair of values of two factors. Every sabotage is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


def matrix(*words: str) -> str:
    """Run tests/proofs/matrix.py in a process that has no threads yet; return its output."""
    command = [sys.executable, "tests/proofs/matrix.py", *words]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def pairwise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    work = tmp_path_factory.mktemp("matrix")
    return work, matrix("--pairwise", "--controls", "--work", str(work))


def test_training_gives_the_same_number_in_every_pair_of_choices(pairwise: tuple[Path, str]) -> None:
    cells = re.findall(r'^\d+/\d+ (\S+) {"status": "(\w+)"', pairwise[1], re.MULTILINE)
    assert {status for _, status in cells} == {"same"}
    assert len({tuple(name.split("-")[:2]) for name, _ in cells}) == 31, "pairs of strategy and method have to work"


def test_sabotage_is_noticed(pairwise: tuple[Path, str]) -> None:
    assert len(re.findall("^control ", pairwise[1], re.MULTILINE)) == 5


def test_every_method_follows_float64_with_evaluations_between_the_steps(tmp_path: Path) -> None:
    output = matrix("--paths", "--work", str(tmp_path))
    statuses = dict(re.findall(r'^\d/5 cpu-(\w+)-\S+ {"status": "(\w+)"', output, re.MULTILINE))
    assert statuses == dict.fromkeys(("full", "lora", "dora", "qlora", "lora8"), "same")


def test_stopped_and_resumed_runs_are_bit_equal_on_every_strategy(tmp_path: Path) -> None:
    """And state moves between numbers of processes and strategies; sick steps are left out by all processes alike."""
    output = matrix("--resumes", "--pairwise", "--work", str(tmp_path))
    statuses = re.findall(r'^\S+ {"status": "([^"]+)"', output, re.MULTILINE)
    assert {status: statuses.count(status) for status in statuses} == {"bit-equal": 9, "same": 4, "skipped alike": 3}
    assert len(re.findall(r"^control \w+: different ", output, re.MULTILINE)) == 4


def test_a_fork_trains_as_accelerate_launch_does_to_the_last_bit(pairwise: tuple[Path, str], tmp_path: Path) -> None:
    cell = re.findall(r"\S+-qlora-\S+-2p-\S+", pairwise[1])[0]
    matrix("--only", cell, "--work", str(tmp_path), "--launch")
    forked, launched = (work / "runs" / f"gradient-{cell}" for work in (pairwise[0], tmp_path))
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (forked / weights).read_bytes() == (launched / weights).read_bytes()
    losses = [re.findall(r'"loss": ([\d.]+)', (folder / "metrics.jsonl").read_text()) for folder in (forked, launched)]
    assert len(losses[0]) == 1 and losses[0] == losses[1]
