"""Keeps what is piped into a launch in a file, because all of its processes inherit the same pipe."""

import os
import shutil
import socket
import sys
from pathlib import Path

import psutil
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from accel_llm.system.disk import atomic_file
from accel_llm.system.launcher import is_launched


def spool_standard_input() -> Path:
    """Copy standard input to a file, and return its path.

    All processes of a launch inherit the same pipe. The first process copies all of it to a file with the process id of
    their launcher, and the others read this file. A run without a launcher uses its own process id.
    """
    launcher = psutil.Process(os.getppid() if is_launched() else os.getpid())
    folder = Path(HF_HOME) / "accel_llm" / "stdin" / socket.gethostname()
    folder.mkdir(parents=True, exist_ok=True)
    # Process ids are used again. The hash of a psutil process also depends on the time at which it started.
    spool = folder / f"{launcher.pid}-{hash(launcher)}.jsonl"
    with FileLock(f"{spool}.lock"):
        if not spool.exists():
            # Remove the files of runs that have ended.
            for old in folder.iterdir():
                if not psutil.pid_exists(int(old.name.lstrip(".").split("-")[0])):
                    old.unlink(missing_ok=True)
            with atomic_file(spool) as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
    return spool
