"""Virtual tokens: learnt embeddings, or keys and values of each layer, at the first places of each document.

A batch has places for them (data/batches.py), so lengths, boundaries and positions are right without further work. What
stands at a place is replaced: its embedding before the first layer, or its key and value in each layer, after rotary
embeddings. The latter is what a prefix in the cache of transformers is, but works in packed rows, and where activations
are recomputed.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from accel_llm.errors import ConfigError

# transformers 5.24 has another name for it, and warns of the old one.
_mixin: Any = GenerationMixin
GENERATE_OPTIONS = inspect.signature(_mixin.prepare_inputs_for_generation).parameters
CACHE_OPTION = "cache" if "cache" in GENERATE_OPTIONS else "past_key_values"


def count_virtual_tokens(model: nn.Module) -> int:
    """Return how many virtual tokens each document begins with; 0 without a prompt-learning method."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return getattr(inner, "virtual_tokens", 0)


def replace_embeddings(embedded: torch.Tensor, prompts: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return `embedded` [B, L, width] with prompts at `positions` [documents * n] of the flattened rows.

    `prompts` [documents, n, width] has one for each document, or [1, n, width] one for all.
    """
    documents = len(positions) // prompts.shape[1]
    rows = prompts.to(embedded.dtype).expand(documents, -1, -1).flatten(0, 1)
    return embedded.flatten(0, 1).index_copy(0, positions, rows).view_as(embedded)


def replace_keys(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, prefix: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values [B, kv_heads, L, head_dim] of an attention layer with its prefix at `positions`.

    `prefix` [2 * layers, n, kv_heads, head_dim] holds the key and the value of each layer, `positions` [documents * n]
    are places in the flattened rows.

    Raises:
        ConfigError: the layer's keys or values have another shape.
    """
    layer: Any = module.layer_idx
    return _replace(module, key, prefix[2 * layer], positions), _replace(
        module, value, prefix[2 * layer + 1], positions
    )


def _replace(module: nn.Module, tensor: torch.Tensor, prefix: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    heads, width = tensor.shape[1], tensor.shape[3]
    if prefix.shape[1:] != (heads, width):
        raise ConfigError(
            f"method: a prefix does not fit {type(module).__name__}: it has keys or values of {heads} heads with {width} "
            f"numbers, and PEFT's prefix has {prefix.shape[1]} heads with {prefix.shape[2]}; use method prompt."
        )
    tokens = tensor.transpose(1, 2)
    rows = prefix.to(tensor.dtype).repeat(len(positions) // len(prefix), 1, 1)
    return tokens.flatten(0, 1).index_copy(0, positions, rows).view(tokens.shape).transpose(1, 2)


class PrefixCache(DynamicCache):
    """A cache for generation that puts a prefix over the keys and values of the prompt; see `replace_keys`."""

    def __init__(self, prefix: torch.Tensor, positions: torch.Tensor, **kwargs: Any):
        super().__init__(**kwargs)
        self.prefix, self.prefix_positions = prefix, positions

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if not self.get_seq_length(layer_idx):
            layer: Any = nn.Module()
            layer.layer_idx = layer_idx
            key_states, value_states = replace_keys(layer, key_states, value_states, self.prefix, self.prefix_positions)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def with_places(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put `count` places before the tokens of each row, behind its padding on the left.

    input_ids and attention_mask [B, L] -> both [B, L + count], and the places in the flattened rows [B * count]. The
    ids at the places are a token of the row, so that a penalty of repetition meets no other token.
    """
    column = torch.arange(input_ids.shape[1] + count, device=input_ids.device)
    padding = (input_ids.shape[1] - attention_mask.sum(1, keepdim=True)).long()
    virtual = (column >= padding) & (column < padding + count)
    source = torch.where(column < padding, column, column - count).clamp(min=0)
    ids = torch.where(virtual, input_ids[:, -1:], input_ids.gather(1, source))
    return ids, (column >= padding).long(), virtual.flatten().nonzero().flatten()
