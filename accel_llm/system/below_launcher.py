"""A program that writes a text below the lines that a launcher prints when one of its processes has failed.

`accelerate launch` and torchrun print a traceback of up to 50 lines after the end of that process, which starts this
program before (see last_line.py). The program holds nothing of the process but its standard error, imports nothing of
this package, and ends with the launcher.
"""

import os
import select
import sys
import time
from pathlib import Path

POLL = 0.05  # seconds
PAUSE = 0.3  # seconds without a new line after which the launcher has printed everything
TRACEBACK = 500  # bytes that its traceback has at least; what it logs before, and what its threads send, has fewer
LIMIT = 120.0  # seconds to wait at most: torchrun waits 30 s for the other processes before it kills them


def written_bytes(pid: int) -> int:
    """Return how many bytes a process has written so far, in any file or pipe; 0 if that is not visible."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text(encoding="ascii").partition("wchar: ")[2].partition("\n")[0])
    except (OSError, ValueError):
        return 0


def _has_children(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii"))
    except OSError:
        return False


def _wait_and_write(launcher: int, handle: int, before: int, text: bytes) -> None:
    """Write `text` when the launcher pauses after its traceback, or when it ends.

    The launcher takes up to seconds to end after its lines. A text written before that stands above the next prompt of
    the shell, and is also in the log of a container that ends with the launcher. If the launcher then writes another
    traceback, `text` is written again.
    """
    end = select.poll()
    end.register(handle, select.POLLIN)
    limit = time.monotonic() + LIMIT
    seen, since, repeated = before, time.monotonic(), False
    while not end.poll(POLL * 1000) and time.monotonic() < limit:
        written = written_bytes(launcher) or seen
        if _has_children(launcher):
            before = written  # the traceback comes after the end of all processes
        if written != seen:
            seen, since = written, time.monotonic()
        if written - before > TRACEBACK and time.monotonic() - since > PAUSE:
            os.write(2, text)
            before, repeated = written, True
    if time.monotonic() < limit and (not repeated or (written_bytes(launcher) or seen) - before > TRACEBACK):
        os.write(2, text)


if __name__ == "__main__":
    pid, pid_handle, pid_written = map(int, sys.argv[1:])
    _wait_and_write(pid, pid_handle, pid_written, sys.stdin.buffer.read())
