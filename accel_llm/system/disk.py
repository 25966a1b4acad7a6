"""Files that are whole or not there: written under another name, forced to the disk, and renamed."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What says that it is the disk, not the run, that failed. Libraries in Rust give the number in their text alone.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part of it."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` by one rename when the block ends well, and is gone if not.

    It is on the disk before the rename. Each process writes under a name of its own: two may come to the same file.
    """
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
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def disk_failure(error: BaseException) -> str | None:
    """What the disk says, such as "No space left on device", where `error` or what led to it is its failure."""
    number = disk_errno(error)
    return os.strerror(number) if number else None


def disk_errno(error: BaseException) -> int:
    """The errno of the disk's failure; 0 where `error` is none."""
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        if number is None and (told := re.search(r"\(os error (\d+)\)", str(link))):
            number = int(told[1])
        if number in DISK_ERRNOS:
            return number
        link = link.__cause__ or link.__context__
    return 0
