"""Silences a warning that bitsandbytes prints when it is imported: import this module above peft and bitsandbytes.

On import, bitsandbytes 0.50 looks for an optional kernel and warns if the kernel is missing. On a CPU with AVX512-BF16
every process would print this line on stderr, before our settings could hide it. We do not use the kernel, because it
has no backward pass (see `keep_gradients` in model/quantization.py). Keep the import in a section of its own, or the
import sorter moves it below peft.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
