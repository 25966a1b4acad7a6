"""Fill the disk at any call of a run, by fulldisk.c: the run ends with one error message, and nothing is lost."""

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
from failures import halves
from supervise import Course, compared, gone_on, noted, supervise, traced, undisturbed

SOURCE = Path(__file__).with_suffix(".c")
LIMIT = 60.0  # seconds to the end of all processes
STEPS = 4
NEVER = 2**40
SENTENCE = (
    "No space left on device; make room and give the same command again; it continues from the last whole checkpoint."
)


class Point(NamedTuple):
    """The disk is full for `ranks` from their call number `call` on, or, with `alone`, at that call only."""

    course: Course
    ranks: tuple[int, ...]
    alone: bool
    call: int

    @property
    def name(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        return f"{self.course.name}-rank{ranks}-{'at' if self.alone else 'from'}{self.call}"


class Refused(NamedTuple):
    """The result of a run: `what` is the first call that failed and its file, or an empty text."""

    point: Point
    what: str
    codes: list[int]
    seconds: float
    told: list[str]
    wrong: list[str]


class Book(ctypes.Structure):
    """The struct of the same name in fulldisk.c."""

    _fields_ = (
        ("calls", ctypes.c_long),
        ("refused", ctypes.c_long),
        ("first", ctypes.c_char * 240),
        ("list", (ctypes.c_char * 120) * 1024),
    )


def preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "disk_full_at")


def compiled(folder: Path) -> Path | None:
    """Compile fulldisk.c into `folder`; return the library, or None if there is no C compiler."""
    if (compiler := shutil.which("cc")) is None:
        return None
    library = folder / "fulldisk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return library


def begin_anew(library: Path, more: list[str]) -> None:
    """Start this program again with `more` arguments and with `library` loaded before everything else."""
    os.execve(sys.executable, [sys.executable, *sys.argv, *more], os.environ | {"LD_PRELOAD": str(library)})


def courses() -> list[Course]:
    return [
        Course("cpu", "full", STEPS),
        Course("cpu", "lora", STEPS),
        Course("ddp", "lora", STEPS),
        Course("zero2", "full", STEPS),
        Course("ddp", "full", STEPS, save_async=True),
    ]


def fill(ranks: tuple[int, ...], folder: Path, call: int, alone: bool, books: list[int]) -> None:
    """In a rank: count its calls below `folder` from now on, and let them fail from number `call` on."""
    rank = int(os.environ.get("RANK", "0"))
    arm = ctypes.CDLL(None).disk_full_at
    arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_void_p)
    arm(bytes(folder), call if rank in ranks else NEVER, alone, books[rank])


def refuse(point: Point, work: Path) -> tuple[Refused, list[list[str]]]:
    """Do the run of a point and repeat its command; return the result and the calls of each rank in the first run."""
    course = point.course
    output = work / "disk" / point.name
    shared = mmap.mmap(-1, course.processes * ctypes.sizeof(Book))
    books = (Book * course.processes).from_buffer(shared)
    places = [ctypes.addressof(book) for book in books]
    sabotage = partial(fill, point.ranks, output.resolve(), point.call, point.alone, places)
    trace, whole_sabotage = traced(output, sabotage)
    run = course.run(work, output, whole_sabotage)
    since = time.monotonic()
    pids = forks.start(run, work, launch=False)
    supervise(pids)
    seconds = time.monotonic() - since
    calls = [[line.value.decode() for line in book.list[: book.calls]] for book in books]
    what = next((book.first.decode() for book in books if book.refused), "")
    codes = [code or 0 for code in pids.values()]
    log = run.log.read_text(encoding="utf-8", errors="replace")
    told = [line for line in log.splitlines() if line.startswith("error")]
    wrong = judged(output, trace, what, codes, log, told, seconds)
    wrong += gone_on(course, work, output) if any(codes) else compared(course, work, output)
    shutil.rmtree(output, ignore_errors=True)
    return Refused(point, what, codes, seconds, told, wrong), calls


def judged(
    output: Path, trace: Path, what: str, codes: list[int], log: str, told: list[str], seconds: float
) -> list[str]:
    """Return what a run on a full disk did wrong."""
    wrong = [f"{name} is not whole" for name in halves(output)]
    sealed = noted(trace, "sealed")
    kept = {path.name for path in (output / "checkpoints").glob("step-*")}
    if sealed and f"step-{sealed[-1]:08d}" not in kept:
        wrong.append(f"the checkpoint of step {sealed[-1]} is gone")
    if not what:
        return wrong + (["was not refused anything, and failed"] if any(codes) else [])
    if not any(codes):  # then everything must be there
        status = json.loads((output / "run.json").read_text(encoding="utf-8"))["status"]
        return wrong + ([f"exit code 0, status {status}"] if status != "done" else [])
    if len(told) != 1 or not told[0].endswith(SENTENCE):
        wrong.append(f"told {told}")
    if "Traceback" in log:
        wrong.append(f"a traceback: {log[-300:]!r}")
    if 2 not in codes or not {*codes} <= {0, 2, 128 + signal.SIGTERM}:
        wrong.append(f"exit codes {codes}")
    return wrong + ([f"took {seconds:.0f} s"] if seconds > LIMIT else [])


def points(course: Course, work: Path, thin: bool) -> Iterator[Point]:
    """Yield every call of every rank alone and of all ranks together; `thin`: only the calls that `thinned` keeps."""
    undisturbed(course, work)
    _, calls = refuse(Point(course, (), False, NEVER), work)
    each = [(rank,) for rank in range(course.processes)]
    for ranks in [*each, *([tuple(range(course.processes))] if course.processes > 1 else [])]:
        most = max((calls[rank] for rank in ranks), key=len)
        # A disk is never full at one call of all ranks and free again right after it.
        ways = (False, True) if len(ranks) == 1 else (False,)
        for call, alone in itertools.product(thinned(most) if thin else range(1, len(most) + 1), ways):
            yield Point(course, ranks, alone, call)


def thinned(calls: list[str]) -> list[int]:
    """Return the first, middle and last of equal calls in a row, such as the many writes of one file."""
    numbers, last = set(), 0
    for _, equal in itertools.groupby(calls):
        first, last = last + 1, last + len([*equal])
        numbers |= {first, (first + last) // 2, last}
    return sorted(numbers)


def every(work: Path, thin: bool) -> Iterator[Point]:
    for course in courses():
        yield from points(course, work, thin)


def some(work: Path, draw: random.Random, count: int) -> Iterator[Point]:
    """Yield a few points: one process, and two of which one or both meet the full disk."""
    alone, together = ([*points(course, work, True)] for course in (courses()[0], courses()[3]))
    two = [[point for point in together if point.ranks == ranks] for ranks in ((0,), (1,), (0, 1))]
    kinds = [alone, *two]
    yield from (draw.choice(kinds[k % len(kinds)]) for k in range(count))
