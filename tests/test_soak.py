"""A short, seeded slice of tests/soak.py: nothing that disturbs a run costs more than promised, nor changes its end."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import fulldisk
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def printed() -> str:
    """In a process that has no threads yet; it fails if anything was not as promised."""
    command = [sys.executable, "tests/soak.py", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_killed_runs_go_on_and_end_as_if_nothing_had_been(printed: str) -> None:
    found = re.search(
        r"(\d+) SIGKILLs in (\d+) runs, (\d+) inside a save .* (\d+) after at least one step; 0 runs", printed
    )
    assert found, printed
    kills, runs, in_saves, after_a_step = map(int, found.groups())
    assert (kills, runs) == (8, 2) and in_saves >= 2 and after_a_step >= 6


def test_damaged_checkpoints_are_refused_by_name(printed: str) -> None:
    assert "23 damaged checkpoints, 0 not refused by name" in printed


@pytest.mark.skipif(shutil.which("cc") is None, reason="a disk can only be filled where there is a C compiler")
def test_a_full_disk_ends_a_run_with_a_sentence(printed: str) -> None:
    assert "Full disks: 6 runs on a disk that is full at one call or from it on, 0 not as promised" in printed


def test_signals_save_and_end_a_run(printed: str) -> None:
    assert len(re.findall("^signals: .*  as promised$", printed, re.MULTILINE)) == 5


def test_of_equal_calls_in_a_row_three_are_refused() -> None:
    assert fulldisk.thinned(["open a", *["write a"] * 7, "write b", "write a"]) == [1, 2, 5, 8, 9, 10]
