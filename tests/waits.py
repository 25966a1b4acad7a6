"""Sees on a CPU what would make the host wait for a GPU.

Copies from the host are seen too if the tensors that would lie on the GPU are named: the results of an operation lie
where one of its arguments does, and new tensors on the host, unless a device is given.
"""

import traceback
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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
# Operators that ask whether they have found a result; and those that copy how the places of sparse numbers are counted.
WAITS |= {aten._linalg_check_errors, aten._linalg_svd, aten._linalg_eigh, aten.linalg_matrix_exp, aten.linalg_lstsq}
WAITS |= {aten._coalesce, aten.sparse_mask}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Copies to the host, which on a CPU are no operations of their own; and copies from it.
TO_HOST = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}
FROM_HOST = {torch.Tensor.to, torch.Tensor.cuda}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
# These read the number of their results from the device, unless it is given.
COUNTED = {torch.repeat_interleave, torch.Tensor.repeat_interleave}


@contextmanager
def noted_waits(*on_device: Any) -> Iterator[list[str]]:
    """Return a list to which every wait in the block is added: what it is, and the file and line of its caller.

    `on_device` are models and batches that would lie on the GPU; without them everything does.
    """
    waits: list[str] = []
    places = Places(on_device)
    with _Calls(waits, places), _Operations(waits, places):
        yield waits


class Places:
    """Knows which tensors would lie on a GPU."""

    def __init__(self, on_device: Iterable[Any]):
        self.known: dict[int, tuple[bool, weakref.ref]] = {}
        self.given = False  # whether the call of the moment names a device
        owners = list(on_device)
        modules = [owner for owner in owners if isinstance(owner, torch.nn.Module)]
        for tensor in tree_leaves([owners, [[*m.parameters(), *m.buffers()] for m in modules]]):
            if isinstance(tensor, torch.Tensor):
                self.put(tensor, True)
        self.everywhere = not self.known

    def put(self, tensor: torch.Tensor, on_device: bool) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        self.known[key] = on_device, weakref.ref(storage, partial(self._forget, key))

    def on_device(self, tensor: torch.Tensor) -> bool:
        return self.everywhere or self.known.get(_storage(tensor)._cdata, (False, None))[0]

    def _forget(self, key: int, _: Any) -> None:
        self.known.pop(key, None)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor if tensor.layout == torch.strided else tensor._values()).untyped_storage()


class _Calls(TorchFunctionMode):
    def __init__(self, waits: list[str], places: Places):
        super().__init__()
        self.waits, self.places = waits, places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, places = kwargs or {}, self.places
        repeats = [value for value in (*args[1:2], kwargs.get("repeats")) if isinstance(value, torch.Tensor)]
        counted = func in COUNTED and repeats and kwargs.get("output_size") is None
        if (func in TO_HOST or counted) and places.on_device(args[0]):
            _note(self.waits, func.__name__)
        device = kwargs.get("device")
        if func in FROM_HOST and not kwargs.get("non_blocking"):
            to = next((value for value in (device, *args[1:]) if isinstance(value, str | torch.device)), None)
            like = any(isinstance(value, torch.Tensor) and places.on_device(value) for value in args[1:])
            if (to is not None or like) and not places.on_device(args[0]):
                _note(self.waits, "a copy of a tensor")
                device = to
        if func in FROM_NUMBERS and not places.everywhere and (device is not None or func is torch.Tensor.new_tensor):
            _note(self.waits, "a copy of numbers")
        before, places.given = places.given, places.given or device is not None
        try:
            result = func(*args, **kwargs)
        finally:
            places.given = before
        if device is not None and isinstance(result, torch.Tensor):
            places.put(result, True)
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[str], places: Places):
        super().__init__()
        self.waits, self.places = waits, places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, places = func.overloadpacket, self.places
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_device = [tensor for tensor in tensors if places.on_device(tensor)]
        indices = [i for i in tree_leaves(args[1]) if isinstance(i, torch.Tensor)] if packet in INDEXING else []
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        added = packet in (aten.add, aten.add_) and len({tensor.layout for tensor in tensors}) == 2
        if on_device and (packet in WAITS or masks or added):
            _note(self.waits, str(packet).removeprefix("aten."))
        copied = packet is aten.copy_ and not places.on_device(args[1])
        if on_device and (copied or not all(map(places.on_device, indices))):
            _note(self.waits, "a copy of a tensor")
        result = func(*args, **(kwargs or {}))
        old = {_storage(tensor)._cdata for tensor in tensors}
        for new in tree_leaves(result):
            if isinstance(new, torch.Tensor) and _storage(new)._cdata not in old:
                places.put(new, bool(on_device) or places.given)
        return result


def _note(waits: list[str], what: str) -> None:
    inner = (__file__, str(Path(torch.__file__).parent))
    callers = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(inner)]
    file = Path(callers[-1].filename)
    waits.append(f"{what} in {file.name}:{callers[-1].lineno}")
