"""Memory that goes back to the system: freed blocks, and pages of files that have been read."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of Linux' madvise(2) and of glibc's mallopt(3)
MADV_DONTNEED, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 4, -1, -3


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Freed tensors go back to the system at once.

    glibc keeps blocks below 32 MiB that are freed for those to come; between weights that stay, whole layers of holes were
    left so.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)  # musl has none
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 2**20)
    yield
    # Where glibc's own adjustment arrives in any training.
    mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_TRIM_THRESHOLD, 2**26)


def release_pages(tensor: torch.Tensor) -> None:
    """Give back the pages of a checkpoint's file that `tensor` has been read from.

    The map of a file ends with the last tensor in it; until then what was read would stay in memory, and under ZeRO-3's
    broadcasts even as copies.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and any(low <= first and last <= high for low, high in _mapped_weight_files()):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def _mapped_weight_files() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]
