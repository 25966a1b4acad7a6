"""Keeps libraries from printing while they are imported: import this above peft and bitsandbytes, in a section of its own.

bitsandbytes 0.50 looks for an optional kernel when it is imported, and warns when the kernel is not there. On a CPU with
AVX512-BF16 each process would start with that line on stderr, before any setting of ours could hide it. The kernel is not
wanted: it has no backward pass (see `shards.keep_gradients`).
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
