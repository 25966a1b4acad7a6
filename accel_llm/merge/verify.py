"""Verifies a merge: each merged module computes what the adapted one did, and each written byte is read back."""

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
from accel_llm.system.tensors import COPY_BLOCK_SIZE, tensor_places

# Largest |merged W x - adapted layer(x)| / |adapted layer(x)| that rounding explains, by the module's dtype.
MODULE_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# The same for the logits of a whole model.
LOGIT_BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE_ROWS = 8  # random inputs of a linear layer


def probe_input(module: Any) -> torch.Tensor | None:
    """Return random input for a module, drawn with a fixed seed. None if the module's input is not a single tensor."""
    base: Any = plain_module(module)
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        ids = torch.randint(base.num_embeddings, (64,), generator=generator)
        # The trained rows must be among the random ids.
        if isinstance(module, TrainableTokensWrapper):
            trained_ids = [torch.tensor(indices) for indices in module.token_adapter.token_indices.values()]
            ids = torch.cat([ids, *trained_ids])
        return ids
    weight = getattr(base, "weight", None)
    if weight is None or isinstance(module, ParamWrapper | ModulesToSaveWrapper):
        return None
    # The smallest input on which every weight of the kernel is used.
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
    """Return an adapted module's output for `x`; without `x` its adapted parameters times random vectors, by name."""
    with torch.no_grad():
        if x is not None:
            return {"": module(x).float()}
        return {name: _adapted_product(layer) for name, layer in _parameter_layers(module).items()}


def merged_output(module: Any, adapted: Any, x: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the same for `module`, the plain module that `adapted` became."""
    with torch.no_grad():
        if x is not None:
            return {"": module(x).float()}
        weights = {name: getattr(module, name) for name in _parameter_layers(adapted)}
        return {name: _product(weight, _random_vectors(weight)) for name, weight in weights.items()}


def _parameter_layers(module: Any) -> dict[str, Any]:
    """Return PEFT's layers on single parameters, such as the experts of a mixture, by the parameter's name."""
    layers: dict[str, Any] = {}
    while isinstance(module, ParamWrapper):
        layers[module.parameter_name] = module
        module = module.base_layer
    return layers


def _random_vectors(weight: torch.Tensor) -> torch.Tensor:
    """Return random [..., width, 1] for a weight [..., rows, width]: one vector for each expert."""
    shape = (*weight.shape[:-2], weight.shape[-1], 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # In the weight's own dtype: a float32 copy of all experts would be the largest tensor in memory.
    return (weight @ x.to(weight.dtype)).float()


def _adapted_product(layer: Any) -> torch.Tensor:
    """Return W x + scaling B (A x) for the parameter that `layer` adapts, without the large product B A."""
    weight = layer.get_param()
    x = _random_vectors(weight)
    result = _product(weight, x)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            left, right = layer.lora_B[name].weight.float(), layer.lora_A[name].weight.float()
            if weight.ndim == 3:  # PEFT keeps the factors of all experts in one matrix
                experts = layer.num_experts
                right = right.reshape(experts, -1, right.shape[-1])
                left = left.reshape(left.shape[0], -1, experts).permute(2, 0, 1)
                if not layer._did_swap_in_out_features:
                    left, right = right.transpose(-2, -1), left.transpose(-2, -1)
            result = result + layer.scaling[name] * (left @ (right @ x))
    return result


def relative_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest |actual - expected| / |expected| of the tensors. NaN if a tensor holds a NaN."""
    largest = 0.0
    for name, tensor in expected.items():
        scale = float(tensor.norm())
        relative = float((actual[name] - tensor).norm()) / (scale or 1.0)
        if not relative <= largest:  # also true for NaN
            largest = relative
        if math.isnan(largest):
            break
    return largest


def merge_module_checked(module: Any, name: str, unmerge: bool) -> tuple[nn.Module, float | None]:
    """Merge a module. Returns the plain module, and the relative difference of its output from the adapted one's.

    The difference is None if the module is replaced whole, or if its kind of input is not known.

    Raises:
        ConfigError: the outputs differ by more than rounding explains.
    """
    x, dtype = probe_input(module), _dtype(module)
    # Unmerging is the same comparison the other way round: the base is the merged module.
    before = merged_output(plain_module(module), module, x) if unmerge else module_output(module, x)
    plain = merge_module(module, unmerge)
    after = module_output(module, x) if unmerge else merged_output(plain, module, x)
    # No input was known, and no parameter is adapted: nothing to compare.
    if not before:
        return plain, None
    relative = relative_difference(after, before)
    _check_difference(name, relative, dtype)
    return plain, relative


def _dtype(module: Any) -> torch.dtype:
    return next((weight.dtype for weight in plain_module(module).parameters()), torch.float32)


def _check_difference(name: str, relative: float, dtype: torch.dtype) -> None:
    bound = MODULE_BOUNDS[dtype]
    if not relative <= bound:
        raise ConfigError(
            f"verify: {name} merged computes something else than with its adapter, by {relative:.1e} (allowed for "
            f"{dtype}: {bound:.0e}); nothing was written."
        )


def read_back(folder: Path, checksums: dict[str, int]) -> dict[str, str]:
    """Read the safetensors files in `folder` again. Returns their SHA-256 by file name.

    `checksums` are the CRC-32 of the bytes that were meant to be written, by tensor.

    Raises:
        ConfigError: a tensor is missing, or its bytes have another CRC-32.
    """
    hashes, seen = {}, set()
    # One pass per file gives its SHA-256 and the CRC-32 of each tensor.
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        tensors = sorted(tensor_places(file).items(), key=lambda entry: entry[1].offset)
        with file.open("rb") as stream:
            header = tensors[0][1].offset if tensors else file.stat().st_size
            digest.update(stream.read(header))  # the header belongs to the file's hash, but to no tensor
            for name, place in tensors:
                total, left = 0, place.spec.size
                while left:
                    part = stream.read(min(COPY_BLOCK_SIZE, left))
                    digest.update(part)
                    total, left = zlib.crc32(part, total), left - len(part)
                if total != checksums.get(name):
                    raise ConfigError(f"verify: {name} in {file.name} is not what was written; nothing was kept.")
                seen.add(name)
        hashes[file.name] = digest.hexdigest()
    if missing := sorted(checksums.keys() - seen):
        raise ConfigError(f"verify: {len(missing)} weights are in no file, such as {missing[0]}; nothing was kept.")
    return hashes
