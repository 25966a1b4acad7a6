"""Each process's share of the trained weights and of the optimizer's state, in one form for all backends.

Every backend leaves a process with ranges of the elements of parameters: all elements under DDP, some rows under FSDP2,
a part of a flat partition under DeepSpeed. So a checkpoint of one backend can be loaded by another one, on any number
of processes. What DeepSpeed needs beyond that (its copies of the weights, its loss scale) is at the end of this file.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from accel_llm.adapters.fixed_parts import fixed_parts, follow_projections
from accel_llm.backend.accelerator import local_part, reshard, unwrap_model, unwrap_optimizer
from accel_llm.backend.collectives import max_over_processes
from accel_llm.checkpoint.pieces import WEIGHT, WHOLE, Piece, PieceReader, Share
from accel_llm.errors import ConfigError
from accel_llm.system.tensors import DTYPE_NAMES, DTYPES_BY_NAME


def local_shares(accelerator: Accelerator, model: Any, optimizer: Any) -> list[Share]:
    """Return this process's shares of everything that is trained.

    Raises:
        ConfigError: DeepSpeed runs without ZeRO.
    """
    reshard(model)
    # Only trained parameters, by name. The backend decides which elements of them are here.
    parameters = unwrap_model(accelerator, model).named_parameters()
    names = {parameter: name for name, parameter in parameters if parameter.requires_grad}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = optimizer.optimizer
        if hasattr(engine, "fp32_partitioned_groups_flat"):
            return list(_zero3_shares(engine, names, accelerator.process_index))
        if hasattr(engine, "single_partition_of_fp32_groups"):
            return list(_zero2_shares(engine, names, accelerator.process_index))
        raise ConfigError(
            "zero_optimization.stage: 0 cannot be saved in checkpoints; set stage 1, 2 or 3, or use ddp.yaml."
        )
    return [_parameter_share(parameter, name) for parameter, name in names.items()]


def _parameter_share(parameter: Any, name: str) -> Share:
    """Return a whole parameter, or the rows of it that FSDP2 keeps on this process."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return Share(name, parameter, parameter.detach().view(-1), [Piece(name, 0, 0, parameter.numel())])
    # FSDP2 shards the first dimension: this process has some whole rows.
    local = local_part(parameter.detach())
    rows, width = parameter.shape[0], parameter.shape[1:].numel()
    mesh = parameter.device_mesh
    # fully_shard cuts like torch.chunk: equal numbers of rows, the last ranks get fewer or none.
    start = min(mesh.get_local_rank() * math.ceil(rows / mesh.size()), rows) * width
    return Share(f"{name}@{mesh.get_local_rank()}", parameter, local.view(-1), [Piece(name, start, 0, local.numel())])


def _zero2_shares(engine: Any, names: dict[Any, str], rank: int) -> Iterator[Share]:
    """Return the shares under ZeRO-1 and 2: a group of parameters is one flat tensor; each process owns a range."""
    for k, flat in enumerate(engine.single_partition_of_fp32_groups):
        pieces = []
        for parameter in engine.bit16_groups[k]:
            # None: this process owns no element of the parameter.
            if (mapping := parameter._hp_mapping) is not None:
                in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(names[parameter], in_parameter.start, in_flat.start, in_flat.numel))
        yield Share(f"group {k}@{rank}", flat, flat.detach().view(-1), pieces)


def _zero3_shares(engine: Any, names: dict[Any, str], rank: int) -> Iterator[Share]:
    """Return the shares under ZeRO-3: each process owns an equal range of each parameter; the last range is padded."""
    for k, flat in enumerate(engine.fp32_partitioned_groups_flat):
        pieces = []
        for parameter in engine.fp16_groups[k]:
            _, offset, size = engine.grad_position[engine.get_param_id(parameter)]
            # `size` counts the padding too, so the last rank may have fewer elements, or none.
            start = min(rank * size, parameter.ds_numel)
            pieces.append(Piece(names[parameter], start, offset, min(size, parameter.ds_numel - start)))
        yield Share(f"group {k}@{rank}", flat, flat.detach().view(-1), pieces)


