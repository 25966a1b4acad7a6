"""Lets what is timed run alone: such programs set up side by side, wait until nothing else works, and take turns.

check.py names a folder in the environment. A program that is ready puts a file there and waits until check.py renames
it. Without the variable nobody waits.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

VARIABLE = "GPU_CHECK_TURNS"


def wait_for_turn() -> None:
    """Return when no other program of check.py works; from here on this one is alone until it ends or waits again."""
    if folder := os.environ.get(VARIABLE):
        ready, go = (Path(folder) / f"{os.getpid()}.{end}" for end in ("ready", "go"))
        ready.touch()
        while not go.exists():
            time.sleep(0.02)
        go.unlink()


def give_turns(folder: Path, running: Callable[[], int], ended: Callable[[], bool]) -> None:
    """Give one turn after the other, each when all programs that run wait for one, until `ended`."""
    while not ended():
        ready = [path for path in sorted(folder.glob("*.ready")) if _is_alive(int(path.stem))]
        if ready and len(ready) >= running():
            with suppress(FileNotFoundError):
                ready[0].rename(ready[0].with_suffix(".go"))
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
