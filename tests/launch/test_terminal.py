"""Ctrl-C in a terminal saves a run with slow steps. Every phase and launch YAML: tests/proofs/terminal.py."""

from pathlib import Path

import pytest
from terminal import TABLE, Cell, Outcome, find_problems, press


@pytest.mark.long
@pytest.mark.parametrize("cell", [Cell("cpu", "later"), Cell("ddp", "evaluation")], ids="-".join)
def test_ctrl_c_saves_a_slow_step_and_the_same_command_continues(cell: Cell, tmp_path: Path) -> None:
    assert cell in TABLE
    outcome = press(cell, tmp_path)
    assert find_problems(cell, outcome) == [], outcome.screen[-6000:]


def test_every_problem_of_an_interrupted_run_is_noticed() -> None:
    cell = Cell("cpu", "later")
    screen = "preempted by SIGINT: stopped after step 3\r\nresuming from x/step-00000003, step 3\r\n"
    right = Outcome(9.0, 130, screen, {"status": "preempted"}, [], [], (0, "done"), [])
    assert find_problems(cell, right) == []
    for wrong in (
        right._replace(seconds=None),
        right._replace(seconds=31.0),
        right._replace(code=0),
        right._replace(screen=screen.replace("preempted", "ended")),
        right._replace(screen=screen.replace("step 3\r", "step 2\r")),
        right._replace(run={"status": "running"}),
        right._replace(run={}),
        right._replace(incomplete=["adapter"]),
        right._replace(alive=[1]),
        right._replace(continued=(1, "done")),
        right._replace(continued=(0, "failed")),
        right._replace(different=[4]),
    ):
        assert len(find_problems(cell, wrong)) == 1, wrong
    assert len(find_problems(Cell("cpu", "data"), right)) == 1  # nothing was trained that could be continued
