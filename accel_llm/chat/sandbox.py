"""What a chat template may take: it is a program out of a stranger's file, so it runs on a budget.

Jinja's sandbox keeps a template from files and Python's internals, not from loops without end or texts without end. There
are too many ways to the latter (a product, a width, a list of lists of lists) to stop each one, so the process itself is
bounded while a template is at work.
"""

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from accel_llm.errors import ConfigError

if sys.platform == "linux":
    import resource

# Published templates have some thousands of characters and take milliseconds.
MAX_SECONDS, MAX_MEMORY, MAX_SOURCE = 3, 1 << 30, 1 << 17
STUCK_SECONDS = 10  # seconds of CPU time in one call of C, where Python cannot be interrupted
# A text is at most so many characters, or so many times those that people wrote.
FREE_OUTPUT, MAX_GROWTH = 1 << 20, 16
FRESH_SECONDS = 0.1  # seconds for which a measurement of memory holds: it costs as much as a whole render

Given = ParamSpec("Given")
Result = TypeVar("Result")


class _Expired(BaseException):
    """Not an Exception: Jinja passes over those where it tries whether something can be done."""


class _Memory(NamedTuple):
    measured: float  # time.monotonic()
    usual: tuple[int, int]  # the limits, soft and hard, of this process
    bounded: tuple[int, int]


class _Work:
    """What is under way: whether something is, how many renders it has begun, and how many it had at the last tick."""

    under_way = False
    begun = seen = 0


_memory: _Memory | None = None


def run_bounded(act: Callable[Given, Result], /, *args: Given.args, **named: Given.kwargs) -> Result:
    """`act(...)`, within MEMORY bytes beyond those in use; nothing in it may go on for SECONDS without a `begin`.

    Seconds are of CPU time, so that a machine which is busy or asleep costs no template its life; a render that hangs is
    ended after one to two times as many. One that is stuck where no exception can be raised, as in the comparison of lists
    of lists, ends the process by SIGPROF, with a traceback that names the template. Memory is bounded on Linux, time where
    there are signals; neither outside the main thread, which alone gets them. Memory counts for all threads alike: no other
    should allocate much meanwhile.

    Raises:
        ConfigError: it takes more. What it had built is free again by then.
    """
    if _Work.under_way or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return act(*args, **named)
    memory = _limit_of_memory()
    _listen()
    # The first of it counts from here, each other one from the tick that follows its beginning.
    _Work.under_way, _Work.seen = True, _Work.begun + 1
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, STUCK_SECONDS)
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, memory.bounded)
    try:
        return act(*args, **named)
    except _Expired:
        wanted = f"{MAX_SECONDS} seconds"
    except MemoryError:
        wanted = f"{MAX_MEMORY >> 20} MiB of memory"
    finally:
        _Work.under_way = False
        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, memory.usual)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    raise ConfigError(
        f"chat_template: it was stopped when it took more than {wanted}, which no template needs for a conversation; "
        "look into it, or give another one (chat_template: chatml | path/to/file.jinja)."
    )


def begin_render() -> None:
    """To be called before each render: a conversation of thousands of turns takes thousands of them."""
    _Work.begun += 1


def check_template_size(source: str) -> None:
    """Raises ConfigError where a template's source is too long to be one: its compilation cannot be interrupted."""
    if len(source) > MAX_SOURCE:
        raise ConfigError(
            f"chat_template: its source is more than {MAX_SOURCE:,} characters long, and templates have some thousands; give "
            "another one (chat_template: chatml | path/to/file.jinja)."
        )


def check_output_size(text: str, written: Any) -> None:
    """Raises ConfigError where a template has made far more of what people wrote, `written`, than there was of it."""
    if len(text) > FREE_OUTPUT and len(text) > MAX_GROWTH * len(repr(written)):
        raise ConfigError(
            f"chat_template: it wrote {len(text):,} characters for a conversation of {len(repr(written)):,}; look into it, "
            "or give another one (chat_template: chatml | path/to/file.jinja)."
        )


@cache  # once a process: it takes longer than all else here together
def _listen() -> None:
    signal.signal(signal.SIGVTALRM, _tick)
    # Written by C, without Python; then the signal's default ends the process.
    faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)


def _tick(number: int, frame: Any) -> None:
    if not _Work.under_way:
        return
    if _Work.begun == _Work.seen:
        raise _Expired
    _Work.seen = _Work.begun
    signal.setitimer(signal.ITIMER_PROF, STUCK_SECONDS)  # it is not stuck


def _limit_of_memory() -> _Memory | None:
    """Limits of the data segment as it is now; of address space there may be terabytes, maps of files and of devices."""
    global _memory
    if sys.platform != "linux":
        return None
    now = time.monotonic()
    if _memory is None or now - _memory.measured > FRESH_SECONDS:
        usual = resource.getrlimit(resource.RLIMIT_DATA)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        soft = pages * resource.getpagesize() + MAX_MEMORY
        _memory = _Memory(now, usual, (soft if usual[0] < 0 else min(soft, usual[0]), usual[1]))
    return _memory
