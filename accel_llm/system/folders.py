"""A model folder that appears whole or not at all, whatever ends the process that writes it."""

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accel_llm.errors import ConfigError
from accel_llm.system.disk import failure, sync

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
        with _ended_by_exception():
            yield partial
        _sync_all(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync(target.parent)
    except Exception as error:
        if told := failure(error):
            raise ConfigError(
                f"output_dir: {target} could not be written: {told}; make room, or name another folder."
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _ended_by_exception() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it has written is cleared."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _sync_all(folder: Path) -> None:
    """Bring a folder and the small files in it to the disk."""
    for path in [*(file for file in folder.rglob("*") if file.is_dir() or file.stat().st_size < SMALL), folder]:
        sync(path)


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
