"""The two mistakes a person can make, and how a script ends when one of them was made."""

import os
import sys
import time
from collections.abc import Callable


class ConfigError(Exception):
    """Settings that cannot work. `problems` holds one sentence each: the field, its value, what is allowed."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class DataError(Exception):
    """A row or file that cannot be used: the file, the row, the field, what was found and what is allowed.

    `reason` says what is wrong in a few words that are the same for all rows with this fault, to count them by.
    """

    def __init__(self, message: str, reason: str = "not usable"):
        super().__init__(message)
        self.reason = reason


def check(problems: list[str]) -> None:
    """Raises ConfigError with all of `problems` at once, if there are any."""
    if problems:
        raise ConfigError(*problems)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a ConfigError or DataError becomes its own sentences on stderr and exit code 2.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except (ConfigError, DataError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # Mistakes are the same on every rank. The launcher ends the others as soon as rank 0 is gone, so the
            # person reads the sentence once; a mistake that only this rank met is still told.
            time.sleep(3)
        prefix = f"error (rank {rank}): " if rank else "error: "
        print("\n".join(prefix + line for line in str(error).splitlines()), file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not sys.exit: process groups and worker threads must not keep a rank alive that has nothing left to do.
        os._exit(2)
    if "RANK" in os.environ:
        # torch 2.13 now and then aborts a rank that has done its work ("terminate called without an active exception"):
        # threads of its process groups outlive the objects that the interpreter's end takes away from under them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
