"""Proof that a merged model is what base and adapter are together: module by module, byte by byte, and by its logits."""

import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from accel_llm.errors import ConfigError
from accel_llm.merge.one_module import merge_module, plain_module
from accel_llm.system.tensors import COPIED_AT_ONCE, tensor_places

# Largest |merged W x - adapter layer(x)| / |adapter layer(x)| that rounding explains: of a module in its own dtype.
MODULE_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# The same of a whole model's logits.
LOGIT_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_ROWS = 8


def probe_input(module: Any) -> torch.Tensor | None:
    """Random input for a module, drawn from a fixed seed; None for kinds whose input is not one tensor."""
    base: Any = plain_module(module)
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        ids = torch.randint(base.num_embeddings, (64,), generator=generator)
        if isinstance(module, TrainableTokensWrapper):
            trained = [torch.tensor(found) for found in module.token_adapter.token_indices.values()]
            ids = torch.cat([ids, *trained])
        return ids
    weight = getattr(base, "weight", None)
    if weight is None or isinstance(module, ParamWrapper | ModulesToSaveWrapper):
        return None
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sizes = [size * step + 1 for size, step in zip(base.kernel_size, base.dilation, strict=True)]
        shape: tuple[int, ...] = (1, base.in_channels, *sizes)
    elif isinstance(base, Conv1D):
        shape = (PROBE_ROWS, weight.shape[0])
    elif isinstance(base, nn.Linear) or weight.ndim == 1:
        shape = (PROBE_ROWS, weight.shape[-1])
    else:
        return None
    return torch.randn(shape, generator=generator).to(weight.dtype)


def module_output(module: Any, x: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a module computes of `x`; the sums over its inputs where it holds adapted parameters of a mixture instead."""
    with torch.no_grad():
        if x is not None:
            return {"": module(x).float()}
        return {name: _adapted(layer) for name, layer in _parameters(module).items()}


def merged_output(module: Any, adapted: Any, x: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The same of the plain module that `adapted` has become."""
    with torch.no_grad():
        if x is not None:
            return {"": module(x).float()}
        return {name: _sums(getattr(module, name), _input(getattr(module, name))) for name in _parameters(adapted)}


def _parameters(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while isinstance(module, ParamWrapper):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def _input(weight: torch.Tensor) -> torch.Tensor:
    """Random [..., width, 1] for a weight [..., rows, width], one for each expert."""
    shape = (*weight.shape[:-2], weight.shape[-1], 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _sums(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # In the weight's own dtype: a copy of all experts in float32 would be the largest thing in memory.
    return (weight @ x.to(weight.dtype)).float()


def _adapted(layer: Any) -> torch.Tensor:
    """W x + scaling B (A x) of the parameter that `layer` adapts; no product of B and A is made."""
    weight = layer.get_param()
    x = _input(weight)
    result = _sums(weight, x)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            left, right = layer.lora_B[name].weight.float(), layer.lora_A[name].weight.float()
            if weight.ndim == 3:
                experts = layer.num_experts
                right = right.reshape(experts, -1, right.shape[-1])
                left = left.reshape(left.shape[0], -1, experts).permute(2, 0, 1)
                if not layer._did_swap_in_out_features:
                    left, right = right.transpose(-2, -1), left.transpose(-2, -1)
            result = result + layer.scaling[name] * (left @ (right @ x))
    return result


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest |found - expected| / |expected| of the tensors; NaN where there is one in them."""
    worst = 0.0
    for name, wanted in expected.items():
        scale = float(wanted.norm())
        relative = float((found[name] - wanted).norm()) / (scale or 1.0)
        if not relative <= worst:
            worst = relative
        if math.isnan(worst):
            break
    return worst


def merge_module_checked(module: Any, name: str, unmerge: bool) -> tuple[nn.Module, float | None]:
    """The plain module that an adapted one becomes, and the relative difference of what the two compute.

    None for a module that is replaced whole, or whose kind of input is not known.

    Raises:
        ConfigError: they differ beyond the bound of the module's dtype.
    """
    x, dtype = probe_input(module), _dtype(module)
    before = merged_output(plain_module(module), module, x) if unmerge else module_output(module, x)
    plain = merge_module(module, unmerge)
    after = module_output(module, x) if unmerge else merged_output(plain, module, x)
    if not before:
        return plain, None
    relative = relative_difference(after, before)
    _check(name, relative, dtype)
    return plain, relative


def _dtype(module: Any) -> torch.dtype:
    return next((weight.dtype for weight in plain_module(module).parameters()), torch.float32)


def _check(name: str, relative: float, dtype: torch.dtype) -> None:
    bound = MODULE_BOUNDS[dtype]
    if not relative <= bound:
        raise ConfigError(
            f"verify: {name} merged computes something else than with its adapter, by {relative:.1e} (allowed for {dtype}: "
            f"{bound:.0e}); nothing was written."
        )


def read_back(folder: Path, sums: dict[str, int]) -> dict[str, str]:
    """Read the safetensors files in `folder` again: their SHA-256 by name.

    Raises:
        ConfigError: a tensor is not there, or does not have the CRC-32 in `sums` that it was written with.
    """
    hashes, seen = {}, set()
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        tensors = sorted(tensor_places(file).items(), key=lambda entry: entry[1].offset)
        with file.open("rb") as stream:
            header = tensors[0][1].offset if tensors else file.stat().st_size
            digest.update(stream.read(header))
            for name, place in tensors:
                total, left = 0, place.spec.size
                while left:
                    part = stream.read(min(COPIED_AT_ONCE, left))
                    digest.update(part)
                    total, left = zlib.crc32(part, total), left - len(part)
                if total != sums.get(name):
                    raise ConfigError(f"verify: {name} in {file.name} is not what was written; nothing was kept.")
                seen.add(name)
        hashes[file.name] = digest.hexdigest()
    if lost := sorted(sums.keys() - seen):
        raise ConfigError(f"verify: {len(lost)} weights are in no file, such as {lost[0]}; nothing was kept.")
    return hashes
