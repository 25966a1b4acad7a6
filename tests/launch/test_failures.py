"""When one rank fails, the job ends soon and names the cause and the rank. The whole table: tests/proofs/failures.py."""

from pathlib import Path

import pytest
from failures import TABLE, Cell, Outcome, find_problems, launch

CELLS = [Cell("ddp", 1, "backward"), Cell("fsdp2", 0, "save")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All launches share the rows that the first one encodes."""
    return tmp_path_factory.mktemp("failures")


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_one_rank_that_fails_ends_the_job(cell: Cell, work: Path) -> None:
    assert cell in TABLE
    outcome = launch(cell, work)
    assert find_problems(cell, outcome) == [], outcome.screen[-6000:]


def test_every_problem_of_a_failed_launch_is_noticed() -> None:
    cell = Cell("ddp", 1, "save")
    line = "error (rank 1): RuntimeError: injected at save"
    root_cause = "Traceback (most recent call last)\nRoot Cause\n  rank      : 1 (local_rank: 1)"
    screen = f"Traceback (most recent call last)\n{line}\n{root_cause}\n\n{line}\n\n"
    run = {"status": "failed", "error": "RuntimeError: injected at save", "failed_rank": 1}
    assert find_problems(cell, Outcome(9.0, 1, screen, run, [], [])) == []
    for outcome in (
        Outcome(None, 0, screen, run, [], []),
        Outcome(61.0, 1, screen, run, [], []),
        Outcome(9.0, 0, screen, run, [], []),
        Outcome(9.0, 1, screen.replace(line, f"{line}\n{line}", 1), run, [], []),
        Outcome(9.0, 1, screen.replace("error (rank 1)", "error (rank 0)", 1), run, [], []),
        Outcome(9.0, 1, f"{screen}the end\n", run, [], []),
        Outcome(9.0, 1, f"Traceback (most recent call last)\n{screen}", run, [], []),
        Outcome(9.0, 1, screen.replace("rank      : 1", "rank      : 0"), run, [], []),
        Outcome(9.0, 1, screen, run | {"status": "running"}, [], []),
        Outcome(9.0, 1, screen, run | {"failed_rank": 0}, [], []),
        Outcome(9.0, 1, screen, None, [], []),
        Outcome(9.0, 1, screen, run, ["adapter"], []),
        Outcome(9.0, 1, screen, run, [], [1]),
    ):
        assert len(find_problems(cell, outcome)) == 1, outcome
