"""What each engine holds of the trained weights and of the optimizer's state: the one form in which all are saved.

Whatever an engine does with a parameter, a process holds a range of its elements: all of them under DDP, some rows under
FSDP2, a stretch of DeepSpeed's flat partitions. So what one engine has saved another one can load, on any number of processes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from accel_llm.backend.accelerator import local_part, unwrap_model, unwrap_optimizer
from accel_llm.checkpoint.pieces import WEIGHT, WHOLE, Piece, PieceReader, Share
from accel_llm.errors import ConfigError
from accel_llm.system.tensors import DTYPE_NAMES, DTYPES_BY_NAME


def local_shares(accelerator: Accelerator, model: Any, optimizer: Any) -> list[Share]:
    """All that is trained on this process.

    Raises:
        ConfigError: DeepSpeed runs without ZeRO.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        _reshard(model)
    named = unwrap_model(accelerator, model).named_parameters()
    names = {parameter: name for name, parameter in named if parameter.requires_grad}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = optimizer.optimizer
        if hasattr(engine, "fp32_partitioned_groups_flat"):
            return list(_of_zero3(engine, names, accelerator.process_index))
        if hasattr(engine, "single_partition_of_fp32_groups"):
            return list(_of_zero2(engine, names, accelerator.process_index))
        raise ConfigError(
            "zero_optimization.stage: 0 keeps no checkpoints here; give stage 1, 2 or 3, or use ddp.yaml."
        )
    return [_of_parameter(parameter, name) for parameter, name in names.items()]


def _reshard(model: torch.nn.Module) -> None:
    """After a forward pass without a backward one FSDP2 has whole parameters in the place of some shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _of_parameter(parameter: Any, name: str) -> Share:
    """A whole parameter, or the rows of it that FSDP2 leaves here."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return Share(name, parameter, parameter.detach().view(-1), [Piece(name, 0, 0, parameter.numel())])
    local = local_part(parameter.detach())
    rows, width = parameter.shape[0], parameter.shape[1:].numel()
    mesh = parameter.device_mesh
    # fully_shard cuts as torch.chunk does: equal numbers of rows, the last ranks with fewer or none.
    start = min(mesh.get_local_rank() * math.ceil(rows / mesh.size()), rows) * width
    return Share(f"{name}@{mesh.get_local_rank()}", parameter, local.view(-1), [Piece(name, start, 0, local.numel())])


def _of_zero2(engine: Any, names: dict[Any, str], rank: int) -> Iterator[Share]:
    """ZeRO-1 and 2: each group of parameters is one flat tensor, and each process has one stretch of it."""
    for k, flat in enumerate(engine.single_partition_of_fp32_groups):
        pieces = []
        for parameter in engine.bit16_groups[k]:
            if (here := parameter._hp_mapping) is not None:
                whole, part = here.lp_fragment_address, here.hp_fragment_address
                pieces.append(Piece(names[parameter], whole.start, part.start, part.numel))
        yield Share(f"group {k}@{rank}", flat, flat.detach().view(-1), pieces)


def _of_zero3(engine: Any, names: dict[Any, str], rank: int) -> Iterator[Share]:
    """ZeRO-3: each process has an equal stretch of each parameter, the last one padded."""
    for k, flat in enumerate(engine.fp32_partitioned_groups_flat):
        pieces = []
        for parameter in engine.fp16_groups[k]:
            _, offset, size = engine.grad_position[engine.get_param_id(parameter)]
            start = min(rank * size, parameter.ds_numel)
            pieces.append(Piece(names[parameter], start, offset, min(size, parameter.ds_numel - start)))
        yield Share(f"group {k}@{rank}", flat, flat.detach().view(-1), pieces)


def share_tensors(found: list[Share], optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and optimizer state of this process: what can be told by elements as flat tensors, and single numbers.

    The names of tensors are `parameter|field|first element`, those of numbers `parameter|field`. State that is no number
    for each element, such as the scales of 8-bit blocks, is kept as it is, as `owner|field|whole`.
    """
    kept: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    every = unwrap_optimizer(optimizer).state
    for owner in found:
        flats = {WEIGHT: owner.flat}
        for field, value in every.get(owner.key, {}).items():
            if not isinstance(value, torch.Tensor) or not value.ndim:
                numbers |= {f"{piece.name}|{field}": _number(value) for piece in owner.pieces}
            elif (local := local_part(value)).numel() == owner.flat.numel():
                flats[field] = local.detach().view(-1)
            else:
                kept[f"{owner.name}|{field}|{WHOLE}"] = local.detach()
        for name, start, offset, size in owner.pieces:
            kept |= {f"{name}|{field}|{start}": flat[offset : offset + size] for field, flat in flats.items() if size}
    return kept, numbers


def _number(value: Any) -> Any:
    """For JSON: a number as it is, a tensor of one as [dtype, whether it is on the CPU, number]."""
    if isinstance(value, torch.Tensor):
        return [DTYPE_NAMES[value.dtype], value.device.type == "cpu", value.item()]
    return value


def load_shares(found: list[Share], optimizer: Any, reader: PieceReader) -> None:
    """Bring weights and optimizer state to what `reader` has.

    Raises:
        ConfigError: it holds other parameters than are trained here, or lacks some of their state.
    """
    base = unwrap_optimizer(optimizer)
    for owner in found:
        fill_weights(owner, reader)
        state = _allocated(base, owner, reader)
        for field, value in list(state.items()):
            if isinstance(value, torch.Tensor) and value.ndim:
                local = local_part(value)
                if local.numel() == owner.flat.numel():
                    for piece in owner.pieces:
                        if reader.has(piece.name, field):
                            reader.fill(piece, field, local.view(-1))
                else:
                    local.copy_(reader.read_whole(owner, field, local.device))
        for field, value in reader.numbers_of(owner).items():
            state[field] = _as_it_was(value, owner.flat.device)


def fill_weights(owner: Share, reader: PieceReader) -> None:
    for piece in owner.pieces:
        reader.fill(piece, WEIGHT, owner.flat)


def _allocated(base: Any, owner: Share, reader: PieceReader) -> dict[str, Any]:
    """The optimizer's state of an owner, as its first step would make it; empty where there was none."""
    fields, state = reader.fields(owner), base.state[owner.key]
    if not fields and not any(key.rsplit("|", 1)[0] == owner.name for key in reader.whole):
        return state
    if hasattr(base, "init_state"):
        # bitsandbytes decides by the size of a tensor how many bits its state has, and whether it is paged.
        base.check_overrides()
        group, place = _place(base, owner.key)
        base.init_state(base.param_groups[group], owner.key, group, place)
        return state
    for field in fields:
        state[field] = torch.zeros_like(owner.key, dtype=reader.dtype(owner, field), requires_grad=False)
    for key, entry in reader.whole.items():
        name, field = key.rsplit("|", 1)
        if name == owner.name:
            state[field] = torch.empty(entry.shape, dtype=entry.dtype, device=owner.flat.device)
    return state


def _place(base: Any, key: torch.Tensor) -> tuple[int, int]:
    """Indices of the group and of the parameter in it."""
    for group, settings in enumerate(base.param_groups):
        for place, parameter in enumerate(settings["params"]):
            if parameter is key:
                return group, place
    raise RuntimeError("the optimizer does not step what it keeps state of")


def _as_it_was(value: Any, device: torch.device) -> Any:
    if not isinstance(value, list):
        return value
    dtype, on_cpu, number = value
    return torch.tensor(number, dtype=DTYPES_BY_NAME[dtype], device="cpu" if on_cpu else device)
