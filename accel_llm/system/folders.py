"""Folders that are either complete or absent, even if the process that writes them is killed."""

import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accel_llm.errors import ConfigError
from accel_llm.system.disk import disk_failure, sync_to_disk
from accel_llm.system.places import missing_reason
from accel_llm.system.run_lock import check_no_live_run, locked


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Create a hidden folder that is synced and renamed to `target` if the block succeeds, and deleted if it fails.

    An existing `target` is replaced. Leftovers of a process that was killed are removed first.
    """
    # Clean up after a process that was killed.
    partial, old = hidden_sibling(target, "partial"), hidden_sibling(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)  # it was killed between the two renames below
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)

    # Fill the new folder, then put it in the place of the old one.
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)  # before the old folder moves away: a disk can fail here
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync_to_disk(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def hidden_sibling(target: Path, kind: str) -> Path:
    """Return the hidden name of a folder while it is incomplete (kind `partial`) or about to be deleted (`old`)."""
    return target.with_name(f".{target.name}.{kind}")


def sync_folder(folder: Path) -> None:
    """Wait until a folder and all that is in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_to_disk(path)


def rename_into_place(partial: Path, target: Path) -> None:
    """Sync a folder and its content to the disk, then rename it to `target`, which does not exist yet."""
    sync_folder(partial)
    partial.rename(target)
    sync_to_disk(target.parent)


def write_problem(folder: Path) -> str:
    """Try to write in a folder. Return why that fails, as the end of a sentence; empty if it can be written.

    Nothing is left behind. Of a folder that does not exist yet, the nearest folder above is tried.
    """
    try:
        for place in (folder, *folder.parents):
            if place.is_symlink() and not place.exists():
                return missing_reason(folder)
            try:
                # One look: another process of the run may create the folder meanwhile.
                mode = place.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not stat.S_ISDIR(mode):
                return "is a file" if place == folder else f"cannot be created, because {place} is a file"
            with tempfile.TemporaryFile(dir=place, prefix=".try-") as file:
                file.write(bytes(4096))  # a full disk still takes an empty file
                file.flush()
                os.fsync(file.fileno())
            return ""
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


@contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """Like `atomic_folder`, for a script that only writes `target`: SIGTERM also deletes what was written so far.

    Raises:
        ConfigError: the disk is full or failed in another way, or another script writes `target`.
    """
    try:
        with _exit_on_sigterm(), locked(hidden_sibling(target, "lock"), target), atomic_folder(target) as partial:
            yield partial
    except Exception as error:
        if reason := disk_failure(error):
            raise ConfigError(
                f"output_dir: {target} could not be written: {reason}; make room, or name another folder."
            ) from None
        raise


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception within the block, as Ctrl-C is one, so that the block can clean up."""
    # Python allows only the main thread to set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_writable(target: Path) -> None:
    """Check that the folder `target` can be written or replaced. Call it before anything is loaded.

    Raises:
        ConfigError: it cannot be created, or is a file, or belongs to a live run.
    """
    if target.is_file():
        raise ConfigError(f"output_dir: {target} is a file; name a folder.")
    # The new folder is written beside `target` and renamed.
    place = target.parent if target.exists() else target
    if problem := write_problem(place):
        raise ConfigError(f"output_dir: {place} {problem}; name another folder.")
    check_no_live_run(target, whole=True)


def check_output_dir(target: Path, sources: list[tuple[str, Path]], overwrite: bool, mark: str) -> None:
    """Check that writing `target` destroys nothing but an earlier result, which is recognized by a file named `mark`.

    `sources` are the folders that the script reads, as (what it is, path).

    Raises:
        ConfigError: `target` cannot be written, contains a source, is not empty without `overwrite`, or lacks `mark`.
    """
    check_writable(target)
    if not target.exists():
        return
    # No folder that the script reads.
    for what, source in sources:
        if source.exists() and source.resolve().is_relative_to(target):
            raise ConfigError(f"output_dir: {target} holds the {what} that is read; name another folder.")

    # A folder with files: only if the user asked for it, and only if it holds a result of this kind.
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output_dir: {target} is not empty; name another folder, or set overwrite_output_dir.")
    if not (target / mark).is_file():
        kind = {"config.json": "a model", "Modelfile": "an export"}.get(mark, "an adapter")
        raise ConfigError(f"output_dir: {target} holds files that are not {kind}; name another folder.")
