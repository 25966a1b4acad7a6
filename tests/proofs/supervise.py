"""Runs that are disturbed: their command lines, the undisturbed run to compare with, and a launcher's supervision."""

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
from failures import find_incomplete

GRACE = 30.0  # seconds that torchrun waits between SIGTERM and SIGKILL
POLL_SECONDS = 0.1  # interval at which torchrun polls its processes
INTERVAL = 2  # save_steps of every kind of run


class RunKind(NamedTuple):
    """The options of a run. All runs use dropout 0.1 and NEFTune and save at every second step, with metrics at others."""

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
        self, work: Path, output: Path, sabotage: Callable[[], None] | None = None, resumed: bool = False
    ) -> forks.Run:
        cell = resumes.Cell(self.strategy, self.method, self.processes, self.accumulation, 0)
        words = resumes.script_arguments(cell, work, output, last=False)
        new_values = {"--max_steps": self.steps, "--save_steps": INTERVAL, "--packing": "false"}
        for name, value in new_values.items():
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
        return forks.Run(output.name, "sft", self.strategy, self.processes, words, output, sabotage, resumed)


def baseline_run(kind: RunKind, work: Path) -> Path:
    """Return the output folder of the undisturbed run; the first call does the run."""
    output = work / "whole" / kind.name
    if not output.exists():
        seconds = finish(kind.run(work, output), work)
        output.with_suffix(".seconds").write_text(str(seconds), encoding="utf-8")
    return output


def finish(run: forks.Run, work: Path) -> float:
    """Do a run that must succeed. Return the seconds it took.

    Raises:
        RuntimeError: the run failed.
    """
    end = next(iter(forks.execute([run], work)))
    if end.code:
        raise RuntimeError(f"{run.name}: exit code {end.code}: {end.cause}")
    return end.seconds


def find_differences(kind: RunKind, work: Path, output: Path) -> list[str]:
    """Return the files that differ in any bit from the undisturbed run's, and the incomplete folders."""
    different = resumes.differences(baseline_run(kind, work), output)
    return [f"{name} differs" for name in different] + [f"{name} is not whole" for name in find_incomplete(output)]


def resume_and_compare(kind: RunKind, work: Path, output: Path) -> list[str]:
    """Repeat the command of a run, so that it resumes, and compare its end with the undisturbed run. Return the problems."""
    try:
        finish(kind.run(work, output, resumed=True), work)
    except RuntimeError as error:
        return [str(error)]
    return find_differences(kind, work, output)


def poll_exit_codes(pids: dict[int, int | None]) -> bool:
    """Record the exit codes of the processes that have ended. Return True when all have ended."""
    for pid in [pid for pid, code in pids.items() if code is None]:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        pids[pid] = os.waitstatus_to_exitcode(status) if ended_pid else None
    return None not in pids.values()


def send(pids: dict[int, int | None], number: int) -> None:
    """Send signal `number` to each process that still runs."""
    for pid in [pid for pid, code in pids.items() if code is None]:
        os.kill(pid, number)


def supervise(pids: dict[int, int | None]) -> float:
    """Wait as torchrun does: if one process fails, end the others. Return the seconds from the first end to the last."""
    try:
        return _supervise(pids)
    finally:
        forks.stop(pids)


def _supervise(pids: dict[int, int | None]) -> float:
    first, sent = None, False
    limit = time.monotonic() + forks.TIMEOUT
    while not poll_exit_codes(pids) and time.monotonic() < limit:
        if first is None and any(code is not None for code in pids.values()):
            first = time.monotonic()
        if any(pids.values()) and not sent:
            time.sleep(POLL_SECONDS)
            send(pids, signal.SIGTERM)
            sent, limit = True, time.monotonic() + GRACE
        time.sleep(0.005)
    return time.monotonic() - first if first else 0.0


def wait_until(condition: Callable[[], Any], pids: dict[int, int | None]) -> bool:
    """Wait until `condition()` is true. Return False if the run ends first."""
    limit = time.monotonic() + forks.TIMEOUT
    while not condition():
        if poll_exit_codes(pids) or time.monotonic() > limit:
            return False
        time.sleep(0.001)
    return True


# --- a trace that a run writes about itself ---------------------------------------------------------------------------


def install_trace(trace: Path) -> None:
    """In the main rank: record the step resumed from, each finished step and each complete checkpoint."""
    from accel_llm.checkpoint import checkpoints
    from accel_llm.checkpoint.checkpoints import Checkpoints

    if os.environ.get("RANK", "0") != "0":
        return
    handle = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, step: int) -> None:
        os.write(handle, f"{what} {step}\n".encode())

    resume, when_due, seal = Checkpoints.resume, Checkpoints.when_due, checkpoints.seal_folder

    def traced_resume(self: Any) -> None:
        resume(self)
        note("from", self.start.step)

    def traced_step(self: Any, meter: Any, evaluation: Any, bad_steps: Any, step: int) -> None:
        note("step", step)
        when_due(self, meter, evaluation, bad_steps, step)

    def traced_seal(before: Path, folder: Path, parts: list[Path]) -> None:
        seal(before, folder, parts)
        note("sealed", int(folder.name.removeprefix("step-")))

    Checkpoints.resume, Checkpoints.when_due = traced_resume, traced_step  # type: ignore[method-assign]
    checkpoints.seal_folder = traced_seal


def read_trace(trace: Path, what: str) -> list[int]:
    """Return the steps recorded under `what`: from, step or sealed."""
    text = trace.read_text(encoding="utf-8") if trace.exists() else ""
    return [int(step) for step in re.findall(rf"^{what} (\d+)\n", text, re.MULTILINE)]


def start_trace(output: Path, *more: Callable[[], None]) -> tuple[Path, Callable[[], None]]:
    """Return a trace file that does not exist yet, and a function for each rank that starts the trace and calls `more`."""
    trace = output.with_suffix(".trace")
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.unlink(missing_ok=True)
    return trace, partial(resumes.run_all, partial(install_trace, trace), *more)
