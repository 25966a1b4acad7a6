"""Which messages of the libraries reach the screen, and which end the run.

A warning or a message of a logger is one of three. CHATTER is hidden: a short list, each with its reason. A message of
which WRONG_NUMBERS has a part is an error of the run. Anything else is shown once, by the main process, as one line.
"""

import importlib
import logging
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

from accel_llm.backend.strategy import use_cpu
from accel_llm.errors import ConfigError
from accel_llm.system.launcher import launcher_flag, process_rank

# Patterns of messages on which no user can act, and why.
CHATTER = {
    r"MatMul8bitLt: inputs will be cast": "the 8-bit product of bitsandbytes takes float16, whatever the precision is",
    r"[Mm]erge lora module to [48]-bit linear may get different": "merge/verify.py measures that difference",
    r"(rank|alpha)_pattern keys did not match any targeted module and were ignored: \['\.\*\\+\.\w+'\]": (
        "PEFT wrote these keys itself, for the experts of a mixture; it looks for them among the modules only"
    ),
    r"rank_pattern keys did not match any targeted module and were ignored: \['[\w.]+\.lora_E'": (
        "AdaLoRA's pattern has the names of its weights; PEFT looks for them among the modules, and still uses it"
    ),
    r"fan_in_fan_out is set to \w+ but the target module is": "PEFT corrects it itself",
    r"Unsupported layer type .*Norm.* encountered": "PEFT's ln_tuning trains a copy of the layer, whatever it computes",
    r"ZeRO with an untested optimizer": "tests/proofs/matrix.py tests each of them",
    r"Mismatch dtype between input and weight.*fused": "the product that is not fused gives the same numbers",
    r"`use_cache=True` is incompatible with (gradient|activation) checkpointing": "training needs no cache",
    r"Detected call of `lr_scheduler.step\(\)` before": "the schedule counts skipped steps too",
    r"No device id is provided via `init_process_group`": "there is one device for each process",
    r"Token indices sequence length is longer": "data/limits.py counts rows that are too long, and says so",
    r"`tie_word_embeddings=True` and (a tied layer|the tied_target_modules)": "merge/ unties them, and verifies it",
    r"so we will NOT tie them": "model/config_file.py says it in a sentence of its own",
    r"`tokenizer_class` is `\w+` but `tokenizer.json` is": "model/tokenizer_file.py keeps to tokenizer.json anyway",
    r"LOAD REPORT.*(MISSING|MISMATCH)": "model/loading.py reads the same report and refuses such a model",
}
# Parts of messages of torch, transformers, PEFT and bitsandbytes that tell of wrong numbers.
WRONG_NUMBERS = (
    # Products and layers without a backward pass.
    r"autograd kernel was not registered",
    r"silently (incorrect|wrong)",
    r"(not|non-)\s?differentiable",
    r"None of the inputs have requires_grad=True",
    r"(wrong|incorrect|inaccurate) gradients",
    r"Gradients cannot flow",
    # Weights that do not come from the files.
    r"newly initialized",
    r"not initialized from the model checkpoint",
    r"lead to reinitialization",
    r"[Mm]issing (adapter )?keys",
    r"checkpoint seems? corrupted",
    r"(size|shape) mismatch",
    r"has not been properly dequantized",
    r"quantization state not initialized",
    # Settings of an adapter that are not in force.
    r"did not match any targeted module",
    r"no (module|parameter) was matched",
    # Weights and values of different dtypes.
    r"[Mm]ismatch(ed)? (of |in )?(the )?d?types?\b",
    r"d?types? mismatch",
)
LIBRARIES = ("torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "DeepSpeed")
LONGEST = 300  # characters of a message on the screen


def quiet_libraries() -> None:
    """Let messages of libraries reach the screen once and as one line, without chatter; some become a ConfigError.

    The ConfigError is raised where the library warns.
    """
    if use_cpu():
        # Otherwise DeepSpeed prints at import that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    # Python's warnings. How libraries call each other is not for users: a deprecation does not change a number.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for pattern in CHATTER:
        warnings.filterwarnings("ignore", message=f"(?s).*{pattern}")
    warnings.showwarning = _show_warning

    # Loggers: all of them pass their messages on to one handler.
    if launcher_flag("ACCELERATE_USE_DEEPSPEED"):
        importlib.import_module("deepspeed")  # adds a handler of its own
    for name in list(logging.Logger.manager.loggerDict):
        if name.split(".")[0] in LIBRARIES:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
    root = logging.getLogger()
    if _handler not in root.handlers:
        root.addHandler(_handler)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    parts = Path(filename).parts
    inside = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-1:]
    _report(inside[0].removesuffix(".py"), str(message))


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _report(record.name.split(".")[0], record.getMessage())


_handler = _Handler(logging.WARNING)
_shown: set[str] = set()


def _report(library: str, message: str) -> None:
    """Hide, raise or show a message of `library`.

    Raises:
        ConfigError: the message tells of wrong numbers.
    """
    text = " ".join(message.split())
    if any(re.search(pattern, text) for pattern in CHATTER):
        return
    short = textwrap.shorten(text, LONGEST, placeholder=" ...")
    if any(re.search(pattern, text) for pattern in WRONG_NUMBERS):
        reason = short.rstrip(".")
        raise ConfigError(f"{library}: {reason} (the run stops at such a warning, because its numbers could be wrong).")
    if short not in _shown and process_rank() == 0:
        _shown.add(short)
        print(f"{library} warns: {short}", file=sys.stderr, flush=True)
