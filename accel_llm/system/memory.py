"""Gives memory back to the system: freed blocks, and pages of files that have been read (Linux only)."""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Constants of Linux' madvise(2) and of glibc's mallopt(3).
MADV_DONTNEED, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 4, -1, -3


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within the block, give the memory of freed tensors back to the system at once.

    By default glibc keeps freed blocks below 32 MiB for later use. While a model is loaded, such blocks lie between
    weights that stay, and they would add up to several layers of unused memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)  # musl does not have it
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 2**20)
    yield
    # The values that glibc's own adjustment reaches in any training.
    mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_TRIM_THRESHOLD, 2**26)


def release_pages(tensor: torch.Tensor) -> None:
    """Drop the pages of a memory-mapped .safetensors file that `tensor` was read from.

    A file stays mapped as long as one of its tensors exists. Until then all pages that were read would stay in memory,
    and under ZeRO-3's broadcasts even copies of them.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    # Only pages that lie completely inside the tensor.
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and any(low <= first and last <= high for low, high in _mapped_weight_files()):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)


def _mapped_weight_files() -> list[tuple[int, int]]:
    """Return the first and the last address of each mapped .safetensors file of this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]
