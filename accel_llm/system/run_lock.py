"""Keeps a second start out of an output folder while a run lives in it.

Each process of a run holds one byte of a hidden file in the folder, and a new run must get all bytes. These locks
(fcntl's, by ranges of bytes) end with the process that holds them, however it ends. They hold between machines that
share the file system, and processes that a run forks or starts do not inherit them. The text in the file is for people
only: host, process and start of the run. Windows has no such locks, so there nothing keeps a second start out.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accel_llm.errors import ConfigError
from accel_llm.system.launcher import process_rank

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows
    import fcntl

LOCK_NAME = ".run.lock"
# Files of a run in its folder. run.json is removed last: without it the other files would look like somebody else's.
RUN_FILES = ("metrics.jsonl", "answers.jsonl", "checkpoints", "adapter", "model", "report.html", "logs", "run.json")
ALL_BYTES = 1 << 20  # more than a run has processes
# The answers of file systems without locks, such as some that show a cloud storage as a folder.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
# The files that this process holds, and the folders that were created for each. Each is opened once: the locks of a
# file are gone as soon as its process closes any handle of it.
_held: dict[Path, tuple[int, list[Path]]] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


def lock_output_dir(folder: Path) -> None:
    """Keep other runs out of `folder` until this process ends or calls `release_locks`. It is created if need be.

    The main process of a run calls it before it reads or writes there; after that the others call `share_lock`.

    Raises:
        ConfigError: a run lives in the folder, or would lose files by this one.
    """
    check_no_live_run(folder)
    _hold(folder.resolve() / LOCK_NAME, folder)


@contextlib.contextmanager
def locked(path: Path, target: Path, field: str = "output_dir") -> Iterator[None]:
    """Hold the lock file `path` while a script writes `target`, so that no second one writes it too.

    `field` is the option that names `target`: a folder, or a file if it is `output_file`.

    Raises:
        ConfigError: another script writes it.
    """
    _hold(path.resolve(), target, field)
    try:
        yield
    finally:
        _release(path.resolve())


def _hold(path: Path, target: Path, field: str = "output_dir") -> None:
    if path in _held:
        return
    created = [place for place in path.parents if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free = _try_to_lock(handle, fcntl.LOCK_EX)
        # The last run removes its file at its end. A lock on a file that nobody finds any more keeps nobody out.
        if free and path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)
        if not free:
            raise _in_use(target, path, field)
    _held[path] = handle, created
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "created": [str(place) for place in created],
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)
    # From here on byte 0 keeps other runs out, and each further process of this run takes a byte of its own.
    with contextlib.suppress(OSError):
        fcntl.lockf(handle, fcntl.LOCK_UN, ALL_BYTES - 1, 1)


def _try_to_lock(handle: int, kind: int) -> bool:
    """Lock all bytes. Return False if a process holds one of them, True also if the file system has no locks."""
    for _ in range(3):  # the holder may be somebody who only looks, or who has not yet written who it is
        try:
            fcntl.lockf(handle, kind | fcntl.LOCK_NB, ALL_BYTES)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return True
        time.sleep(0.1)
    return False


def share_lock(folder: Path) -> None:
    """Hold the lock of a run's folder in a further process of the run too: it lasts until the last of them ends."""
    path = folder.resolve() / LOCK_NAME
    # On another machine without a shared file system there is no such file.
    if fcntl is None or process_rank() == 0 or path in _held or not path.exists():
        return
    handle = os.open(path, os.O_RDWR)
    _held[path] = handle, [Path(place) for place in json.loads(path.read_text(encoding="utf-8"))["created"]]
    with contextlib.suppress(OSError):  # no locks on this file system
        fcntl.lockf(handle, fcntl.LOCK_EX, 1, process_rank())


def check_no_live_run(folder: Path, whole: bool = False) -> None:
    """Check that to write a run in `folder` takes nothing from a live run: not there, nor around it, nor in it.

    With `whole` the folder is replaced with all that is in it, and not only the files of a run.

    Raises:
        ConfigError: a live run would lose files.
    """
    folder = folder.resolve()
    inside = folder.rglob(LOCK_NAME) if whole else (folder / name / LOCK_NAME for name in RUN_FILES)
    around = (place for place in folder.parents if folder.relative_to(place).parts[0] in RUN_FILES)
    for path in (folder / LOCK_NAME, *(place / LOCK_NAME for place in around), *inside):
        if fcntl and path not in _held and _is_held_by_others(path):
            raise _in_use(path.parent, path)


def _is_held_by_others(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # there is none, or it belongs to somebody whose files are safe from this process
        return False
    try:
        return not _try_to_lock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _in_use(target: Path, path: Path, field: str = "output_dir") -> ConfigError:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        elsewhere = holder["host"] != socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError):
        who, elsewhere = "another process", False
    gone = f"; if that machine is gone, delete {path}" if elsewhere else ""
    kind = "file" if field == "output_file" else "folder"
    return ConfigError(f"{field}: {target} is in use by {who}; wait for its end, or name another {kind}{gone}.")


def release_locks() -> None:
    """Release the locks of this process. The last process of a run removes the file, and what was created for it."""
    for path in [*_held]:
        _release(path)


def _release(path: Path) -> None:
    if path not in _held:
        return
    handle, created = _held.pop(path)
    with contextlib.suppress(OSError):  # another process of the run lives, or a folder holds something
        fcntl.lockf(handle, fcntl.LOCK_UN, ALL_BYTES)  # otherwise two that end together would wait for each other
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, ALL_BYTES)
        path.unlink()
        for place in created:
            place.rmdir()
    os.close(handle)
