"""Says where memory ran out, on a device or on the host, what was expected to be taken, and what saves most."""

import contextlib
import errno
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch

# Texts of torch, CUDA, NCCL, cuBLAS and the C++ library in errors without a type of their own: `torch.empty` on the
# host, pinned memory, a CUDA context, a mapped file. bitsandbytes 0.50.2 raises nothing: where its paged memory cannot
# be had, it prints a line and ends the process.
ON_HOST = re.compile(r"DefaultCPUAllocator|unable to mmap|Cannot allocate memory|bad_alloc|bad allocation")
ON_DEVICE = re.compile(r"out of memory|_ALLOC_FAILED")

# Where a run is, by the function that it is in: the stem of its file, or `script` for one in launch/, and its name. In
# braces are local variables of the function, and `step` also of those around it. The innermost of PLACES counts, and
# inside `script.train` the innermost of STEP_PLACES.
PLACES = {
    "setup.encode_chats": "while the rows were encoded",
    "setup.encode_documents": "while the rows were encoded",
    "setup.assemble_model": "while the model was loaded",
    "placement.place_weights": "while the weights were read",
    "placement.materialize_weights": "while the weights of {module} were read",
    "setup.optimizer_and_schedule": "while the optimizer was built",
    "accelerator.prepare": "while the model was prepared",
    "preflight.preflight": "in the checks at the start",
    "rehearsal._take_step": "in a try of the longest rows before the first step",
    "rehearsal._evaluate": "in a try of the evaluation before the first step",
    "rehearsal._save_and_reload": "in a try of a checkpoint before the first step",
    "checkpoints.resume": "while the checkpoint was loaded",
    "script.train": "in step {step}",
    "evaluation.at_start": "in the evaluation before the first step",
    "evaluation.when_due": "in the evaluation after step {step}",
    "evaluation.at_end": "in the last evaluation (the trained model is complete in {exported})",
    "checkpoints._save": "while the checkpoint of step {step} was saved",
    "checkpoints._write_in_background": "while a checkpoint was written",
    "export.export_model": "in the export",
}
STEP_PLACES = {
    "loss.next_token_loss": "in the forward pass of step {step}",
    "accelerator.backward": "in the backward pass of step {step}",
    "loop.clip_gradients": "while the gradients of step {step} were clipped",
    "optimizer.step": "in the optimizer's step {step}",
    "engine.step": "in the optimizer's step {step}",  # DeepSpeed's, inside of the backward pass
}


@dataclass
class MemoryAdvice:
    """What a run knows about its memory: training/memory_advice.py fills it in.

    `complete` does the part of it that takes seconds, which only a failure is worth.
    """

    device_type: str = ""  # where it trains
    estimate: str = ""  # the terms of one device and their sum
    for_training: str = ""  # the settings that save most on the device, with their gain
    for_evaluation: str = ""
    for_host: str = ""
    complete: Callable[[], None] | None = None


memory_advice = MemoryAdvice()


def memory_failure(error: BaseException) -> str | None:
    """Return the sentence with which a script ends if `error` says that memory ran out, see `memory_reason`; else None."""
    reason = memory_reason(error)
    if reason is None:
        return None
    if not memory_advice.device_type:
        return f"{reason}."
    return f"{reason}; with such a change the run continues from its last whole checkpoint, if there is one."


