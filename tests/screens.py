"""A script on a pseudo-terminal of its own, as a person starts it: what is typed, and what is on the screen."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from support import ROOT

_CODES = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[=>]|\r")  # colors, cursor moves, modes of the keyboard


class Screen:
    """`words` are the script and its options. `raw` is all that was written on the terminal, `text` the same without codes."""

    def __init__(self, *words: object, width: int = 80, seconds: float = 60, **variables: str):
        self.raw, self._seconds = b"", seconds
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | variables
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, *map(str, words)], environment)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))

    @property
    def text(self) -> str:
        return _CODES.sub(b"", self.raw).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def wait(self, condition: Callable[[str], object]) -> str:
        """Wait until `condition` is true of the text on the screen; return the text."""
        limit = time.monotonic() + self._seconds
        while not condition(self.text):
            assert time.monotonic() < limit, self.text
            assert self._read(0.05), self.text
        return self.text

    def say(self, line: str, prompt: str = "you> ") -> str:
        """Type a line, wait for the next prompt, and return what came between the two."""
        before = len(self.text)
        self.type(f"{line}\n")
        return self.wait(lambda text: text[before:].endswith(f"\n{prompt}"))[before:]

    def end(self) -> int:
        """Wait for the end of the script, and return its exit code."""
        limit = time.monotonic() + self._seconds
        while self._read(0.05):
            assert time.monotonic() < limit, self.text
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, seconds: float) -> bool:
        """Read what is there; return False when the script has ended."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return True
        try:
            new = os.read(self._terminal, 1 << 16)
        except OSError:  # Linux: the last process has closed the terminal
            return False
        self.raw += new
        return bool(new)


def written(folder: Path) -> str:
    """Return the text of the one history that is kept in a folder for caches."""
    (path,) = folder.rglob("chat_history")
    return path.read_text(encoding="utf-8")
