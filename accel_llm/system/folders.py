"""A model folder that appears whole or not at all, whatever ends the process that writes it."""

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accel_llm.errors import ConfigError
from accel_llm.system.disk import disk_failure, sync_to_disk


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place by one rename when the block ends well, and is gone if not.

    All files in it are on the disk before the rename. What a killed process has left behind is cleared at the next start.
    """
    partial, old = hidden_beside(target, "partial"), hidden_beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)  # a process was killed between the two renames below
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(old)
        rename_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def hidden_beside(target: Path, kind: str) -> Path:
    """The hidden name that a folder bears while it is not whole (`partial`), or no longer wanted (`old`)."""
    return target.with_name(f".{target.name}.{kind}")


def rename_into_place(partial: Path, target: Path) -> None:
    """Bring a folder with all that is in it to the disk, then give it its name."""
    for path in [*partial.rglob("*"), partial]:
        sync_to_disk(path)
    partial.rename(target)
    sync_to_disk(target.parent)


@contextmanager
def whole_output(target: Path) -> Iterator[Path]:
    """`whole_folder` for a script that does nothing but write `target`: SIGTERM clears what it has written as well.

    Raises:
        ConfigError: the disk is full, or fails in another way.
    """
    try:
        with _ended_by_exception(), whole_folder(target) as partial:
            yield partial
    except Exception as error:
        if told := disk_failure(error):
            raise ConfigError(
                f"output_dir: {target} could not be written: {told}; make room, or name another folder."
            ) from None
        raise


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


def check_output_dir(target: Path, sources: list[tuple[str, Path]], overwrite: bool, mark: str) -> None:
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
