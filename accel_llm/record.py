"""run.json: what a run was told, what was in force, and how it ended."""

import json
import os
import platform
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel_llm.errors import stand_back

PACKAGES = (
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


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part of it."""
    # A name of its own for each process: two may come to the same end of the same run.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Package versions, Python and the git commit of the working copy (with `-dirty` when it has changes)."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if _installed(name)},
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
        """Status `failed`, unless another process has already said why the run ended."""
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        if found.get("status") == "running":
            self._write(found | {"status": "failed", "error": reason[:2000], **facts, "ended": _now()})

    def _write(self, facts: dict[str, Any]) -> None:
        write_atomically(self.path, json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def recording(folder: Path, main: bool, **facts: Any) -> Iterator[Record]:
    """Write run.json with `facts` and status `running`; on leaving, status `done`, or `failed` with the error.

    Under a launcher `failed_rank` says which process failed; it notes that itself, for the main one waits for it.
    """
    record = Record(folder, main)
    record.update(status="running", started=_now(), **facts, **environment())
    rank = {"failed_rank": int(os.environ["RANK"])} if "RANK" in os.environ else {}
    with _noting_sigterm(record):
        try:
            yield record
        except BaseException as error:
            stand_back(error)
            record.fail(f"{type(error).__name__}: {error}", **rank)
            raise
    record.update(status="done", ended=_now())


@contextmanager
def _noting_sigterm(record: Record) -> Iterator[None]:
    """Note in `record` when SIGTERM ends this process: the launcher sends it to all that are left when one is gone.

    A thread does so, woken by the C handler: Python's own must wait until the main thread comes out of a collective, which
    without its peer may be never.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] == signal.SIGTERM:
                    _end_by_sigterm(record)

    handler, wakeup = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(writer.fileno())
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        writer.close()


def _end_by_sigterm(record: Record) -> None:
    try:
        record.fail("SIGTERM: ended by the launcher, whose last lines say which process failed, or from outside")
    finally:
        os._exit(128 + signal.SIGTERM)
