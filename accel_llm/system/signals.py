"""Signals: SIGTERM, SIGINT and SIGHUP save and stop a run (a second one ends it at once), SIGUSR1 saves and goes on.

While a run trains, a signal is only noted; all processes agree on what to do at the end of a step, or of a batch of an
evaluation. Before training, and while the result is exported, nothing can be lost: a signal ends the process at once.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accel_llm.system.disk import write_atomically
from accel_llm.system.last_line import print_last
from accel_llm.system.launcher import process_rank
from accel_llm.system.run_lock import release_locks

# Ctrl-C reaches every process and is forwarded by the launcher: within 2 s both count as one signal.
SAME_SIGNAL_SECONDS = 2.0
# Windows has neither SIGHUP nor SIGUSR1, and macOS no real-time signals: there they are 0, a number that no signal has.
HANG_UP: int = getattr(signal, "SIGHUP", 0)
SAVE_SIGNAL: int = getattr(signal, "SIGUSR1", 0)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([HANG_UP] if HANG_UP else []))
PR_SET_PDEATHSIG = 1  # option of Linux' prctl(2): the signal to get when the parent ends
# A signal of its own for the end of the launcher. Ctrl-C also ends a launcher with one process, which takes it seconds:
# as a SIGTERM, its end would look like a second signal of the user.
LAUNCHER_ENDED: int = signal.SIGRTMIN + 4 if hasattr(signal, "SIGRTMIN") else 0
HANDLED = [number for number in (*STOP_SIGNALS, SAVE_SIGNAL, LAUNCHER_ENDED) if number]


class Preempted(Exception):
    """A signal stopped the run, and its state after `step` is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name}: stopped after step {step}")
        self.number, self.step = number, step


@dataclass
class SignalRequests:
    """What signals have asked for: `stop` is the number of the stop signal (0: none), `save` asks for a checkpoint."""

    stop: int = 0
    save: bool = False


signal_requests = SignalRequests()
_stop_time = 0.0  # when `stop` was set, on the monotonic clock
_run_folder: Path | None = None  # its run.json records how the process ends
_listening = False
_deferring = False  # a signal is only noted, see `deferring_signals`
_failing = False  # the process is about to end by an error
_on_stop: Callable[[int], None] | None = None  # called with the number of the signal that stops the run


def listen_for_signals(folder: Path | None) -> None:
    """Handle signals from now on as described at the top of this file.

    If a signal ends the process, `folder`/run.json records it. A thread handles the signals: Python's own handlers only
    run when the main thread returns from C code, and a collective whose peers are gone may never return.
    """
    global _run_folder, _listening
    _run_folder = folder
    if _listening:
        return
    _listening = True

    # The C handler of Python writes the number of each signal to a socket, and the thread reads it.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in HANDLED:
        # `nohup` sets SIGHUP to be ignored. But torchrun passes it on even so, and then kills what has not ended.
        if signal.getsignal(number) != signal.SIG_IGN or number != HANG_UP or "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # A forked process shares the socket: its signals would reach the thread of this one. Windows does not fork.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reset_handlers)
    threading.Thread(target=_read_signals, args=(reader, writer), daemon=True).start()
    _end_with_launcher()


def _reset_handlers() -> None:
    signal.set_wakeup_fd(-1)
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)


