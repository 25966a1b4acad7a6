"""How a script ends: by an error of the person, a signal or a bug; one cause, told by one rank."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

from accel_llm.errors import ConfigError, DataError
from accel_llm.system.disk import disk_failure
from accel_llm.system.launcher import is_launched, process_rank, world_size
from accel_llm.system.secrecy import hide_secrets
from accel_llm.system.signals import Preempted, note_failing, requested

DISK_ADVICE = "{}; make room and give the same command again, it goes on from the last whole checkpoint."


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a ConfigError, a DataError or a full disk becomes a sentence on stderr and exit code 2, a signal
    exit code 128 + its number.

    Anything else is a bug of ours, or a machine that failed: it keeps its traceback, and under a launcher the last line
    names the rank, as in `error (rank 1): RuntimeError: ...`.
    """
    launched, rank = is_launched(), process_rank()
    try:
        main()
    except (ConfigError, DataError) as error:
        wait_for_root_cause(error)
        prefix = f"error (rank {rank}): " if rank else "error: "
        _end(2, "\n".join(prefix + line for line in str(error).splitlines()))
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, "interrupted" if not rank else "")
    except Preempted as end:
        words = f"preempted by {end}; the same command goes on from there"
        _end(128 + end.number, words if not rank else "")
    except Exception as error:
        if launched and requested.stop:
            # A launcher ends with this signal what is left of a job of which one process failed, and that one has told why.
            _end(128 + requested.stop)
        wait_for_root_cause(error)
        if told := disk_failure(error):
            _end(2, f"error{f' (rank {rank})' if rank else ''}: {DISK_ADVICE.format(told)}")
        if not launched:
            raise
        last = "".join(traceback.format_exception_only(error))
        _leave_for_launcher(last.strip())
        _end(1, "".join(traceback.format_exception(error)).removesuffix(last) + f"error (rank {rank}): {last}".strip())
    if launched:
        # torch 2.13 now and then aborts a rank that has done its work ("terminate called without an active exception"):
        # threads of its process groups outlive the objects that the interpreter's end takes away from under them.
        _end(0)


@cache  # once an error, though two places ask: the one that notes it in run.json and the one that tells it
def wait_for_root_cause(error: BaseException) -> None:
    """Give the launcher time to end this process, if `error` only follows from what happened on another rank.

    When one rank is gone, a collective fails on all the others, with an error that differs by library, device and
    collective. But the launcher ends them within a second, so the error of a process that is still there after some
    seconds is its own. What all ranks met is told by rank 0 alone: each of the others waits longer than those before it.
    """
    if world_size() == 1 or not isinstance(error, Exception):
        return
    note_failing()
    rank, mistake = process_rank(), isinstance(error, (ConfigError, DataError)) or disk_failure(error)
    # No other rank's end leads to a mistake in the settings or the data, nor to a full disk.
    time.sleep((0 if mistake else 3) + (3 + min(rank, 10) if rank else 0))


def _leave_for_launcher(message: str) -> None:
    """Put `message` where torchrun looks for it, so that its last lines name rank and cause instead of a web page."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(
            json.dumps({"message": hide_secrets(message), "timestamp": int(time.time())}), encoding="utf-8"
        )


def _end(code: int, last_words: str = "") -> None:
    """Not sys.exit: process groups and worker threads must not keep a rank alive that has nothing left to do."""
    sys.stdout.flush()
    last_words = hide_secrets(last_words)
    print(last_words, end="\n" if last_words else "", file=sys.stderr, flush=True)
    os._exit(code)
