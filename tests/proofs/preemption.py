"""Send signals in every phase of a run: it saves and ends, and the same command continues it to a bit-equal end."""

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
from failures import alive, halves
from supervise import Course, compared, gone_on, look, noted, send, supervise, traced, undisturbed, until

LIMIT = 30.0  # seconds from the signal to the end of all processes
STEPS = 6
# Where the signal comes: the module that uses the function, the function, and which call of it. A step has two
# micro-batches on each rank.
PHASES = {
    "mapping": ("accel_llm.data.prepare", "encode_chunk", 1),
    "loading": ("accel_llm.training.setup", "load_model", 1),
    "first step": ("accelerate", "Accelerator.backward", 1),
    "accumulation": ("accelerate", "Accelerator.backward", 5),
    "evaluation": ("accel_llm.training.evaluation", "next_token_loss", 2),
    "save": ("accel_llm.checkpoint.checkpoints", "write_part", 1),
    "export": ("accel_llm.training.export", "gather_weights", 1),
}
BEFORE_TRAINING = ("mapping", "loading")


class Signalled(NamedTuple):
    """A run that got a signal; `step` is the last step according to run.json."""

    course: str
    phase: str
    what: str
    ranks: str
    codes: list[int]
    seconds: float
    step: int | None
    wrong: list[str]


def courses() -> list[Course]:
    return [
        Course("cpu", "lora", STEPS, accumulation=2, evaluates=True),
        Course("ddp", "full", STEPS, accumulation=2, evaluates=True),
        Course("zero2", "full", STEPS, accumulation=2, evaluates=True),
        Course("ddp", "lora", STEPS, save_async=True, accumulation=2, evaluates=True),
        Course("fsdp2", "full", STEPS, accumulation=2, evaluates=True),
        Course("zero3", "full", STEPS, accumulation=2, evaluates=True),
    ]


