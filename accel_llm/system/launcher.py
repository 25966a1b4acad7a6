"""What the launcher says in the environment: which process this is, and how many there are."""

import os


def is_launched() -> bool:
    """Whether a launcher started this process, be it as the only one."""
    return "RANK" in os.environ


def process_rank() -> int:
    """The number of this process, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
