"""How a script ends: by an error of the user, a signal or a bug. One rank reports one cause."""

import io
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

from accel_llm.errors import ConfigError, DataError
from accel_llm.system.disk import disk_failure
from accel_llm.system.importing import hide_imports
from accel_llm.system.last_line import print_last
from accel_llm.system.launcher import is_launched, launcher_pid, process_rank, world_size
from accel_llm.system.out_of_memory import memory_failure, ran_out_of_memory
from accel_llm.system.packages import check_packages
from accel_llm.system.progress import close_display
from accel_llm.system.run_lock import release_locks
from accel_llm.system.secrecy import hide_secrets
from accel_llm.system.signals import Preempted, mark_as_failing, signal_requests

OUTPUT_CLOSED = 128 + 13  # as of a program that SIGPIPE ends, a signal that Windows has not
DISK_ADVICE = "{}; make room and give the same command again; it continues from the last whole checkpoint."


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process.

    A ConfigError, a DataError, a full disk or a lack of memory prints its sentences on stderr and ends with exit code
    2; a signal ends with 128 + its number, and so does standard output that is closed, as by `| head -1`. Anything else
    is a bug or a failed machine: it prints its traceback, and under a launcher the last line names the rank, as in
    `error (rank 1): RuntimeError: ...`. A launcher prints its own traceback then, and the sentences are repeated below
    it.
    """
    launched, rank = is_launched(), process_rank()
    source = f"error (rank {rank})" if rank else "error"
    hide_imports()
    _escape_unprintable()
    try:
        check_packages()
        try:
            main()
        finally:
            close_display()
        sys.stdout.flush()
    except (ConfigError, DataError) as error:
        wait_for_root_cause(error)
        text = memory_failure(error) or str(error)  # what looks like a wrong setting may be a lack of memory
        _leave_for_launcher(text)
        _end(2, "\n".join(f"{source}: {line}" for line in text.splitlines()))
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, "interrupted" if not rank else "", is_error=False)
    except Preempted as end:
        message = f"preempted by {end}; run the same command to continue"
        _end(128 + end.number, message if not rank else "", is_error=False)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            _end(OUTPUT_CLOSED)
        if launched and signal_requests.stop:
            # When one process of a job fails, the launcher stops the others with this signal. The failed one reports
            # why.
            _end(128 + signal_requests.stop)
        wait_for_root_cause(error)
        if reason := disk_failure(error):
            _end(2, f"{source}: {DISK_ADVICE.format(reason)}")
        if sentence := memory_failure(error):
            _leave_for_launcher(sentence)
            _end(2, f"{source}: {sentence}")
        if not launched and launcher_pid() is None:
            release_locks()
            raise
        last = "".join(traceback.format_exception_only(error))
        _leave_for_launcher(last.strip())
        source = f"error (rank {rank})" if launched else "error"
        _end(1, f"{source}: {last}".strip(), "".join(traceback.format_exception(error)).removesuffix(last))
    if launched:
        # torch 2.13 sometimes aborts a rank that has finished ("terminate called without an active exception"): threads
        # of its process groups still run while the interpreter deletes the objects that they use.
        _end(0)
    release_locks()


def _escape_unprintable() -> None:
    """Write what the encoding of standard output does not have, such as half a surrogate pair, as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_output_closed() -> bool:
    """Tell whether nobody reads standard output any more; then what is still to be written goes nowhere."""
    if not hasattr(select, "poll"):  # Windows, where such a pipe gives other errors
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are always reported
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@cache  # wait once for each error, although both run.json and the screen ask
def wait_for_root_cause(error: BaseException) -> None:
    """Wait until the launcher would have ended this process, if another rank failed first.

    When one rank is gone, a collective fails on all others, with an error that depends on library, device and
    collective. The launcher ends those ranks within a second. So an error that is still there after some seconds is the
    rank's own. If all ranks fail with the same error, only rank 0 reports it, because every other rank waits longer
    than those before it.
    """
    if world_size() == 1 or not isinstance(error, Exception):
        return
    mark_as_failing()
    # The failure of another rank never causes an error in the settings or the data, a full disk or a lack of memory: do
    # not wait for it.
    own_fault = isinstance(error, (ConfigError, DataError)) or disk_failure(error) or ran_out_of_memory(error)
    rank = process_rank()
    time.sleep((0 if own_fault else 3) + (3 + min(rank, 10) if rank else 0))


def _leave_for_launcher(message: str) -> None:
    """Write `message` where torchrun looks for it, so that its last lines name rank and cause instead of a web page."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(
            json.dumps({"message": hide_secrets(message), "timestamp": int(time.time())}), encoding="utf-8"
        )


def _end(code: int, sentences: str = "", details: str = "", is_error: bool = True) -> None:
    """Print why the script ends, see `print_last`, and end the process at once.

    Unlike sys.exit, this does not wait for process groups and worker threads, which could keep a finished rank alive.
    """
    sys.stdout.flush()
    release_locks()
    if sentences:
        print_last(hide_secrets(sentences), hide_secrets(details), is_error)
    os._exit(code)