def share_tensors(shares: list[Share], optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights and optimizer state of this process: flat tensors, and single numbers.

    Tensors are named `parameter|field|first element`, numbers `parameter|field`. State without one value per element,
    such as the scales of 8-bit blocks, is saved as it is, named `share|field|whole`.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    states = unwrap_optimizer(optimizer).state
    for share in shares:
        flats = {WEIGHT: share.flat}
        # The state of a share is sorted by its form: a number, one value per element, or anything else.
        for field, value in states.get(share.key, {}).items():
            if not isinstance(value, torch.Tensor) or not value.ndim:
                numbers |= {f"{piece.name}|{field}": _number_to_json(value) for piece in share.pieces}
            elif (local := local_part(value)).numel() == share.flat.numel():
                flats[field] = local.detach().view(-1)
            else:
                tensors[f"{share.name}|{field}|{WHOLE}"] = local.detach()
        for name, start, offset, size in share.pieces:
            tensors |= {
                f"{name}|{field}|{start}": flat[offset : offset + size] for field, flat in flats.items() if size
            }
    return tensors, numbers


def _number_to_json(value: Any) -> Any:
    """Return a plain number as it is, and a tensor of one number as [dtype, is it on the CPU, number]."""
    if isinstance(value, torch.Tensor):
        return [DTYPE_NAMES[value.dtype], value.device.type == "cpu", value.item()]
    return value


def _number_from_json(value: Any, device: torch.device) -> Any:
    if not isinstance(value, list):
        return value
    dtype, on_cpu, number = value
    return torch.tensor(number, dtype=DTYPES_BY_NAME[dtype], device="cpu" if on_cpu else device)


def load_shares(shares: list[Share], optimizer: Any, reader: PieceReader) -> None:
    """Load weights and optimizer state of this process from a checkpoint.

    Raises:
        ConfigError: the checkpoint holds other parameters than are trained here, or lacks some of their state.
    """
    inner = unwrap_optimizer(optimizer)
    for share in shares:
        fill_weights(share, reader)
        # Allocate the state first, then fill it: per element, whole, and single numbers.
        state = _allocate_state(inner, share, reader)
        for field, value in list(state.items()):
            if isinstance(value, torch.Tensor) and value.ndim:
                local = local_part(value)
                if local.numel() == share.flat.numel():
                    for piece in share.pieces:
                        if reader.has(piece.name, field):
                            reader.fill(piece, field, local.view(-1))
                else:
                    local.copy_(reader.read_whole(share, field, local.device))
        for field, value in reader.share_numbers(share).items():
            state[field] = _number_from_json(value, share.flat.device)


def fill_weights(share: Share, reader: PieceReader) -> None:
    """Load the weights of one share, without the optimizer's state."""
    for piece in share.pieces:
        reader.fill(piece, WEIGHT, share.flat)


def fixed_tensors(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    """Return the parts of an adapter that are not trained, named as pieces; each process has all of them.

    Another machine may compute other ones (`adapters/fixed_parts.py`), so a run keeps those that it began with.
    """
    parts = fixed_parts(unwrap_model(accelerator, model))
    return {f"{name}|{WEIGHT}|0": part.reshape(-1) for name, part in parts.items()}


def load_fixed_tensors(accelerator: Accelerator, model: Any, reader: PieceReader) -> None:
    """Load what `fixed_tensors` returned, in the dtype that this backend computes with.

    Raises:
        ConfigError: the checkpoint holds a part of it.
    """
    inner, differ = unwrap_model(accelerator, model), False
    parts = fixed_parts(inner)
    if parts and not any(reader.has(name, WEIGHT) for name in parts):  # saved when checkpoints did not hold them
        accelerator.print(
            f"resume_from_checkpoint: {reader.folder} does not hold those parts of the adapter that are not trained, such "
            f"as {min(parts)}; they were computed anew"
        )
        return
    for name, part in parts.items():
        saved = reader.read_all(name, WEIGHT, part.shape).to(part.dtype)
        differ = differ or not torch.equal(saved, part.cpu())
        part.copy_(saved)
    if max_over_processes(int(differ), None):
        follow_projections(inner)


def _allocate_state(optimizer: Any, share: Share, reader: PieceReader) -> dict[str, Any]:
    """Create the optimizer's state of a share as its first step would. Empty if the checkpoint has no state for it."""
    fields, state = reader.fields(share), optimizer.state[share.key]
    if not fields and not any(key.rsplit("|", 1)[0] == share.name for key in reader.whole):
        return state
    if hasattr(optimizer, "init_state"):
        # bitsandbytes decides by the size of a tensor how many bits its state has, and whether it is paged.
        optimizer.check_overrides()
        group, index = _parameter_position(optimizer, share.key)
        optimizer.init_state(optimizer.param_groups[group], share.key, group, index)
        fields = [field for field in fields if field not in state]  # not the optimizer's own, see adapters/budget.py
        state.update({f: torch.zeros_like(share.key, dtype=reader.dtype(share, f)) for f in fields})
        return state
    # All other optimizers: one tensor per field, in the dtype that was saved.
    for field in fields:
        state[field] = torch.zeros_like(share.key, dtype=reader.dtype(share, field), requires_grad=False)
    # Tensors that are saved as they are.
    for key, stored in reader.whole.items():
        name, field = key.rsplit("|", 1)
        if name == share.name:
            state[field] = torch.empty(stored.shape, dtype=stored.dtype, device=share.flat.device)
    return state


def _parameter_position(optimizer: Any, key: torch.Tensor) -> tuple[int, int]:
    """Return the index of the parameter's group, and its index in that group."""
    for group, settings in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(settings["params"]):
            if parameter is key:
                return group, index
    raise RuntimeError("the optimizer has state of a parameter that it does not step")


def refresh_model_weights(optimizer: Any) -> None:
    """Copy DeepSpeed's float32 weights into the weights that the model computes with. Other backends need nothing."""
    engine: Any = getattr(optimizer, "optimizer", None)
    if hasattr(engine, "single_partition_of_fp32_groups"):
        engine.update_lp_params()
    elif hasattr(engine, "fp32_partitioned_groups_flat"):
        engine._partition_all_parameters()
        for k in range(len(engine.fp32_partitioned_groups_flat)):
            engine._reassign_or_swap_out_partitioned_parameters(k)
        # DeepSpeed keeps small parameters whole on every process.
        if engine.persistent_parameters:
            engine.persistent_parameters[0].all_gather(engine.persistent_parameters)


def loss_scale_state(accelerator: Accelerator, optimizer: Any) -> dict[str, Any]:
    """Return the state of the fp16 loss scaler, for JSON; empty if the loss is not scaled."""
    # Outside fp16 nothing is scaled.
    scaler = _loss_scaler(accelerator, optimizer)
    if scaler is None:
        return {}
    # torch's scaler has a method for it. DeepSpeed's has plain attributes: numbers, and the dtype, which never changes.
    if hasattr(scaler, "state_dict"):
        return scaler.state_dict()
    return {name: value for name, value in vars(scaler).items() if isinstance(value, bool | int | float)}


def set_loss_scale_state(accelerator: Accelerator, optimizer: Any, state: dict[str, Any]) -> None:
    """Restore what `loss_scale_state` returned."""
    scaler = _loss_scaler(accelerator, optimizer)
    if accelerator.scaler is not None:
        scaler.load_state_dict(state)
    elif scaler is not None:
        vars(scaler).update(state)


def _loss_scaler(accelerator: Accelerator, optimizer: Any) -> Any:
    """Return the object that scales the loss in fp16: Accelerate's or DeepSpeed's, None if nothing does."""
    return accelerator.scaler or getattr(getattr(optimizer, "optimizer", None), "loss_scaler", None)
