"""run.json: what a run was told, what was in force, and how it ended."""

import json
import os
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel_llm.backend.collectives import wait_for_all
from accel_llm.system.disk import write_atomically
from accel_llm.system.exit import wait_for_root_cause
from accel_llm.system.launcher import is_launched, process_rank
from accel_llm.system.secrecy import hide_secrets
from accel_llm.system.signals import Preempted, remembering_signals

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
    """Package versions, Python and the git commit of the working copy (with `-dirty` when it has changes)."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in RECORDED_PACKAGES if _installed(name)},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """None where there is no git or no working copy, as on a slim image."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


class Record:
    """The run.json of one output folder; the main process writes it, and whichever process ends the run."""

    def __init__(self, folder: Path, main: bool):
        self.path, self.main, self.facts = folder / "run.json", main, {}

    def update(self, **facts: Any) -> None:
        self.facts |= facts
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.facts)

    def fail(self, reason: str, **facts: Any) -> None:
        """Status `failed`, unless another process has already said why the run ended, or the disk takes no more."""
        with suppress(OSError):
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
            if found.get("status") == "running":
                self._write(found | {"status": "failed", "error": reason[:2000], **facts, "ended": _now()})

    def _write(self, facts: dict[str, Any]) -> None:
        write_atomically(self.path, hide_secrets(json.dumps(facts, indent=2, ensure_ascii=False, default=str)) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def recording(folder: str | Path, main: bool, facts: dict[str, Any]) -> Iterator[Record]:
    """Write run.json with `facts` and status `running`; on leaving, status `done`, `preempted`, or `failed` with the error.

    Under a launcher `failed_rank` says which process failed; it notes that itself, for the main one waits for it. `pid` is
    the process to send signals to.
    """
    record = Record(Path(folder), main)
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    record.update(status="running", started=_now(), **facts, **environment(), **here)
    failed = {"failed_rank": process_rank()} if is_launched() else {}

    def tell(number: int) -> None:
        # Until the checkpoint is there: a launcher that ends what is left of a failed job sends the same signal.
        record.fail(f"{signal.Signals(number).name}: ended by the launcher, or from outside, before all was saved")

    try:
        with remembering_signals(tell):
            yield record
    except Preempted as end:
        record.update(status="preempted", step=end.step, ended=_now())
        # Whoever leaves first ends the job.
        wait_for_all()
        raise
    except BaseException as error:
        wait_for_root_cause(error)
        record.fail(f"{type(error).__name__}: {error}", **failed)
        raise
    record.update(status="done", ended=_now())
