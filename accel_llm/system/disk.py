"""Files that are whole or not there: written under another name, forced to the disk, and renamed."""

import contextlib
import errno
import hashlib
import os
import re
from pathlib import Path

# What says that it is the disk, not the run, that failed. Libraries in Rust give the number in their text alone.
FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part of it."""
    # A name of its own for each process: two may come to the same end of the same run.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
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


def failure(error: BaseException) -> str | None:
    """What the disk says, such as "No space left on device", where `error` or what led to it is its failure."""
    number = failure_number(error)
    return os.strerror(number) if number else None


def failure_number(error: BaseException) -> int:
    """The errno of the disk's failure; 0 where `error` is none."""
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        if number is None and (told := re.search(r"\(os error (\d+)\)", str(link))):
            number = int(told[1])
        if number in FAILURES:
            return number
        link = link.__cause__ or link.__context__
    return 0
