"""The launcher: its process, and in its environment variables the rank of this process and the number of processes."""

import contextlib
import os
import sys
from pathlib import Path


def is_launched() -> bool:
    """Return whether a launcher (`accelerate launch`, torchrun) started this process, even as the only one."""
    return "RANK" in os.environ


def process_rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of processes on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launcher_pid() -> int | None:
    """Return the id of the launcher's process if it ends when this process fails; None without one, or if not visible.

    A launcher that starts the processes again (`max_restarts`) does not end before its last try.
    """
    last_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    if not last_try or not os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}:
        return None
    # The variables can be left over in a shell. But a launcher has the script among its own arguments.
    parent = os.getppid()
    with contextlib.suppress(OSError):
        if os.fsencode(sys.argv[0]) in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"):
            return parent
    return None


def launcher_flag(name: str) -> bool:
    """Return whether an environment variable of the launcher says true."""
    return os.environ.get(name, "false").lower() == "true"
