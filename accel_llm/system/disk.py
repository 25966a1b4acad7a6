"""Files that are either complete or absent (written under a temporary name, synced, renamed), and disk errors."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# errno values of a failing disk.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def write_atomically(path: Path, text: str) -> None:
    """Write a text file at once: readers see the old file or the new one, never a part of it.

    Half a surrogate pair, which UTF-8 cannot hold, becomes its escape `\\ud800`, as JSON writes it.
    """
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is synced and renamed to `path` if the block succeeds, and deleted if it fails."""
    # The process id keeps two processes that write the same file apart.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk. Windows syncs no folders."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY)
    elif path.is_dir():
        return
    else:
        handle = os.open(path, os.O_RDWR)  # Windows syncs only what may be written
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def disk_failure(error: BaseException) -> str | None:
    """Return the disk's message, such as "No space left on device", if `error` or one of its causes is a disk error."""
    number = disk_errno(error)
    return os.strerror(number) if number else None


def disk_errno(error: BaseException) -> int:
    """Return the errno of the disk error in `error` or its chain of causes; 0 if there is none."""
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        # Libraries written in Rust put the number only in the message.
        if number is None and (match := re.search(r"\(os error (\d+)\)", str(link))):
            number = int(match[1])
        if number in DISK_ERRNOS:
            return number
        link = link.__cause__ or link.__context__
    return 0
