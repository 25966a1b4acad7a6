"""A model folder that appears whole or not at all, whatever ends the process that writes it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accel_llm.errors import ConfigError

SMALL = 2**26  # bytes; larger files are brought to the disk by who writes them


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place by one rename when the block ends well, and is gone if not.

    What a process that was killed has left there is cleared at the next start.

    Raises:
        ConfigError: the disk is full.
    """
    partial, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)  # between the two renames below
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"output_dir: there is no room for the model on the disk of {target.parent}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring a folder and the small files in it to the disk."""
    if os.name == "nt":
        return  # Windows opens no folders
    for path in [*(file for file in folder.iterdir() if file.is_file() and file.stat().st_size < SMALL), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def check_target(target: Path, sources: list[tuple[str, Path]], overwrite: bool, mark: str) -> None:
    """Refuse an output_dir whose replacement would lose anything but an earlier result, known by a file named `mark`.

    `sources` are folders that are read, each with what it is.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"output_dir: {target} is a file; name a folder.")
    for what, used in sources:
        if used.exists() and used.resolve().is_relative_to(target):
            raise ConfigError(f"output_dir: {target} holds the {what} that is read; name another folder.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output_dir: {target} is not empty; name another folder, or set overwrite_output_dir.")
    if not (target / mark).is_file():
        kind = "model" if mark == "config.json" else "adapter"
        raise ConfigError(f"output_dir: {target} holds files that are no {kind}; name another folder.")
