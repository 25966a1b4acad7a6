"""Settings for libraries that read them when they are imported: import this module above peft and bitsandbytes.

On import, bitsandbytes 0.50 looks for an optional kernel and warns if the kernel is missing. On a CPU with AVX512-BF16
every process would print this line on stderr, before our settings could hide it. We do not use the kernel, because it
has no backward pass (see `keep_gradients` in model/quantization.py). Keep the import in a section of its own, or the
import sorter moves it below peft.

On a GPU torch's memory allocator takes segments that can grow, so that rows of different lengths leave no gaps. It
reads the variable when CUDA starts, which importing bitsandbytes can do. A value that the user has set stays.
"""

import logging
import os
import sys


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
if sys.platform == "linux" and not os.environ.keys() & set(ALLOCATOR_SETTINGS):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
