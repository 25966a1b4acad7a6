"""Reads what a person types: with line editing and a history at a terminal, line by line from a pipe."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

try:
    import readline as _readline
except ImportError:  # Windows
    _readline = None

KEPT_ENTRIES = 1000  # of the history
MAX_ENTRY = 10_000  # characters; what is longer was pasted, and is not kept
FENCE = '"""'  # begins and ends a text of several lines
AGAIN = "[Ctrl-C again, or Ctrl-D, ends.]"


def history_path() -> Path:
    """Return the file of the history: chat_history in the folder accel_llm of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "accel_llm" / "chat_history"


class LineInput:
    """The lines that a person types, or that come through a pipe.

    With readline, and only at a terminal, a line can be edited and the arrow keys bring back earlier ones. They are kept
    in `history`, which only the user can read, as JSON texts, one for each entry. A pasted text is one entry, whatever
    line breaks it has, where the terminal marks what is pasted.
    """

    def __init__(self, history: Path):
        self.at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._history, self._readline = history, _readline if self.at_terminal else None
        if self._readline:
            self._readline.set_auto_history(False)
            if "libedit" not in (self._readline.__doc__ or ""):
                # Python switches it off, because a program may not expect line breaks in a line.
                self._readline.parse_and_bind("set enable-bracketed-paste on")
            for entry in _load_history(history):
                self._readline.add_history(entry)

    def read(self, prompt: str) -> str | None:
        """Return the next text, without spaces around it; "" if nothing was typed, None at the end of the input.

        Ctrl-C drops what is typed. At an empty line it says how to end, and ends if it comes twice.
        """
        pressed = False
        while True:
            try:
                text = self._read_text(prompt)
                break
            except EOFError:
                self._end_line()
                return None
            except KeyboardInterrupt:
                self._end_line()
                if not self.at_terminal:
                    raise
                typed = bool(self._readline and self._readline.get_line_buffer())
                if pressed and not typed:
                    return None
                pressed = not typed
                if pressed:
                    print(AGAIN, file=sys.stderr, flush=True)
        if text and self._readline:
            self._remember(text)
        return text

    def _read_text(self, prompt: str) -> str:
        """Return one line, or all lines between two fences. The end of the input ends a text that is begun."""
        line = self._read_line(prompt)
        # A line with a line break was pasted: it is taken as it is.
        if not line.startswith(FENCE) or "\n" in line:
            return line.strip()
        lines, rest = [], line.removeprefix(FENCE)
        while not rest.rstrip().endswith(FENCE):
            lines.append(rest)
            try:
                rest = self._read_line("...> ")
            except EOFError:
                return "\n".join(lines).strip()
        return "\n".join([*lines, rest.rstrip().removesuffix(FENCE)]).strip()

    def _read_line(self, prompt: str) -> str:
        if self.at_terminal:
            line = input(prompt)
        else:
            # Whoever reads standard output gets the answers alone.
            if sys.stdin.isatty():
                print(prompt, end="", file=sys.stderr, flush=True)
            line = input()
        # What is no UTF-8 becomes the sign for it.
        return line.encode(errors="surrogateescape").decode(errors="replace")

    def _end_line(self) -> None:
        if self.at_terminal:
            print(flush=True)

    def _remember(self, text: str) -> None:
        """Add a text to the history, here and in the file, unless it is the last one again."""
        history: Any = self._readline
        length = history.get_current_history_length()
        if len(text) > MAX_ENTRY or (length and history.get_history_item(length) == text):
            return
        history.add_history(text)
        with contextlib.suppress(OSError):  # nobody misses a chat because its history cannot be kept
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _open_private(self._history, os.O_APPEND) as file:
                file.write(json.dumps(text, ensure_ascii=False) + "\n")


def _load_history(path: Path) -> list[str]:
    """Return the last entries of a history, and shorten its file if it has many more. A line that is broken is no entry."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    if len(lines) > KEPT_ENTRIES:
        lines = lines[-KEPT_ENTRIES:]
        with contextlib.suppress(OSError):
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            with _open_private(partial, os.O_TRUNC) as file:
                file.writelines(f"{line}\n" for line in lines)
            partial.replace(path)
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, str) and "\0" not in entry]


def _open_private(path: Path, flag: int) -> Any:
    """Open a file to write; nobody but the user can read it, also if it was there before."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, 0o600)
    return os.fdopen(handle, "w", encoding="utf-8")