def _end_with_launcher() -> None:
    """Get a signal when the launcher ends. With one process `accelerate launch` ends without forwarding its own."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_ENDED)


def _read_signals(reader: socket.socket, writer: socket.socket) -> None:
    # The thread also keeps `writer` open: set_wakeup_fd only knows its number.
    with reader, writer:
        while number := reader.recv(1):
            handle_signal(number[0])


def handle_signal(number: int) -> None:
    """React to a signal: note it, or end the process, as described at the top of this file."""
    if number == SAVE_SIGNAL:
        signal_requests.save = True
    elif number in STOP_SIGNALS:
        _stop(number)
    elif number == LAUNCHER_ENDED and not signal_requests.stop:
        _stop(signal.SIGTERM)


def _stop(number: int) -> None:
    """React to a signal to stop."""
    global _stop_time
    now = time.monotonic()
    _leave_closed_terminal(closing=number == HANG_UP)
    if not signal_requests.stop and (_failing or _is_peer_gone()):
        # When one process of a job fails, the launcher stops the others with this signal. The failed one reports why.
        if _on_stop is not None:
            _on_stop(number)
        release_locks()
        os._exit(128 + number)
    elif not _deferring:
        _end(number)
    elif not signal_requests.stop:
        signal_requests.stop, _stop_time = number, now
        if _on_stop is not None:
            _on_stop(number)
        _announce_stop(number)
    elif now - _stop_time > SAME_SIGNAL_SECONDS:
        release_locks()
        os._exit(128 + number)


def _leave_closed_terminal(closing: bool) -> None:
    """Write no more to a terminal that has been closed: each line would be an error, and the run would fail by it.

    `closing`: SIGHUP says so. torchrun passes it on as SIGTERM; then the terminal itself says so.
    """
    for handle in (1, 2):
        with contextlib.suppress(OSError):  # one that is closed
            if stat.S_ISCHR(os.fstat(handle).st_mode) and (closing or _is_hung_up(handle)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


def _is_hung_up(handle: int) -> bool:
    if not hasattr(select, "poll"):  # Windows, which has no such terminals
        return False
    terminal = select.poll()
    terminal.register(handle, 0)  # a hang-up is always reported
    return bool(terminal.poll(0))


def _announce_stop(number: int) -> None:
    """Say on the main process what happens now: a step can be long, and the shell may show its prompt before its end."""
    if process_rank() or not sys.stderr:
        return
    message = f"\n{signal.Signals(number).name}: the run saves at the end of this step and stops; `kill {os.getpid()}` "
    message += "stops it at once, without the steps since the last checkpoint"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
        message += f"; the launcher waits {seconds} s for it (TORCH_ELASTIC_SHUTDOWN_TIMEOUT in its environment)"
    print(message, file=sys.stderr, flush=True)


def _is_peer_gone() -> bool:
    """Return whether the launcher has fewer processes of this job than it started; False if that is not visible."""
    children, world = f"/proc/{os.getppid()}/task/{os.getppid()}/children", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        pids = Path(children).read_text(encoding="ascii").split()
        ranks = [pid for pid in pids if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    except OSError:
        return False
    return str(os.getpid()) in ranks and len(ranks) < world


@contextmanager
def deferring_signals(on_stop: Callable[[int], None]) -> Iterator[None]:
    """Within the block, only note a signal to stop, for the end of the step. Call `on_stop` with its number at once."""
    global _deferring, _on_stop
    _deferring, _on_stop = True, on_stop
    try:
        yield
        # Only on success: after an error, a later signal must still be reported.
        _on_stop = None
    finally:
        _deferring = False


def mark_as_failing() -> None:
    """Record that an error ends this process, so that a later signal is not taken for the cause."""
    global _failing
    _failing = True


def stop_deferring_signals() -> None:
    """Let signals end the process at once from now on, because all is saved; a noted one ends it here."""
    global _deferring, _on_stop
    _deferring, _on_stop = False, None
    if signal_requests.stop:
        _end(signal_requests.stop)


def ignore_further_signals() -> None:
    """Let the process end in peace after a signal to stop: all is saved, and a second signal must not cut it short."""
    global _stop_time
    _stop_time = float("inf")


def _end(number: int) -> None:
    """End the process at once, with status `preempted` in run.json and a message of the main process."""
    try:
        if _run_folder is not None:
            with contextlib.suppress(OSError):
                _record_preemption(_run_folder)
        release_locks()
        if process_rank() == 0:
            name = signal.Signals(number).name
            message = f"preempted by {name}: nothing is lost; run the same command to continue"
            print_last(message, is_error=False)
    finally:
        os._exit(128 + number)


def _record_preemption(folder: Path) -> None:
    """Write status `preempted` to run.json, if the folder is new or holds a run that can continue."""
    run_file = folder / "run.json"
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        run = {"status": "running", "step": 0}
    else:
        try:
            run = json.loads(run_file.read_text(encoding="utf-8"))
        except ValueError:
            return
    if isinstance(run, dict) and run.get("status") in ("running", "failed", "preempted"):
        write_atomically(run_file, json.dumps(run | {"status": "preempted"}, indent=2, ensure_ascii=False) + "\n")
