"""Runs commands for check.py, each with a time limit, a log and a process group of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Cell(NamedTuple):
    """One result: `ok` is None where something was left out."""

    name: str
    ok: bool | None
    figure: str
    required: str = ""
    facts: dict | None = None


class Ended(NamedTuple):
    """How a command ended: its exit code (-9 after the time limit), its output, and the seconds it took."""

    code: int
    text: str
    seconds: float

    @property
    def cause(self) -> str:
        """The script's own sentence, or else the error that came before those of the launcher, or the last line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("error") and ": " in line and "error_file" not in line]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        errors = [line for line in errors if "CalledProcessError" not in line and "ChildFailedError" not in line]
        return [f"code {self.code}, no output", *lines[-1:], *errors[-1:], *own[-1:]][-1][:300]


class Part:
    """One lettered part: it has a time limit, counted from its first command."""

    def __init__(self, letter: str, limit: float, logs: Path, end: float):
        self.letter, self.limit, self.logs, self.end = letter, limit, logs, end
        self.started: float | None = None

    def remaining(self) -> float:
        """Return the seconds that are left to the part, and start its clock."""
        now = time.monotonic()
        self.started = self.started or now
        return min(self.started + self.limit, self.end) - now

    def run(
        self,
        name: str,
        words: list[str],
        variables: dict[str, str] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Ended:
        """Run a command in the project's folder; `stop` is asked now and then, and may signal it itself."""
        log, since = self.logs / f"{self.letter}-{name.replace(' ', '-')}.log", time.monotonic()
        deadline = since + self.remaining()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=os.environ | (variables or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            while process.poll() is None:
                if time.monotonic() > deadline:
                    end_group(process)
                    file.write("\nended by the time limit of its part\n")
                elif stop is not None and stop():
                    stop = None
                time.sleep(0.05)
        text = log.read_text(encoding="utf-8", errors="replace")
        return Ended(process.returncode, text, time.monotonic() - since)


def end_group(process: subprocess.Popen) -> None:
    """End a command; a launcher first gets the time to end its ranks, which are not in its group."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def launch(
    yaml: str, *words: object, launcher: Sequence[str] = (), port: int = 0, processes: int | None = None
) -> list[str]:
    """Return the command that a person types, `accelerate launch`, with a port of its own."""
    options = ["--config_file", f"accelerate_configs/{yaml}.yaml", *launcher]
    options += ["--main_process_port", str(port)] if port else []
    options += ["--num_processes", str(processes)] if processes else []
    return python("-m", "accelerate.commands.launch", *options, *words)
