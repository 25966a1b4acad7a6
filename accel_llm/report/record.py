"""run.json: options, settings in force, status and history of a run; and when its report.html is written."""

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
from accel_llm.report.page import TIME_FORMAT, write_report
from accel_llm.system.disk import write_atomically
from accel_llm.system.exit import wait_for_root_cause
from accel_llm.system.launcher import is_launched, process_rank, world_size
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
# Seconds between two pages of a run that logs steps; and how often what the last page took: training waits 1% at most.
PAGE_SECONDS, PAGE_PATIENCE = 30.0, 100
MAX_STARTS = 200  # of a run that is resumed again and again; the first and the last ones are kept


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
        self.page_due, self.page_failed = 0.0, False  # when the next page is due, on the monotonic clock

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

    def fail(self, reason: str, **facts: Any) -> bool:
        """Set status `failed` with the reason, if the status is still `running`: the first process to fail counts.

        Returns whether it was set. If the disk fails, run.json stays as it is.
        """
        with suppress(OSError):
            current = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
            if current.get("status") == "running":
                self._write(current | {"status": "failed", "error": reason[:2000], **facts, "ended": _now()})
                return True
        return False

    def begin_after(self, step: int) -> None:
        """Note in the history of the run after which step this start of it goes on."""
        if starts := self.facts.get("starts"):
            starts[-1]["step"] = step
            self.update()

    def refresh_page(self, now: bool = False) -> None:
        """Write report.html on the main process, if it is due, or `now`."""
        if self.main and (now or time.monotonic() >= self.page_due):
            self.write_page()

    def write_page(self) -> None:
        """Write report.html from the files in the run's folder. If that fails, it is said once, and the run goes on."""
        since = time.monotonic()
        try:
            if self.path.is_file():
                write_report(self.path.parent)
        except Exception as error:
            if not self.page_failed:
                reason = hide_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
                print(f"report.html cannot be written now ({reason}); the run goes on", flush=True)
            self.page_failed = True
        now = time.monotonic()
        self.page_due = now + max(PAGE_SECONDS, PAGE_PATIENCE * (now - since))

    def _write(self, facts: dict[str, Any]) -> None:
        write_atomically(self.path, hide_secrets(json.dumps(facts, indent=2, ensure_ascii=False, default=str)) + "\n")


def _now() -> str:
    return time.strftime(TIME_FORMAT)


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts of the run that goes on in this folder; its run.json also tells how the last of them ended."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        starts = before.get("starts") or [{"started": before["started"]}]
        status = "killed" if before.get("status") == "running" else before.get("status")
        starts[-1] |= {"status": status} | ({"ended": before["ended"]} if "ended" in before else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or of a run that has not begun
        return []
    starts[-1]["versions"] = _flat_versions(before)
    return [starts[0], *starts[-MAX_STARTS + 2 :]] if len(starts) >= MAX_STARTS else starts


def _flat_versions(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what `environment` tells as one dict."""
    return {name: facts.get(name) for name in ("python", "git_commit")} | (facts.get("packages") or {})


def _new_start(earlier: list[dict[str, Any]], here: dict[str, Any]) -> dict[str, Any]:
    """Return a start for the history: when, on how many processes, and which versions differ from before."""
    start: dict[str, Any] = {"started": _now(), "processes": world_size()}
    if earlier:
        before, now = earlier[-1].pop("versions"), _flat_versions(here)
        start["differ"] = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    return start


@contextmanager
def recording(folder: str | Path, main: bool, facts: dict[str, Any]) -> Iterator[Record]:
    """Write run.json with `facts` and status `running`, and set the status on leaving the block.

    The status becomes `done`, `preempted`, or `failed` with the error. Under a launcher `failed_rank` is the rank of
    the process that failed. That process writes it itself, because the main process may hang waiting for it. `pid` is
    the main process, to send signals to. Relative paths in the options start at `working_dir`. `starts` is the
    history of a run that was resumed. A run that fails or is stopped gets its page, too.
    """
    record = Record(Path(folder), main)
    starts = _earlier_starts(record.path) if main else []
    here = environment() | {"host": socket.gethostname(), "pid": os.getpid(), "working_dir": str(Path.cwd())}
    starts = [*starts, _new_start(starts, here)]
    record.update(status="running", started=_now(), **facts, **here, starts=starts)
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
        record.refresh_page(now=True)
        # The launcher ends the job as soon as one process has left, so all wait until run.json is written.
        wait_for_all()
        raise
    except BaseException as error:
        record.stop_progress()
        # Another process may have failed first: its reason is the one to keep.
        wait_for_root_cause(error)
        if record.fail(memory_failure(error) or f"{type(error).__name__}: {error}", **failed):
            record.write_page()  # the process that failed does it, as the main one may hang
        raise
    record.update(status="done", ended=_now())
