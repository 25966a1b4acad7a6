"""Sees on a CPU what would make the host wait for a GPU, but for copies from the host, which only a GPU shows."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The value of a tensor as a number or a bool; then results whose size depends on the values.
WAITS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select}
WAITS |= {aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Copies to the host, which on a CPU are no operations of their own.
TO_HOST = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}
# These read the number of their results from the device, unless it is given.
COUNTED = {torch.repeat_interleave, torch.Tensor.repeat_interleave}


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    """Return a list to which every wait in the block is added: what it is, and the file and line of its caller."""
    waits: list[str] = []
    with _Calls(waits), _Operations(waits):
        yield waits


class _Calls(TorchFunctionMode):
    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        repeats = [value for value in (*args[1:2], kwargs.get("repeats")) if isinstance(value, torch.Tensor)]
        counted = func in COUNTED and repeats and kwargs.get("output_size") is None
        if func in TO_HOST or counted:
            _note(self.waits, func.__name__)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = packet in INDEXING and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in tree_leaves(args[1])
        )
        if packet in WAITS or masks:
            _note(self.waits, str(packet).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def _note(waits: list[str], what: str) -> None:
    inner = (__file__, str(Path(torch.__file__).parent))
    callers = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(inner)]
    file = Path(callers[-1].filename)
    waits.append(f"{what} in {file.name}:{callers[-1].lineno}")
