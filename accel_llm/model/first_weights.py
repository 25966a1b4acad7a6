"""Draws the weights of a fresh model layer by layer, the same for the same seed on every strategy and number of processes.

transformers asks a family for each of its modules how the weights begin (`_init_weights`), children before parents. Here
the model is built without data first, and these calls are made once to see which weights each of them writes. Later they
are made again for the weights of one layer at a time, when that gets its data. Each weight is drawn from a seed of its
own, made of the run's seed and its name, on the CPU and in float32: so its bits depend neither on what was drawn before
nor on who draws. The rules are the family's own, so the distribution is that of transformers.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import accel_llm.system.chatter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS, guard_torch_init_functions

DRAWN = "_is_hf_initialized"  # transformers' own mark: its functions leave a tensor that has it as it is


@dataclass(frozen=True)
class Call:
    """One call of a family's `_init_weights` for a module, and the names of the parameters and buffers it writes.

    `tied` are those that it writes too, but that take their values from another one: the weight of an output projection
    that is that of the embedding.
    """

    owner: PreTrainedModel
    module: nn.Module
    written: tuple[str, ...]
    tied: tuple[str, ...]
    padding_idx: int | None  # of an embedding: its row begins at zero


class FirstWeights:
    """The first weights of `model`, for a seed; `draw` gives them to some of its modules.

    `model` must be on the device `meta`, its weights not tied yet (`no_tie_weights` of transformers): they are tied here,
    because transformers ties them after it has drawn them.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.seed = seed
        calls = list(_calls(model))
        tensors = {name: getattr(*places[0]) for name, places in _owners(model).items()}
        model.tie_weights(recompute_mapping=False)
        self.owners = _owners(model)
        # After tying, a weight may have another name; one that has become another weight has none.
        kept = {id(getattr(*places[0])): name for name, places in self.owners.items()}
        renamed = {name: kept.get(id(tensor)) for name, tensor in tensors.items()}
        sources = model.all_tied_weights_keys
        self.calls_of: dict[str, list[Call]] = defaultdict(list)
        for call in calls:
            written = tuple(new for name in call.written if (new := renamed[name]))
            lost = (renamed[sources[name]] for name in call.written if renamed[name] is None)
            call = replace(call, written=written, tied=tuple(name for name in lost if name and name not in written))
            for name in written:
                self.calls_of[name].append(call)
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, places in self.owners.items():
            for module, _ in places:
                self.names[module].append(name)

    def unknown(self) -> list[str]:
        """Return the names of the weights and buffers of which the family does not say how they begin."""
        return [name for name in self.owners if name not in self.calls_of]

    def draw(self, modules: Iterable[nn.Module]) -> None:
        """Give data to the parameters and buffers directly in `modules`, on the CPU; those that have data stay."""
        names = [name for module in modules for name in self.names.get(module, ())]
        names = [name for name in dict.fromkeys(names) if self._tensor(name).is_meta]
        for name in names:
            self._allocate(name)
        for name in names:
            for call in self.calls_of[name]:
                others = [self._tensor(other) for other in (*call.written, *call.tied) if other != name]
                with _padding_row(call), _marked(others), _seeded(self.seed, name):
                    call.owner._init_weights(call.module)
            if self._tensor(name).isnan().any():
                raise RuntimeError(f"{type(self.calls_of[name][0].owner).__name__} has not drawn all of {name}")

    def _tensor(self, name: str) -> torch.Tensor:
        return getattr(*self.owners[name][0])

    def _allocate(self, name: str) -> None:
        """Replace a tensor without data by one with room for it; a parameter stays the same object wherever it is used."""
        old = self._tensor(name)
        empty = torch.full(old.shape, math.nan if old.is_floating_point() else 0, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(empty, requires_grad=old.requires_grad)
            torch.utils.swap_tensors(old, new)
            return
        for module, attribute in self.owners[name]:
            module._buffers[attribute] = empty


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return for the name of each parameter and buffer the modules that have it, with its name there."""
    names: dict[int, str] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = names.setdefault(id(tensor), f"{prefix}.{attribute}".lstrip("."))
                owners[name].append((module, attribute))
    return dict(owners)


def _calls(model: PreTrainedModel) -> Iterator[Call]:
    """Yield the calls that transformers makes for a new model, in its order, without those that write nothing."""
    names = {getattr(*places[0]).untyped_storage()._cdata: name for name, places in _owners(model).items()}
    for module, owner in _in_order(model, model):
        writes = _Writes()
        with writes, _noted(writes), torch.no_grad(), guard_torch_init_functions():
            owner._init_weights(module)
        if written := tuple(names[place] for place in dict.fromkeys(writes.storages) if place in names):
            yield Call(owner, module, written, (), getattr(module, "padding_idx", None))


def _in_order(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Yield each module after its children, with the model inside which it is: a part may be a model of its own."""
    for child in module.children():
        yield from _in_order(child, child if isinstance(child, PreTrainedModel) else owner)
    yield module, owner


class _Writes(TorchDispatchMode):
    """Within the block, note the storages that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = given.get(argument.name)
                tensors = value if isinstance(value, list | tuple) else [value]
                self.storages += [t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@contextmanager
def _noted(writes: _Writes) -> Iterator[None]:
    """Within the block, note what torch.nn.init is asked to write: without data some of its functions write nothing."""

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def note(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            writes.storages.append(tensor.untyped_storage()._cdata)
            return function(tensor, *args, **kwargs)

        return note

    before = dict(TORCH_INIT_FUNCTIONS)
    TORCH_INIT_FUNCTIONS.update({name: noting(function) for name, function in before.items()})
    try:
        yield
    finally:
        TORCH_INIT_FUNCTIONS.update(before)


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Within the block, draw on the CPU from a seed that the run's seed and the name of a weight give."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    try:
        with torch.no_grad(), guard_torch_init_functions():
            yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _marked(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Within the block, tensors of other layers look as if they had been drawn, so they are left alone."""
    for tensor in tensors:
        setattr(tensor, DRAWN, True)
    try:
        yield
    finally:
        for tensor in tensors:
            delattr(tensor, DRAWN)


@contextmanager
def _padding_row(call: Call) -> Iterator[None]:
    """Within the block, an embedding has the padding row that it was built with; training has taken it away."""
    if call.padding_idx is None:
        yield
        return
    module: Any = call.module
    before, module.padding_idx = module.padding_idx, call.padding_idx
    try:
        yield
    finally:
        module.padding_idx = before
