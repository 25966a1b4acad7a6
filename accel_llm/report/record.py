"""run.json: the options of a run, the settings in force, its status, and how it ended."""

import json
import os
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel_llm.backend.collectives import wait_for_all
from accel_llm.errors import ConfigError
from accel_llm.system.disk import write_atomically
from accel_llm.system.exit import wait_for_root_cause
from accel_llm.system.launcher import is_launched, process_rank
from accel_llm.system.out_of_memory import memory_failure
from accel_llm.system.secrecy import hide_secrets
from accel_llm.system.signals import Preempted, deferring_signals

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)


def environment() -> dict[str, Any]:
    """Return the versions of Python and packages, and this project's git commit (`-dirty` if files were changed)."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in RECORDED_PACKAGES if _installed(name)},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit, or None without git or without a working copy, for example in a container."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).resolve().parent
    try:
        output = subprocess.run(command, cwd=here, capture_output=True, encoding="utf-8", check=False).stdout
    except OSError:
        return None
    return output.strip() or None


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


class Record:
    """The run.json of one output folder. The main process writes it; any process may write why the run failed."""

    def __init__(self, folder: Path, main: bool):
        self.path, self.main, self.facts = folder / "run.json", main, {}
        self.problems: list[str] = []  # what failed beside the training, a sentence each
        self.stop_progress: Callable[[], None] = lambda: None  # removes the progress bar, so that the reason is last

    def update(self, **facts: Any) -> None:
        """Add or replace facts. Only the main process writes them."""
        self.facts |= facts
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.facts)

    def add_problem(self, sentence: str) -> None:
        """Say that something beside the training failed, such as a tracker, and write it down; the run goes on.

        `raise_problems` makes the exit code at the end of the script tell it too.
        """
        print(f"problem: {hide_secrets(sentence)}", flush=True)
        self.problems.append(sentence)
        with suppress(OSError):  # a disk may be what failed
            self.update(problems=self.problems)

    def raise_problems(self) -> None:
        """Raise an error if the run had problems.

        Raises:
            ConfigError: it had; all weights are there.
        """
        if self.problems:
            raise ConfigError(
                "The run is done and its weights are complete, but something beside the training failed, as said above; "
                f"see problems in {self.path}."
            )

    def fail(self, reason: str, **facts: Any) -> None:
        """Set status `failed` with the reason, if the status is still `running`: the first process to fail counts.

        If the disk fails, run.json stays as it is.
        """
        with suppress(OSError):
            current = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
            if current.get("status") == "running":
                self._write(current | {"status": "failed", "error": reason[:2000], **facts, "ended": _now()})

    def _write(self, facts: dict[str, Any]) -> None:
        write_atomically(self.path, hide_secrets(json.dumps(facts, indent=2, ensure_ascii=False, default=str)) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def recording(folder: str | Path, main: bool, facts: dict[str, Any]) -> Iterator[Record]:
    """Write run.json with `facts` and status `running`, and set the status on leaving the block.

    The status becomes `done`, `preempted`, or `failed` with the error. Under a launcher `failed_rank` is the rank of
    the process that failed. That process writes it itself, because the main process may hang waiting for it. `pid` is
    the main process, to send signals to. Relative paths in the options start at `working_dir`.
    """
    record = Record(Path(folder), main)
    here = {"host": socket.gethostname(), "pid": os.getpid(), "working_dir": str(Path.cwd())}
    record.update(status="running", started=_now(), **facts, **environment(), **here)
    failed = {"failed_rank": process_rank()} if is_launched() else {}

    def record_signal(number: int) -> None:
        # `failed` until the checkpoint is saved and the status becomes `preempted`. The signal may also come from a
        # launcher that ends the remaining processes of a failed job; then nothing will be saved.
        record.fail(f"{signal.Signals(number).name}: ended by the launcher or from outside, before all was saved")

    try:
        with deferring_signals(record_signal):
            yield record
    except Preempted as end:
        record.update(status="preempted", step=end.step, ended=_now())
        # The launcher ends the job as soon as one process has left, so all wait until run.json is written.
        wait_for_all()
        raise
    except BaseException as error:
        record.stop_progress()
        # Another process may have failed first: its reason is the one to keep.
        wait_for_root_cause(error)
        record.fail(memory_failure(error) or f"{type(error).__name__}: {error}", **failed)
        raise
    record.update(status="done", ended=_now())
