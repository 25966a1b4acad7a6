"""The frozen input embedding in the memory of the host (`offload_embeddings`): the GPU gets only the rows it needs."""

from typing import Any

import accel_llm.system.chatter

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from accel_llm.errors import ConfigError
from accel_llm.model.attention import unwrap_causal_lm


class HostMatrix(torch.Tensor):
    """A matrix [vocabulary, width] in host memory, whose rows `F.embedding` looks up for the device of the ids."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            ids, matrix = args[:2]
            return _rows(ids, matrix.as_subclass(torch.Tensor))
        return super().__torch_function__(func, types, args, kwargs or {})


def _rows(ids: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return the rows of `matrix` for ids [..., L] on the device of `ids`: [..., L, width].

    The host does not wait if it has the ids itself: `to_device` leaves them in `ids.on_host`. Other ids, such as those
    of generated tokens, are copied from the device; so are ids that the model has changed since.
    """
    host_ids = getattr(ids, "on_host", None)
    if host_ids is None or ids._version:
        host_ids = ids.cpu()
    # Only pinned memory is copied while the host goes on.
    rows = matrix.new_empty(ids.numel(), matrix.shape[1], pin_memory=ids.is_cuda)
    torch.index_select(matrix, 0, host_ids.flatten(), out=rows)
    return rows.to(ids.device, non_blocking=True).view(*ids.shape, -1)


def embedding_to_offload(model: nn.Module) -> nn.Embedding:
    """Return the input embedding of `model`, whose weights are not placed yet, if it can stay in host memory.

    Raises:
        ConfigError: the embedding is trained, or the device needs its matrix for something else.
    """
    inner = unwrap_causal_lm(model)
    module: Any = inner.get_input_embeddings()
    name = next((name for name, other in inner.named_modules() if other is module), "")
    if isinstance(module, ModulesToSaveWrapper):
        raise ConfigError(
            f"offload_embeddings: {name} is trained as a whole, because modules_to_save names it; leave it out there, or "
            f"set offload_embeddings: false."
        )
    if isinstance(module, LoraLayer):
        if module.lora_magnitude_vector:
            raise ConfigError(
                f"offload_embeddings: use_dora reads the whole matrix of {name} in each step; leave it out of "
                f"lora_target_modules, or set offload_embeddings: false."
            )
        module = module.get_base_layer()
    if not isinstance(module, nn.Embedding):
        raise ConfigError(
            f"offload_embeddings: {type(inner).__name__} has no plain input embedding; set offload_embeddings: false."
        )
    holders = [other for other in inner.modules() for own in other.parameters(recurse=False) if own is module.weight]
    if len(holders) > 1:
        raise ConfigError(
            f"offload_embeddings: {name} is also the output head of {type(inner).__name__}, which the GPU needs whole; "
            f"set offload_embeddings: false."
        )
    return module


def keep_on_host(embedding: nn.Embedding) -> None:
    """Let a frozen embedding, whose weight is on the CPU, look up rows there for ids on any device.

    Its weight is no parameter any more, so nothing moves it, sends it to other processes or saves it.
    """
    weight = embedding.weight.detach()
    del embedding.weight
    embedding.weight = weight.as_subclass(HostMatrix)  # type: ignore[assignment]


def host_matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the matrices of `model` that stay in host memory, by name; no parameter is among them."""
    return {
        f"{name}.weight": module.weight.as_subclass(torch.Tensor)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and isinstance(module.weight, HostMatrix)
    }
