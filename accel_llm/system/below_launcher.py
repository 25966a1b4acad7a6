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

PAUSE = 0.25  # seconds without a new line after which the launcher has printed everything
LIMIT = 120.0  # seconds to wait at most: torchrun waits 30 s for the other processes before it kills them


def written_bytes(pid: int) -> str:
    """Return how many bytes a process has written so far, in any file or pipe; an empty text if that is not visible."""
    try:
        return Path(f"/proc/{pid}/io").read_text(encoding="ascii").partition("wchar: ")[2].partition("\n")[0]
    except OSError:
        return ""


def _has_children(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii"))
    except OSError:
        return False


def _wait_and_write(launcher: int, handle: int, before: str, text: bytes) -> None:
    """Write `text` when the launcher pauses after its lines, or when it ends.

    The launcher takes up to seconds to end after its lines. A text written before that stands above the next prompt of
    the shell, and is also in the log of a container that ends with the launcher. If the launcher then writes more,
    `text` is written again.
    """
    end = select.poll()
    end.register(handle, select.POLLIN)
    limit = time.monotonic() + LIMIT
    seen, repeated_at = before, None
    while not end.poll(PAUSE * 1000) and time.monotonic() < limit:
        now = written_bytes(launcher) or seen
        if now == seen and now not in (before, repeated_at) and not _has_children(launcher):
            os.write(2, text)
            repeated_at = now
        seen = now
    if repeated_at != (written_bytes(launcher) or seen) and time.monotonic() < limit:
        os.write(2, text)


if __name__ == "__main__":
    _wait_and_write(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.stdin.buffer.read())