def signalling(phase: str, ranks: tuple[int, ...], mark: Path, raising: Callable[[], None]) -> None:
    """In a rank: call `raising` within the phase, if the rank is one of `ranks`."""
    if int(os.environ.get("RANK", "0")) not in ranks:
        return
    module, name, call = PHASES[phase]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), iter(range(1, sys.maxsize))

    def struck(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            mark.touch()
            raising()
        return original(*arguments, **named)

    setattr(owner, last, struck)


def once(number: int) -> None:
    """Send a signal to this process, and wait: Python delivers it a little later, when the phase must not be over."""
    os.kill(os.getpid(), number)
    time.sleep(0.1)


def twice(number: int) -> None:
    """Send a second signal 2.5 s after the first (a launcher repeats one sooner), during something long."""
    os.kill(os.getpid(), number)
    time.sleep(2.5)
    os.kill(os.getpid(), number)
    time.sleep(60)


def with_new_cache(run: forks.Run, cache: Path) -> forks.Run:
    """Return the run with another cache folder, so that its rows are encoded again."""
    words = list(run.words)
    words[words.index("--cache_dir") + 1] = str(cache)
    return run._replace(words=words)


def signalled(
    course: Course, phase: str, number: int, ranks: tuple[int, ...], work: Path, again: bool = False
) -> Signalled:
    """Do a run that gets signal `number` in `phase` at `ranks`; `again`: twice."""
    name = f"{course.name}-{phase.replace(' ', '-')}-{number}-{'+'.join(map(str, ranks))}{'-twice' if again else ''}"
    output = work / "signals" / name
    mark, cache = output.with_suffix(".mark"), output.with_suffix(".cache")
    output.parent.mkdir(exist_ok=True)
    sabotage = partial(signalling, phase, ranks, mark, partial(twice if again else once, number))
    trace, traced_sabotage = traced(output, sabotage)
    run = course.run(work, output, traced_sabotage)
    run = with_new_cache(run, cache) if phase == "mapping" else run
    undisturbed(course, work)
    pids = forks.start(run, work, launch=False)
    supervise(pids)
    seconds = time.time() - mark.stat().st_mtime if mark.exists() else 0.0
    codes = [code or 0 for code in pids.values()]
    facts = json.loads((output / "run.json").read_text(encoding="utf-8")) if (output / "run.json").exists() else {}
    wrong = [] if mark.exists() else ["the phase was never reached"]
    wrong += [f"{name} is not whole" for name in halves(output)]
    wrong += [f"took {seconds:.0f} s"] if seconds > (LIMIT if not again else 5) else []
    if number == signal.SIGUSR1:
        wrong += _went_on(run, codes, facts, noted(trace, "sealed")) + compared(course, work, output)
    elif again:
        wrong += _ended(run, number, codes) + gone_on(course, work, output)
    else:
        wrong += _ended(run, number, codes) + _saved(run, phase, facts) + gone_on(course, work, output)
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    what = f"{signal.Signals(number).name}{' twice' if again else ''}"
    return Signalled(course.name, phase, what, "+".join(map(str, ranks)), codes, seconds, facts.get("step"), wrong)


def _ended(run: forks.Run, number: int, codes: list[int]) -> list[str]:
    """All processes must end with code 128 + signal; the launcher sends SIGTERM to the others."""
    if 128 + number in codes and {*codes} <= {128 + number, 128 + signal.SIGTERM}:
        return []
    return [f"exit codes {codes}: {forks.Ended(run, 1, 0).cause}"]


def _saved(run: forks.Run, phase: str, facts: dict[str, Any]) -> list[str]:
    """The status must be `preempted`, and after training began there must be a checkpoint of the step in run.json."""
    wrong = [] if facts.get("status") == "preempted" else [f"status {facts.get('status')}: {facts.get('error')}"]
    folder = run.output / "checkpoints" / f"step-{facts.get('step') or 0:08d}"
    return wrong + ([] if phase in (*BEFORE_TRAINING, "export") or folder.is_dir() else [f"no {folder.name}"])


def _went_on(run: forks.Run, codes: list[int], facts: dict[str, Any], sealed: list[int]) -> list[str]:
    """There must be one checkpoint more than save_steps makes: of step 3, in which the signal came."""
    wrong = [f"exit codes {codes}: {forks.Ended(run, 1, 0).cause}"] if any(codes) else []
    wrong += [] if facts.get("status") == "done" else [f"status {facts.get('status')}"]
    return wrong + ([] if sealed == [2, 3, 4, 6] else [f"checkpoints of steps {sealed}"])


def launched(course: Course, when: str, number: int, work: Path) -> Signalled:
    """Do a real launch whose launcher gets the signal while it trains or while a checkpoint is being written."""
    output = work / "signals" / f"launched-{course.name}-{when}-{number}"
    undisturbed(course, work)
    output.parent.mkdir(exist_ok=True)
    os.environ["SOAKED"] = str(output)  # marks processes, to find those that outlive the launcher
    run = course.run(work, output)
    pids = forks.start(run, work, launch=True)
    try:
        metrics, checkpoints = output / "metrics.jsonl", output / "checkpoints"
        happened = {"training": metrics.exists, "save": lambda: any(checkpoints.glob(".step-*.partial"))}[when]
        wrong = [] if until(happened, pids) else ["the phase was never reached"]
        since = time.monotonic()
        send(pids, number)
        # With one process the launcher ends at once, and the script still saves.
        while (not look(pids) or alive(str(output))) and time.monotonic() - since < 2 * LIMIT:
            time.sleep(0.05)
        seconds = time.monotonic() - since
    finally:
        for left in (living := alive(str(output))):
            os.kill(left, signal.SIGKILL)
        forks.stop(pids)
        del os.environ["SOAKED"]
    facts = json.loads((output / "run.json").read_text(encoding="utf-8"))
    wrong += [f"took {seconds:.0f} s"] if seconds > LIMIT else []
    wrong += [f"processes live on: {living}"] if living else []
    wrong += [] if facts["status"] == "preempted" else [f"status {facts['status']}: {facts.get('error')}"]
    wrong += [f"{name} is not whole" for name in halves(output)] + gone_on(course, work, output)
    codes = [code or 0 for code in pids.values()]
    shutil.rmtree(output, ignore_errors=True)
    return Signalled(
        course.name, when, signal.Signals(number).name, "launcher", codes, seconds, facts.get("step"), wrong
    )


def every(work: Path) -> Iterator[Signalled]:
    for course in courses():
        single = [(rank,) for rank in range(course.processes)]
        together = [tuple(range(course.processes))] if course.processes > 1 else []
        for phase in PHASES:
            for ranks in [*single, *together]:
                for number in (signal.SIGTERM, signal.SIGINT):
                    # Only the first rank to arrive encodes, and it may be any: signal all of them.
                    if phase != "mapping" or len(ranks) == course.processes:
                        yield signalled(course, phase, number, ranks, work)
        for ranks in single:
            yield signalled(course, "accumulation", signal.SIGUSR1, ranks, work)
            yield signalled(course, "accumulation", signal.SIGTERM, ranks, work, again=True)
    yield from launches(work)


def launches(work: Path) -> Iterator[Signalled]:
    for strategy in ("cpu", "ddp", "zero2"):
        course = Course(strategy, "full", 30)
        for when, number in (("training", signal.SIGTERM), ("save", signal.SIGTERM), ("training", signal.SIGINT)):
            yield launched(course, when, number, work)


def some(work: Path) -> Iterator[Signalled]:
    """Yield a few signals, one of them to a real launch."""
    yield signalled(courses()[0], "mapping", signal.SIGTERM, (0,), work)
    yield signalled(courses()[1], "accumulation", signal.SIGTERM, (1,), work)
    yield signalled(courses()[1], "save", signal.SIGINT, (0, 1), work)
    yield signalled(courses()[1], "accumulation", signal.SIGUSR1, (1,), work)
    yield next(launches(work))
