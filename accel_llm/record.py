"""run.json: what a run was told, what was in force, and how it ended."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    partial = path.with_name(f".{path.name}.partial")
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
    """The run.json of one output folder; only the main process writes it."""

    def __init__(self, folder: Path, main: bool):
        self.path, self.main, self.facts = folder / "run.json", main, {}

    def update(self, **facts: Any) -> None:
        self.facts |= facts
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.facts, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def recording(folder: Path, main: bool, **facts: Any) -> Iterator[Record]:
    """Write run.json with `facts` and status `running`; on leaving, status `done`, or `failed` with the error."""
    record = Record(folder, main)
    record.update(status="running", started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts, **environment())
    try:
        yield record
    except BaseException as error:
        record.update(
            status="failed", error=f"{type(error).__name__}: {error}"[:2000], ended=time.strftime("%Y-%m-%dT%H:%M:%S%z")
        )
        raise
    record.update(status="done", ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
