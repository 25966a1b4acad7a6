"""Which messages of the libraries reach the screen."""

import logging
import os
import warnings

from accel_llm.backend.strategy import use_cpu
from accel_llm.system.launcher import process_rank


def quiet_libraries() -> None:
    """Silence the messages of libraries about themselves; warnings about a run come from this project."""
    if use_cpu():
        # Otherwise DeepSpeed prints at import that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes", "httpx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if process_rank() == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|accelerate|torch|bitsandbytes|peft|transformers)\b")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
