"""Says why a script ends, and has it repeated below the launcher's traceback: it is the last thing on the screen."""

import contextlib
import os
import subprocess
import sys

from accel_llm.system import below_launcher
from accel_llm.system.launcher import launcher_pid

RED, PLAIN = "\x1b[1;31m", "\x1b[0m"


def print_last(sentences: str, details: str = "", is_error: bool = True) -> None:
    """Print `details`, such as a traceback, and `sentences` on stderr; under a launcher repeat them below its lines.

    On a terminal `sentences` have a blank line above and below, and errors are red, unless NO_COLOR is set.
    """
    color = is_error and sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    shown = f"{RED}{sentences}{PLAIN}" if color else sentences
    around = "\n" if sys.stderr.isatty() else ""
    print(f"{details}{around}{shown}{around}", file=sys.stderr, flush=True)
    launcher = launcher_pid()
    if launcher is not None:
        _repeat_below(launcher, f"\n{shown}\n\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace"))


def _repeat_below(launcher: int, text: bytes) -> None:
    """Start a program that writes `text` on stderr when the process `launcher` has printed its lines."""
    with contextlib.suppress(OSError, AttributeError):
        handle, written = os.pidfd_open(launcher), below_launcher.written_bytes(launcher)
        # A program, not a fork: a fork would keep the memory and the devices of this process. It has a session of its
        # own, because torchrun sends its signals to the whole group of a process.
        program = subprocess.Popen(
            [sys.executable, "-I", "-S", below_launcher.__file__, *map(str, (launcher, handle, written))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[handle],
            start_new_session=True,
        )
        assert program.stdin is not None
        with program.stdin:
            program.stdin.write(text)
