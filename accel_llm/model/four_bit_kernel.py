"""Corrects the functions of bitsandbytes that unpack 4-bit weights on a CPU."""

import ctypes
from collections.abc import Callable
from typing import Any

import accel_llm.system.chatter

from bitsandbytes.cextension import lib


def correct_cpu_unpacking() -> None:
    """Let this process unpack 4-bit weights on a CPU with the right scales.

    On a CPU with AVX-512, bitsandbytes 0.50.2 takes wrong scales where the width of a matrix is a multiple of 32 but
    not of the block size: a row then ends inside a block, which the next row goes on with. For widths such as 96 the
    unpacked weights are 20% off, in training, chat and merge alike. As one row of the same numbers they are right.
    """
    for kind in ("nf4", "fp4"):
        for dtype in ("fp32", "bf16", "fp16"):
            name = f"cdequantize_blockwise_cpu_{kind}_{dtype}"
            setattr(lib, name, _unpacking_whole_blocks(getattr(lib, name)))


def _unpacking_whole_blocks(unpack: Callable) -> Callable:
    def unpack_whole_blocks(packed: Any, scales: Any, out: Any, blocksize: Any, rows: Any, width: Any) -> None:
        if width.value % blocksize.value:
            rows, width = ctypes.c_longlong(1), ctypes.c_longlong(rows.value * width.value)
        unpack(packed, scales, out, blocksize, rows, width)

    return unpack_whole_blocks
