"""The environment variables of the launcher: the rank of this process and the number of processes."""

import os


def is_launched() -> bool:
    """Return whether a launcher (`accelerate launch`, torchrun) started this process, even as the only one."""
    return "RANK" in os.environ


def process_rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
