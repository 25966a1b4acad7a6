"""Limits the time and memory of a chat template, which is a program from an untrusted file.

Jinja's sandbox keeps a template away from files and from Python's internals. It does not stop endless loops or endless
texts, and there are too many ways to build the latter (a product, a width, nested lists) to forbid each of them.
Therefore the whole process gets limits while a template is running.
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

import jinja2

from accel_llm.errors import ConfigError

if sys.platform == "linux":
    import resource

# Published templates have a few thousand characters and take milliseconds.
MAX_SECONDS, MAX_MEMORY, MAX_SOURCE = 3, 1 << 30, 1 << 17
STUCK_SECONDS = 10  # seconds of CPU time inside one call of C code, which Python cannot interrupt
# A rendered text may have this many characters, or this many times the characters of its conversation.
FREE_OUTPUT, MAX_GROWTH = 1 << 20, 16
FRESH_SECONDS = 0.1  # a memory measurement is used again for so long, because it costs as much as a render

# Errors that a render can raise. Python raises SyntaxError for loops that are nested too deep.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
TEMPLATE_ERRORS += (RecursionError, SyntaxError)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _RenderTimeout(BaseException):
    """Raised when a render takes too long. Not an Exception, because Jinja catches those when it tries an operation."""


class _MemoryLimits(NamedTuple):
    """The process's limits of its data segment, each as (soft, hard) in bytes."""

    measured_at: float  # time.monotonic()
    usual: tuple[int, int]
    bounded: tuple[int, int]  # while a template is running


class _Clock:
    """State of the timer: is bounded code running, renders begun so far, and renders begun at the last tick."""

    running = False
    renders = renders_at_tick = 0


_memory_limits: _MemoryLimits | None = None


def run_bounded(act: Callable[Arguments, Result], /, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
    """Return `act(*args, **options)`, with limits on the time of each render and on the memory of all of them.

    A render may take MAX_SECONDS (it is stopped after one to two times as many), and the process may take MAX_MEMORY
    bytes beyond those in use now. Seconds are CPU time, so that a busy machine stops no template. Code that Python
    cannot interrupt, such as a comparison of nested lists, ends the process with SIGPROF after STUCK_SECONDS; the
    traceback names the template.

    Memory is limited on Linux only, and time only where Python has `signal.setitimer`. Outside the main thread there
    are no limits, because only the main thread receives signals. The memory limit holds for all threads: the others
    should allocate little meanwhile.

    Raises:
        ConfigError: a limit was reached. The memory of `act` is free again by then.
    """
    if _Clock.running or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return act(*args, **options)

    # Set the limits.
    memory = _measure_memory()
    _install_handlers()
    # The first render counts from here, each later one from the first tick after it begins.
    _Clock.running, _Clock.renders_at_tick = True, _Clock.renders + 1
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, STUCK_SECONDS)
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, memory.bounded)

    # Run, and take the limits away again whatever happens.
    try:
        return act(*args, **options)
    except _RenderTimeout:
        limit = f"{MAX_SECONDS} seconds"
    except MemoryError:
        limit = f"{MAX_MEMORY >> 20} MiB of memory"
    finally:
        _Clock.running = False
        if memory:
            resource.setrlimit(resource.RLIMIT_DATA, memory.usual)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    # Raised here and not above: inside `except` the traceback would still hold the memory of `act`.
    raise ConfigError(
        f"chat_template: it was stopped because it took more than {limit}, which no template needs for a conversation; "
        "look into it, or use another one (chat_template: chatml | path/to/file.jinja)."
    )


def begin_render() -> None:
    """Tell the clock that a new render begins. A conversation of thousands of turns takes thousands of renders."""
    _Clock.renders += 1


def check_template_size(source: str) -> None:
    """Check the length of a template's source before it is compiled, because compilation cannot be interrupted.

    Raises:
        ConfigError: the source is implausibly long.
    """
    if len(source) > MAX_SOURCE:
        raise ConfigError(
            f"chat_template: its source is more than {MAX_SOURCE:,} characters long, but templates have a few "
            "thousand; use another one (chat_template: chatml | path/to/file.jinja)."
        )


def check_output_size(text: str, conversation: Any) -> None:
    """Check that a rendered text is not far longer than its conversation (messages and tools).

    Raises:
        ConfigError: it is.
    """
    if len(text) > FREE_OUTPUT and len(text) > MAX_GROWTH * len(repr(conversation)):
        raise ConfigError(
            f"chat_template: it wrote {len(text):,} characters for a conversation of {len(repr(conversation)):,}; look "
            "into it, or use another one (chat_template: chatml | path/to/file.jinja)."
        )


@cache  # once a process: it takes longer than the rest of this module
def _install_handlers() -> None:
    signal.signal(signal.SIGVTALRM, _on_tick)
    # faulthandler writes the traceback from C, without Python; then the signal's default action ends the process.
    faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)


def _on_tick(number: int, frame: Any) -> None:
    """Stop the render if it is the same one as at the last tick."""
    if not _Clock.running:
        return
    if _Clock.renders == _Clock.renders_at_tick:
        raise _RenderTimeout
    _Clock.renders_at_tick = _Clock.renders
    signal.setitimer(signal.ITIMER_PROF, STUCK_SECONDS)  # Python code runs, so the process is not stuck in C


def _measure_memory() -> _MemoryLimits | None:
    """Return the limits of the data segment: as they are, and MAX_MEMORY above the present use. None if not on Linux.

    The address space is no measure: maps of files and of devices can take terabytes of it.
    """
    global _memory_limits
    if sys.platform != "linux":
        return None
    now = time.monotonic()
    if _memory_limits is None or now - _memory_limits.measured_at > FRESH_SECONDS:
        usual = resource.getrlimit(resource.RLIMIT_DATA)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # data and stack
        soft = pages * resource.getpagesize() + MAX_MEMORY
        # A limit below 0 means that there is none.
        _memory_limits = _MemoryLimits(now, usual, (soft if usual[0] < 0 else min(soft, usual[0]), usual[1]))
    return _memory_limits
