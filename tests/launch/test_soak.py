"""A short, seeded part of tests/proofs/soak.py: a disturbed run loses no more than promised and ends the same."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import fulldisk
import kills
import pytest
import supervise

from accel_llm.system.disk import sha256
from accel_llm.system.manifest import seal_folder, write_part

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def printed() -> str:
    """Run soak.py in a process without threads; it fails if anything was not as promised. Return its output."""
    command = [sys.executable, "tests/proofs/soak.py", "--short"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    return process.stdout


@pytest.mark.long
def test_killed_runs_resume_and_end_as_an_undisturbed_run(printed: str) -> None:
    summary = re.search(
        r"(\d+) SIGKILLs in (\d+) runs, (\d+) inside a save .* (\d+) after at least one step; 0 runs", printed
    )
    assert summary, printed
    kills, runs, in_saves, after_a_step = map(int, summary.groups())
    # A run may reach its end before its next kill; another run then takes the kills that are left.
    assert kills == 8 and runs >= 2 and in_saves >= 2 and after_a_step >= 4


@pytest.mark.long
def test_damaged_checkpoints_are_refused_by_name(printed: str) -> None:
    assert "23 damaged checkpoints, 0 not refused by name" in printed


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="filling a disk needs a C compiler")
def test_a_full_disk_ends_a_run_with_a_sentence(printed: str) -> None:
    assert "Full disks: 6 runs on a disk that is full at one call or from it on, 0 not as promised" in printed


@pytest.mark.long
def test_signals_save_and_end_a_run(printed: str) -> None:
    assert len(re.findall("^signals: .*  as promised$", printed, re.MULTILINE)) == 5


def test_every_problem_of_a_run_on_a_full_disk_is_noticed(tmp_path: Path) -> None:
    line = f"error: checkpoints: step 4 could not be written: {fulldisk.SENTENCE}"
    output, trace = tmp_path / "run", tmp_path / "run.trace"
    (output / "checkpoints" / "step-00000002").mkdir(parents=True)
    whole = output / "checkpoints" / "step-00000002"
    part = whole.with_name("part")
    part.mkdir()
    (part / "state.json").touch()
    write_part(part, 0, {"state.json": (0, sha256(part / "state.json"))})
    whole.rmdir()
    seal_folder(part, whole, [part / "part-00000.json"])
    trace.write_text("from 0\nstep 2\nsealed 2\n", encoding="utf-8")
    honest = (output, trace, "write /x", [2, 143], line, [line], 3.0)
    assert fulldisk.find_problems(*honest) == []
    for k, value, expected in (
        (3, [1, 143], "exit codes"),
        (4, f"Traceback (most recent call last)\n{line}", "a traceback"),
        (5, [], "reported []"),
        (5, [line, line], "reported ['error"),
        (5, [line.removesuffix(fulldisk.SENTENCE)], "reported ['error"),
        (6, 61.0, "took 61 s"),
        (2, "", "was not refused anything, and failed"),
    ):
        (problem,) = fulldisk.find_problems(*honest[:k], value, *honest[k + 1 :])
        assert problem.startswith(expected)
    (output / "checkpoints" / "step-00000002" / "manifest.json").write_text("{", encoding="utf-8")
    assert [problem.rpartition("/")[2] for problem in fulldisk.find_problems(*honest)] == ["step-00000002 is not whole"]
    trace.write_text("sealed 2\nsealed 4\n", encoding="utf-8")
    assert "the checkpoint of step 4 is gone" in fulldisk.find_problems(*honest)


@pytest.mark.parametrize(("background", "lost", "count"), [(False, 2, 0), (False, 3, 1), (True, 4, 0), (True, 5, 1)])
def test_a_kill_that_costs_more_than_an_interval_is_noticed(background: bool, lost: int, count: int) -> None:
    kind = supervise.RunKind("cpu", "full", 40, background)
    kill = kills.Kill(kind.name, "save", "all", "", 10, 10 - lost, 0.1)
    assert len(kills.find_excesses(kind, [kill])) == count
    assert len(kills.find_excesses(kind, [kill._replace(resumed=10, seconds=61)])) == 1


def test_thin_calls_picks_three_of_equal_calls_in_a_row() -> None:
    assert fulldisk.thin_calls(["open a", *["write a"] * 7, "write b", "write a"]) == [1, 2, 5, 8, 9, 10]
