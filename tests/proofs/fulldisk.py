"""Let the disk fill up at any call of a run, by fulldisk.c: the run ends with one error, and nothing is lost."""

import ctypes
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import forks
from failures import find_incomplete
from supervise import RunKind, baseline_run, find_differences, read_trace, resume_and_compare, start_trace, supervise

SOURCE = Path(__file__).with_suffix(".c")
LIMIT = 60.0  # seconds to the end of all processes
STEPS = 4
NEVER = 2**40
SENTENCE = (
    "No space left on device; make room and give the same command again; it continues from the last whole checkpoint."
)

BESIDE = (
    "The run is done and its weights are complete, but something beside the training failed, as said above; see "
    "problems in"
)


class Point(NamedTuple):
    """The disk is full for `ranks` from their call number `call` on; with `alone`, at that call only."""

    kind: RunKind
    ranks: tuple[int, ...]
    alone: bool
    call: int

    @property
    def name(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        return f"{self.kind.name}-rank{ranks}-{'at' if self.alone else 'from'}{self.call}"


class Refused(NamedTuple):
    """The result of a run: `what` is the first call that failed and its file, or an empty text."""

    point: Point
    what: str
    codes: list[int]
    seconds: float
    errors: list[str]
    problems: list[str]


class Book(ctypes.Structure):
    """The struct of the same name in fulldisk.c."""

    _fields_ = (
        ("calls", ctypes.c_long),
        ("refused", ctypes.c_long),
        ("first", ctypes.c_char * 240),
        ("list", (ctypes.c_char * 120) * 1024),
    )


def is_preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "disk_full_at")


def compile_library(folder: Path) -> Path | None:
    """Compile fulldisk.c into `folder`; return the library, or None if there is no C compiler."""
    if (compiler := shutil.which("cc")) is None:
        return None
    library = folder / "fulldisk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return library


def restart_with_library(library: Path, more: list[str]) -> None:
    """Replace this process by one with `more` arguments that loads `library` before everything else."""
    os.execve(sys.executable, [sys.executable, *sys.argv, *more], os.environ | {"LD_PRELOAD": str(library)})


def run_kinds() -> list[RunKind]:
    return [
        RunKind("cpu", "full", STEPS),
        RunKind("cpu", "lora", STEPS),
        RunKind("ddp", "lora", STEPS),
        RunKind("zero2", "full", STEPS),
        RunKind("ddp", "full", STEPS, save_async=True),
    ]


def fill(ranks: tuple[int, ...], folder: Path, call: int, alone: bool, books: list[int]) -> None:
    """In a rank: count its calls below `folder` from now on, and let them fail from number `call` on."""
    rank = int(os.environ.get("RANK", "0"))
    arm = ctypes.CDLL(None).disk_full_at
    arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_void_p)
    arm(bytes(folder), call if rank in ranks else NEVER, alone, books[rank])


def run_point(point: Point, work: Path) -> tuple[Refused, list[list[str]]]:
    """Do the run of a point, then resume it. Return the result and the calls of each rank in the first run."""
    kind = point.kind
    output = work / "disk" / point.name
    shared = mmap.mmap(-1, kind.processes * ctypes.sizeof(Book))
    books = (Book * kind.processes).from_buffer(shared)
    places = [ctypes.addressof(book) for book in books]
    sabotage = partial(fill, point.ranks, output.resolve(), point.call, point.alone, places)
    trace, whole_sabotage = start_trace(output, sabotage)
    run = kind.run(work, output, whole_sabotage)
    since = time.monotonic()
    pids = forks.start(run, work, launch=False)
    supervise(pids)
    seconds = time.monotonic() - since
    calls = [[line.value.decode() for line in book.list[: book.calls]] for book in books]
    what = next((book.first.decode() for book in books if book.refused), "")
    codes = [code or 0 for code in pids.values()]
    log = run.log.read_text(encoding="utf-8", errors="replace")
    errors = [line for line in log.splitlines() if line.startswith("error")]
    problems = find_problems(output, trace, what, codes, log, errors, seconds)
    unfinished = any(codes) and not is_done(output)
    problems += resume_and_compare(kind, work, output) if unfinished else find_differences(kind, work, output)
    shutil.rmtree(output, ignore_errors=True)
    return Refused(point, what, codes, seconds, errors, problems), calls


def is_done(output: Path) -> bool:
    """Tell whether the weights are complete; what failed then is beside the training, such as report.html."""
    facts = output / "run.json"
    return facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["status"] == "done"


def find_problems(
    output: Path, trace: Path, what: str, codes: list[int], log: str, errors: list[str], seconds: float
) -> list[str]:
    """Return the problems of a run on a full disk."""
    problems = [f"{name} is not whole" for name in find_incomplete(output)]
    sealed = read_trace(trace, "sealed")
    checkpoint_names = {path.name for path in (output / "checkpoints").glob("step-*")}
    if sealed and f"step-{sealed[-1]:08d}" not in checkpoint_names:
        problems.append(f"the checkpoint of step {sealed[-1]} is gone")
    if not what:
        return problems + (["was not refused anything, and failed"] if any(codes) else [])
    if not any(codes):  # then everything must be there
        return problems + ([] if is_done(output) else ["exit code 0, but run.json does not say done"])
    sentence = f"{BESIDE} {output / 'run.json'}." if is_done(output) else SENTENCE
    if len(errors) != 1 or not errors[0].endswith(sentence):
        problems.append(f"reported {errors}")
    if "Traceback" in log:
        problems.append(f"a traceback: {log[-300:]!r}")
    if 2 not in codes or not {*codes} <= {0, 2, 128 + signal.SIGTERM}:
        problems.append(f"exit codes {codes}")
    return problems + ([f"took {seconds:.0f} s"] if seconds > LIMIT else [])


def points(kind: RunKind, work: Path, thin: bool) -> Iterator[Point]:
    """Yield every call of every rank alone and of all ranks together; `thin`: only the calls that `thin_calls` keeps."""
    baseline_run(kind, work)
    _, calls = run_point(Point(kind, (), False, NEVER), work)
    each = [(rank,) for rank in range(kind.processes)]
    for ranks in [*each, *([tuple(range(kind.processes))] if kind.processes > 1 else [])]:
        most = max((calls[rank] for rank in ranks), key=len)
        # A disk is never full at one call of all ranks and free again right after it.
        ways = (False, True) if len(ranks) == 1 else (False,)
        for call, alone in itertools.product(thin_calls(most) if thin else range(1, len(most) + 1), ways):
            yield Point(kind, ranks, alone, call)


def thin_calls(calls: list[str]) -> list[int]:
    """Return the first, middle and last of equal calls in a row, such as the many writes of one file."""
    numbers, last = set(), 0
    for _, equal in itertools.groupby(calls):
        first, last = last + 1, last + len([*equal])
        numbers |= {first, (first + last) // 2, last}
    return sorted(numbers)


def every(work: Path, thin: bool) -> Iterator[Point]:
    for kind in run_kinds():
        yield from points(kind, work, thin)


def some(work: Path, draw: random.Random, count: int) -> Iterator[Point]:
    """Yield a few points: for one process, and for two processes of which one or both have a full disk."""
    alone, together = ([*points(kind, work, True)] for kind in (run_kinds()[0], run_kinds()[3]))
    two = [[point for point in together if point.ranks == ranks] for ranks in ((0,), (1,), (0, 1))]
    kinds = [alone, *two]
    yield from (draw.choice(kinds[k % len(kinds)]) for k in range(count))
