"""Send signals in every phase of a run: it saves and ends, and the same command resumes it to a bit-equal end."""

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forks
from failures import alive, find_incomplete
from supervise import (
    RunKind,
    baseline_run,
    find_differences,
    poll_exit_codes,
    read_trace,
    resume_and_compare,
    send,
    start_trace,
    supervise,
    wait_until,
)

LIMIT = 30.0  # seconds from the signal to the end of all processes
STEPS = 6
# Where the signal comes: the module that uses the function, the function, and which call of it. A step has two
# micro-batches on each rank.
PHASES = {
    "mapping": ("accel_llm.data.encoders", "encode_chunk", 1),
    "loading": ("accel_llm.training.setup", "load_model", 1),
    "first step": ("accelerate", "Accelerator.backward", 1),
    "accumulation": ("accelerate", "Accelerator.backward", 5),
    "evaluation": ("accel_llm.training.evaluation", "next_token_loss", 2),
    "save": ("accel_llm.checkpoint.files", "write_part", 1),
    "export": ("accel_llm.training.export", "gather_weights", 1),
}
BEFORE_TRAINING = ("mapping", "loading")


class SignalledRun(NamedTuple):
    """A run that got a signal; `step` is the last step according to run.json."""

    kind: str
    phase: str
    what: str
    ranks: str
    codes: list[int]
    seconds: float
    step: int | None
    problems: list[str]


def run_kinds() -> list[RunKind]:
    return [
        RunKind("cpu", "lora", STEPS, accumulation=2, evaluates=True),
        RunKind("ddp", "full", STEPS, accumulation=2, evaluates=True),
        RunKind("zero2", "full", STEPS, accumulation=2, evaluates=True),
        RunKind("ddp", "lora", STEPS, save_async=True, accumulation=2, evaluates=True),
        RunKind("fsdp2", "full", STEPS, accumulation=2, evaluates=True),
        RunKind("zero3", "full", STEPS, accumulation=2, evaluates=True),
    ]


