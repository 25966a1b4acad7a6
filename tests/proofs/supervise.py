"""Disturbed runs: their command lines, the undisturbed run to compare with, and the work of a launcher."""

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forks
import resumes
from failures import halves

GRACE = 30.0  # seconds that torchrun waits between SIGTERM and SIGKILL
NOTICED = 0.1  # seconds between two looks that torchrun takes at its processes
INTERVAL = 2  # save_steps of every course


class Course(NamedTuple):
    """A kind of run: dropout 0.1 and NEFTune, a checkpoint at every second step and metrics at other steps."""

    strategy: str
    method: str
    steps: int
    save_async: bool = False
    accumulation: int = 1
    evaluates: bool = False

    @property
    def processes(self) -> int:
        return 1 if self.strategy == "cpu" else 2

    @property
    def name(self) -> str:
        extra = ("-async" if self.save_async else "") + ("-eval" if self.evaluates else "")
        return f"{self.strategy}-{self.method}-{self.steps}-acc{self.accumulation}{extra}"

    def run(
        self, work: Path, output: Path, sabotage: Callable[[], None] | None = None, goes_on: bool = False
    ) -> forks.Run:
        cell = resumes.Cell(self.strategy, self.method, self.processes, self.accumulation, 0)
        words = resumes.script_arguments(cell, work, output, last=False)
        changed = {"--max_steps": self.steps, "--save_steps": INTERVAL, "--packing": "false"}
        for name, value in changed.items():
            words[words.index(name) + 1] = str(value)
        words += ["--save_async"] if self.save_async else []
        if self.evaluates:
            words += [
                "--eval_files",
                str(work / "sft.jsonl"),
                "--eval_steps",
                "3",
                "--per_device_eval_batch_size",
                "32",
            ]
        return forks.Run(output.name, "sft", self.strategy, self.processes, words, output, sabotage, goes_on)


def undisturbed(course: Course, work: Path) -> Path:
    """Return the output of the undisturbed run, which is done once."""
    output = work / "whole" / course.name
    if not output.exists():
        seconds = finish(course.run(work, output), work)
        output.with_suffix(".seconds").write_text(str(seconds), encoding="utf-8")
    return output


def finish(run: forks.Run, work: Path) -> float:
    """Do a run that must succeed, and return its seconds.

    Raises:
        RuntimeError: the run failed.
    """
    end = next(iter(forks.execute([run], work)))
    if end.code:
        raise RuntimeError(f"{run.name}: exit code {end.code}: {end.cause}")
    return end.seconds


def compared(course: Course, work: Path, output: Path) -> list[str]:
    """Return the files that differ in any bit from those of an undisturbed run, and incomplete folders."""
    different = resumes.differences(undisturbed(course, work), output)
    return [f"{name} differs" for name in different] + [f"{name} is not whole" for name in halves(output)]


def gone_on(course: Course, work: Path, output: Path) -> list[str]:
    """Repeat the command of a run and return the problems of its end."""
    try:
        finish(course.run(work, output, goes_on=True), work)
    except RuntimeError as error:
        return [str(error)]
    return compared(course, work, output)


def look(pids: dict[int, int | None]) -> bool:
    """Record the exit codes of processes that have ended; return whether all have."""
    for pid in [pid for pid, code in pids.items() if code is None]:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        pids[pid] = os.waitstatus_to_exitcode(status) if ended_pid else None
    return None not in pids.values()


def send(pids: dict[int, int | None], number: int) -> None:
    for pid in [pid for pid, code in pids.items() if code is None]:
        os.kill(pid, number)


def supervise(pids: dict[int, int | None]) -> float:
    """Wait as torchrun does: one process that fails ends the others. Return seconds from the first end to the last."""
    try:
        return _supervise(pids)
    finally:
        forks.stop(pids)


def _supervise(pids: dict[int, int | None]) -> float:
    first, told = None, False
    limit = time.monotonic() + forks.TIMEOUT
    while not look(pids) and time.monotonic() < limit:
        if first is None and any(code is not None for code in pids.values()):
            first = time.monotonic()
        if any(pids.values()) and not told:
            time.sleep(NOTICED)
            send(pids, signal.SIGTERM)
            told, limit = True, time.monotonic() + GRACE
        time.sleep(0.005)
    return time.monotonic() - first if first else 0.0


def until(happened: Callable[[], Any], pids: dict[int, int | None]) -> bool:
    """Wait until `happened()` is true; return False if the run ends before."""
    limit = time.monotonic() + forks.TIMEOUT
    while not happened():
        if look(pids) or time.monotonic() > limit:
            return False
        time.sleep(0.001)
    return True


# --- a trace that a run writes about itself ---------------------------------------------------------------------------


def tracing(trace: Path) -> None:
    """In the main rank: record the step resumed from, each step that is done and each complete checkpoint."""
    from accel_llm.checkpoint import checkpoints
    from accel_llm.checkpoint.checkpoints import Checkpoints

    if os.environ.get("RANK", "0") != "0":
        return
    handle = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, step: int) -> None:
        os.write(handle, f"{what} {step}\n".encode())

    resume, when_due, seal = Checkpoints.resume, Checkpoints.when_due, checkpoints.seal_folder

    def resuming(self: Any) -> None:
        resume(self)
        note("from", self.start.step)

    def noting(self: Any, meter: Any, evaluation: Any, health: Any, step: int) -> None:
        note("step", step)
        when_due(self, meter, evaluation, health, step)

    def sealing(before: Path, folder: Path, parts: list[Path]) -> None:
        seal(before, folder, parts)
        note("sealed", int(folder.name.removeprefix("step-")))

    Checkpoints.resume, Checkpoints.when_due = resuming, noting  # type: ignore[method-assign]
    checkpoints.seal_folder = sealing


def noted(trace: Path, what: str) -> list[int]:
    text = trace.read_text(encoding="utf-8") if trace.exists() else ""
    return [int(step) for step in re.findall(rf"^{what} (\d+)\n", text, re.MULTILINE)]


def traced(output: Path, *more: Callable[[], None]) -> tuple[Path, Callable[[], None]]:
    """Return an empty trace file beside a run's folder, and the sabotage that fills it and does `more`."""
    trace = output.with_suffix(".trace")
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.unlink(missing_ok=True)
    return trace, partial(resumes.both, partial(tracing, trace), *more)