def memory_reason(error: BaseException) -> str | None:
    """Return where memory ran out, and what helps, if `error` or one of its causes says that it did; else None.

    The tensors of the functions that have ended by the error are freed.
    """
    if not ran_out_of_memory(error):
        return None
    links = list(_causes(error))
    lack = next(link for link in links if _kinds(link))
    if not hasattr(lack, "memory_reason"):  # the first time; run.json and the screen say the same
        tracebacks = [link.__traceback__ for link in links[: links.index(lack) + 1]]
        place = _place(tracebacks)
        observed = _describe(lack, place)
        for frames in tracebacks:
            traceback.clear_frames(frames)
        lack.memory_reason = "; ".join([observed, *_advice(lack, place)])  # type: ignore[attr-defined]
    return lack.memory_reason  # type: ignore[attr-defined]


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` or one of its causes says that memory ran out."""
    return any(_kinds(link) for link in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and its causes, also those that another error has replaced by `from None`."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _kinds(error: BaseException) -> tuple[str, ...]:
    """Return where the memory was that ran out, "device" or "host", or both if the error leaves it open; else ()."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return ("device",)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return ("host",)
    if not isinstance(error, RuntimeError):
        return ()
    if ON_HOST.search(text):
        return ("host",)
    # "CUDA error: out of memory" is CUDA's own: it may also be that host memory could not be pinned.
    return (("device", "host") if "CUDA error" in text else ("device",)) if ON_DEVICE.search(text) else ()


def _place(tracebacks: list[TracebackType | None]) -> str:
    """Return in words where the errors with these tracebacks, the outermost first, were raised; "" if nobody knows."""
    place, function, step = "", "", {}
    for frame, _ in chain.from_iterable(map(traceback.walk_tb, tracebacks)):
        name = _function_name(frame)
        words = PLACES.get(name) or (STEP_PLACES.get(name) if function == "script.train" else None)
        if words is None:
            continue
        function = name if name in PLACES else function
        values = step | _printable_locals(frame)
        step = {"step": values["step"]} if "step" in values else {}
        with contextlib.suppress(KeyError):  # the function had not got that far
            place = words.format_map(values)
    return place


def _printable_locals(frame: FrameType) -> dict[str, Any]:
    """Return the local variables of a function; a `module` of its `model` becomes its name there."""
    values = dict(frame.f_locals)
    if {"model", "module"} <= values.keys():
        names = (name for name, module in values["model"].named_modules() if module is values["module"])
        values["module"] = next(names, "") or "the model"
    return values


def _function_name(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'script' if path.parent.name == 'launch' else path.stem}.{frame.f_code.co_name}"


def _describe(error: BaseException, place: str) -> str:
    """Return where memory ran out, how much was needed, and how much there is."""
    kinds, text = _kinds(error), str(error)
    states = {"device": _device_state(text), "host": _host_state()}
    where = " or ".join(f"the {kind}" for kind in kinds)
    first = f"Out of memory on {where}{place and ' '}{place}{_requested(text)}"
    return "; ".join([first, *(states[kind] for kind in kinds if states[kind])])


def _advice(error: BaseException, place: str) -> list[str]:
    """Return what was estimated and what helps, as far as the run has said it."""
    advice = memory_advice
    # On a CPU the host is the device that is trained on.
    if "device" not in _kinds(error) and advice.device_type != "cpu":
        return [advice.for_host] if advice.for_host else []
    if advice.complete is not None:
        with contextlib.suppress(Exception):  # it is advice, and memory is short
            advice.complete()
    texts = (advice.estimate, advice.for_evaluation if "evaluation" in place else advice.for_training)
    return [text for text in texts if text]


def _requested(text: str) -> str:
    """Return how much more was needed, from the text of an error, as in "Tried to allocate 20.00 MiB"."""
    match = re.search(r"allocate (\d[\d.]*) ([KMGT]?i?B|bytes)", text)
    if match is None:
        return ""
    needed = as_gb(int(match[1])) if match[2] == "bytes" else f"{match[1]} {match[2].replace('i', '')}"
    return f", where {needed} more were needed"


def _device_state(text: str) -> str:
    """Return what is taken and free on this process's device; `text` is the error's, which knows of a limit."""
    if not torch.cuda.is_initialized():
        return ""
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    allowed = re.search(r"([\d.]+ [KMGT]iB) allowed", text)
    limit = f", {allowed[1].replace('i', '')} of which this process may take" if allowed else ""
    return (
        f"cuda:{index} has {as_gb(total)}{limit}, {as_gb(free)} are free, and this process holds "
        f"{as_gb(torch.cuda.memory_reserved(index))}, {as_gb(torch.cuda.memory_allocated(index))} of it in tensors"
    )


def _host_state() -> str:
    memory, process = psutil.virtual_memory(), psutil.Process()
    limits = [process.rlimit(kind)[0] for kind in (psutil.RLIMIT_AS, psutil.RLIMIT_DATA)] if psutil.LINUX else []
    finite = [limit for limit in limits if 0 <= limit < memory.total]
    limit = f" and may take {as_gb(min(finite))} (ulimit)" if finite else ""
    return (
        f"the machine has {as_gb(memory.total)}, {as_gb(memory.available)} are free, and this process holds "
        f"{as_gb(process.memory_info().rss)}{limit}"
    )


def as_gb(size: float) -> str:
    """Return a number of bytes as text in GB (2^30 bytes, as the sizes of GPUs), or in MB below a tenth of one."""
    return f"{size / 2**30:.2f} GB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MB"