def install_signal(phase: str, ranks: tuple[int, ...], mark: Path, raising: Callable[[], None]) -> None:
    """In a rank: call `raising` within the phase if the rank is in `ranks`."""
    if int(os.environ.get("RANK", "0")) not in ranks:
        return
    module, name, call = PHASES[phase]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), iter(range(1, sys.maxsize))

    def signal_at_call(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            mark.touch()
            raising()
        return original(*arguments, **keywords)

    setattr(owner, last, signal_at_call)


def send_once(number: int) -> None:
    """Send a signal to this process and wait: Python delivers it a little later, and the phase must not end before."""
    os.kill(os.getpid(), number)
    time.sleep(0.1)


def send_twice(number: int) -> None:
    """Send a second signal 2.5 s after the first (a launcher repeats its signal sooner), then keep the rank busy."""
    os.kill(os.getpid(), number)
    time.sleep(2.5)
    os.kill(os.getpid(), number)
    time.sleep(60)


def with_new_cache(run: forks.Run, cache: Path) -> forks.Run:
    """Return the run with another cache folder, so that its rows are encoded again."""
    words = list(run.words)
    words[words.index("--cache_dir") + 1] = str(cache)
    return run._replace(words=words)


def run_with_signal(
    kind: RunKind, phase: str, number: int, ranks: tuple[int, ...], work: Path, again: bool = False
) -> SignalledRun:
    """Do a run in which `ranks` get signal `number` in `phase`; with `again`, twice."""
    name = f"{kind.name}-{phase.replace(' ', '-')}-{number}-{'+'.join(map(str, ranks))}{'-twice' if again else ''}"
    output = work / "signals" / name
    mark, cache = output.with_suffix(".mark"), output.with_suffix(".cache")
    output.parent.mkdir(exist_ok=True)
    sabotage = partial(install_signal, phase, ranks, mark, partial(send_twice if again else send_once, number))
    trace, traced_sabotage = start_trace(output, sabotage)
    run = kind.run(work, output, traced_sabotage)
    run = with_new_cache(run, cache) if phase == "mapping" else run
    baseline_run(kind, work)
    pids = forks.start(run, work, launch=False)
    supervise(pids)
    seconds = time.time() - mark.stat().st_mtime if mark.exists() else 0.0
    codes = [code or 0 for code in pids.values()]
    facts = json.loads((output / "run.json").read_text(encoding="utf-8")) if (output / "run.json").exists() else {}
    problems = [] if mark.exists() else ["the phase was never reached"]
    problems += [f"{name} is not whole" for name in find_incomplete(output)]
    problems += [f"took {seconds:.0f} s"] if seconds > (LIMIT if not again else 5) else []
    if number == signal.SIGUSR1:
        problems += _check_continued(run, codes, facts, read_trace(trace, "sealed")) + find_differences(
            kind, work, output
        )
    elif again:
        problems += _check_exit_codes(run, number, codes) + resume_and_compare(kind, work, output)
    else:
        problems += (
            _check_exit_codes(run, number, codes)
            + _check_saved(run, phase, facts)
            + resume_and_compare(kind, work, output)
        )
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    what = f"{signal.Signals(number).name}{' twice' if again else ''}"
    return SignalledRun(kind.name, phase, what, "+".join(map(str, ranks)), codes, seconds, facts.get("step"), problems)


def _check_exit_codes(run: forks.Run, number: int, codes: list[int]) -> list[str]:
    """All processes must end with code 128 + signal; the launcher sends SIGTERM to the others."""
    if 128 + number in codes and {*codes} <= {128 + number, 128 + signal.SIGTERM}:
        return []
    return [f"exit codes {codes}: {forks.Ended(run, 1, 0).cause}"]


def _check_saved(run: forks.Run, phase: str, facts: dict[str, Any]) -> list[str]:
    """The status must be `preempted`, and after training began there must be a checkpoint of the step in run.json."""
    problems = [] if facts.get("status") == "preempted" else [f"status {facts.get('status')}: {facts.get('error')}"]
    folder = run.output / "checkpoints" / f"step-{facts.get('step') or 0:08d}"
    return problems + ([] if phase in (*BEFORE_TRAINING, "export") or folder.is_dir() else [f"no {folder.name}"])


def _check_continued(run: forks.Run, codes: list[int], facts: dict[str, Any], sealed: list[int]) -> list[str]:
    """There must be one checkpoint beside those of save_steps: of step 3, in which the signal came."""
    problems = [f"exit codes {codes}: {forks.Ended(run, 1, 0).cause}"] if any(codes) else []
    problems += [] if facts.get("status") == "done" else [f"status {facts.get('status')}"]
    return problems + ([] if sealed == [2, 3, 4, 6] else [f"checkpoints of steps {sealed}"])


def launch_with_signal(kind: RunKind, when: str, number: int, work: Path) -> SignalledRun:
    """Do a real launch whose launcher gets the signal while it trains or while a checkpoint is being written."""
    output = work / "signals" / f"launched-{kind.name}-{when}-{number}"
    baseline_run(kind, work)
    output.parent.mkdir(exist_ok=True)
    os.environ["SOAKED"] = str(output)  # a mark to find processes that outlive the launcher
    run = kind.run(work, output)
    pids = forks.start(run, work, launch=True)
    try:
        metrics, checkpoints = output / "metrics.jsonl", output / "checkpoints"
        phase_reached = {"training": metrics.exists, "save": lambda: any(checkpoints.glob(".step-*.partial"))}[when]
        problems = [] if wait_until(phase_reached, pids) else ["the phase was never reached"]
        since = time.monotonic()
        send(pids, number)
        # With one process the launcher ends at once, and the script still saves.
        while (not poll_exit_codes(pids) or alive(str(output))) and time.monotonic() - since < 2 * LIMIT:
            time.sleep(0.05)
        seconds = time.monotonic() - since
    finally:
        for pid in (survivors := alive(str(output))):
            os.kill(pid, signal.SIGKILL)
        forks.stop(pids)
        del os.environ["SOAKED"]
    facts = json.loads((output / "run.json").read_text(encoding="utf-8"))
    problems += [f"took {seconds:.0f} s"] if seconds > LIMIT else []
    problems += [f"processes live on: {survivors}"] if survivors else []
    problems += [] if facts["status"] == "preempted" else [f"status {facts['status']}: {facts.get('error')}"]
    problems += [f"{name} is not whole" for name in find_incomplete(output)] + resume_and_compare(kind, work, output)
    codes = [code or 0 for code in pids.values()]
    shutil.rmtree(output, ignore_errors=True)
    return SignalledRun(
        kind.name, when, signal.Signals(number).name, "launcher", codes, seconds, facts.get("step"), problems
    )


def every(work: Path) -> Iterator[SignalledRun]:
    for kind in run_kinds():
        single = [(rank,) for rank in range(kind.processes)]
        together = [tuple(range(kind.processes))] if kind.processes > 1 else []
        for phase in PHASES:
            for ranks in [*single, *together]:
                for number in (signal.SIGTERM, signal.SIGINT):
                    # Only the first rank to arrive encodes, and it may be any: signal all of them.
                    if phase != "mapping" or len(ranks) == kind.processes:
                        yield run_with_signal(kind, phase, number, ranks, work)
        for ranks in single:
            yield run_with_signal(kind, "accumulation", signal.SIGUSR1, ranks, work)
            yield run_with_signal(kind, "accumulation", signal.SIGTERM, ranks, work, again=True)
    yield from launches(work)


def launches(work: Path) -> Iterator[SignalledRun]:
    for strategy in ("cpu", "ddp", "zero2"):
        kind = RunKind(strategy, "full", 30)
        for when, number in (("training", signal.SIGTERM), ("save", signal.SIGTERM), ("training", signal.SIGINT)):
            yield launch_with_signal(kind, when, number, work)


def some(work: Path) -> Iterator[SignalledRun]:
    """Yield a few signals, one of them to a real launch."""
    yield run_with_signal(run_kinds()[0], "mapping", signal.SIGTERM, (0,), work)
    yield run_with_signal(run_kinds()[1], "accumulation", signal.SIGTERM, (1,), work)
    yield run_with_signal(run_kinds()[1], "save", signal.SIGINT, (0, 1), work)
    yield run_with_signal(run_kinds()[1], "accumulation", signal.SIGUSR1, (1,), work)
    yield next(launches(work))
