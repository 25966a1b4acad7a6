"""Decompositions of the base's weights that PEFT computes while it attaches a method: on the GPU, and with a warning.

PEFT 0.21 decomposes a weight where it lies, which is the CPU, because here an adapter is attached before any weight is
moved. For a 7B model that takes hours.
"""

import time
from typing import Any

import accel_llm.system.chatter

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.overrides import TorchFunctionMode

from accel_llm.system.launcher import process_rank

FUNCTIONS = (
    torch.linalg.svd,
    torch.linalg.qr,
    torch.linalg.eigh,
    torch.linalg.inv,
    torch.linalg.pinv,
    torch.linalg.solve,
)
MENTIONED = 60  # seconds


class Decompositions(TorchFunctionMode):
    """Within the block, computes what FUNCTIONS do with matrices on the CPU on `device`, and says if it takes long.

    The results come back to the CPU. `work` is that of all weights together, see `decomposition_work`.
    """

    def __init__(self, method: str, device: torch.device, work: int):
        super().__init__()
        self.method, self.device, self.work, self.timed = method, device, work, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in FUNCTIONS or not args or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        begun = time.perf_counter()
        moved = (each.to(self.device) if isinstance(each, torch.Tensor) else each for each in args)
        result = func(*moved, **(kwargs or {}))
        # Several results are a tuple of a class of their own.
        single = isinstance(result, torch.Tensor)
        result = result.cpu() if single else type(result)(tensor.cpu() for tensor in result)
        if not self.timed:
            self.timed = True
            self._say(time.perf_counter() - begun, _work(*args[0].shape))
        return result

    def _say(self, seconds: float, work: int) -> None:
        minutes = seconds * self.work / work / 60
        if minutes * 60 > MENTIONED and process_rank() == 0:
            print(
                f"method: {self.method} decomposes the base's weights on the {self.device.type.upper()}; the first took "
                f"{seconds:.0f} s, so all take about {minutes:.0f} minutes",
                flush=True,
            )


def decomposition_work(model: nn.Module, config: Any) -> int:
    """Return the work of decomposing each weight that a method's config adapts: that of [m, n] is m n min(m, n).

    It is 0 for PSOFT's `psoft_svd: lowrank`, which decomposes products of the weights with a few columns instead.
    """
    if getattr(config, "target_modules", None) is None or getattr(config, "psoft_svd", None) == "lowrank":
        return 0
    modules = [module for name, module in model.named_modules() if check_target_module_exists(config, name)]
    return sum(_work(*weight.shape) for m in modules if (weight := getattr(m, "weight", None)) is not None)


def _work(*shape: int) -> int:
    return shape[0] * shape[-1] * min(shape)
