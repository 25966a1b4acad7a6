"""Signals: SIGTERM and SIGINT ask a run to save and stop, SIGUSR1 to save and go on, a second SIGTERM ends it at once.

While a run trains, a signal is only remembered, and all processes agree on what to do at the end of a step or of an
evaluation's batch. Before that, and while the result is written, nothing would be lost: there it ends the process at once.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accel_llm.system.disk import write_atomically
from accel_llm.system.launcher import process_rank

# A launcher sends on what a terminal sends to everybody: that is one signal, not a second.
ONE_SIGNAL = 2.0  # seconds
OF_THE_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Preempted(Exception):
    """The run was asked to stop, and what it had done up to `step` is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name}: stopped after step {step}")
        self.number, self.step = number, step


@dataclass
class Requested:
    """What this process was asked for: the number of the signal to stop by (0: none), and whether to save."""

    stop: int = 0
    save: bool = False


requested = Requested()
_since = 0.0  # when it was asked to stop
_folder: Path | None = None  # where the end of a process is noted
_listening = False
_remembering = False  # a signal to stop is only remembered
_failing = False  # the process ends by an error
_tell: Callable[[int], None] | None = None  # notes in run.json that a signal has come


def listen_for_signals(folder: Path | None) -> None:
    """From now on signals are heeded as the module says; one that ends the process is noted in `folder`'s run.json.

    A thread does so, woken by the C handler: Python's own must wait until the main thread comes out of a collective, which
    without its peers may be never.
    """
    global _folder, _listening
    _folder = folder
    if _listening:
        return
    _listening = True
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # A process forked from this one would wake this one's thread by its own signals.
    os.register_at_fork(after_in_child=_heed_nothing)
    threading.Thread(target=_watch, args=(reader, writer), daemon=True).start()
    _outlive_no_launcher()


def _heed_nothing() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _outlive_no_launcher() -> None:
    """Get SIGTERM when the launcher is gone: with one process `accelerate launch` sends nothing on, it just ends."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(OF_THE_PARENT, signal.SIGTERM)


def _watch(reader: socket.socket, writer: socket.socket) -> None:
    with reader, writer:
        while number := reader.recv(1):
            handle_signal(number[0])


def handle_signal(number: int) -> None:
    """What a signal does."""
    global _since
    if number == signal.SIGUSR1:
        requested.save = True
    elif number in (signal.SIGTERM, signal.SIGINT):
        now = time.monotonic()
        if not requested.stop and (_failing or _a_peer_is_gone()):
            # So a launcher ends what is left of a job of which one process failed, and that one says why.
            if _tell is not None:
                _tell(number)
            os._exit(128 + number)
        elif not _remembering:
            _end(number)
        elif not requested.stop:
            requested.stop, _since = number, now
            if _tell is not None:
                _tell(number)
        elif now - _since > ONE_SIGNAL:
            os._exit(128 + number)


def _a_peer_is_gone() -> bool:
    """Whether the launcher has fewer processes of this job than it has started; False where that cannot be seen."""
    children, world = f"/proc/{os.getppid()}/task/{os.getppid()}/children", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        pids = Path(children).read_text(encoding="ascii").split()
        ranks = [pid for pid in pids if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    except OSError:
        return False
    return str(os.getpid()) in ranks and len(ranks) < world


@contextmanager
def remembering_signals(tell: Callable[[int], None]) -> Iterator[None]:
    """Within, a signal to stop is remembered for the next end of a step; `tell` is called with it at once."""
    global _remembering, _tell
    _remembering, _tell = True, tell
    try:
        yield
        _tell = None
    finally:
        _remembering = False


def note_failing() -> None:
    """An error ends this process: a signal has nothing to add."""
    global _failing
    _failing = True


def note_nothing_to_lose() -> None:
    """All is saved: from now on a signal ends the process at once."""
    global _remembering, _tell
    _remembering, _tell = False, None
    if requested.stop:
        _end(requested.stop)


def note_all_saved() -> None:
    """Nothing is lost any more: the process ends by itself, and no signal has to hurry it."""
    global _since
    _since = float("inf")


def _end(number: int) -> None:
    try:
        if _folder is not None:
            with contextlib.suppress(OSError):
                _note(_folder)
        words = f"preempted by {signal.Signals(number).name}: nothing is lost; the same command goes on from there"
        if process_rank() == 0:
            print(words, file=sys.stderr, flush=True)
    finally:
        os._exit(128 + number)


def _note(folder: Path) -> None:
    """Status `preempted` in a folder that is new, or in that of a run to be continued; other folders are left alone."""
    run = folder / "run.json"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        found = {"status": "running", "step": 0}
    else:
        try:
            found = json.loads(run.read_text(encoding="utf-8"))
        except ValueError:
            return
    if isinstance(found, dict) and found.get("status") in ("running", "failed", "preempted"):
        write_atomically(run, json.dumps(found | {"status": "preempted"}, indent=2, ensure_ascii=False) + "\n")
