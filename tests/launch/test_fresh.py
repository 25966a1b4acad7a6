"""A fresh model has the same weights on every strategy and number of processes, to the last bit."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_the_first_weights_are_bit_equal_on_every_strategy(family: str) -> None:
    command = [sys.executable, "tests/proofs/fresh.py", "--family", family]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == f"{family}: 13 runs, bit-equal"
