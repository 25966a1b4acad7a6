"""Attention for packed rows, whose documents do not see each other, and for padded rows, which need no mask."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from accel_llm.errors import ConfigError
from accel_llm.model.document_attention import (
    DocumentGroups,
    eager_attention,
    group_documents,
    grouped_attention,
    is_on_cpu,
    repeat_heads,
    sdpa_attention,
    varlen_attention,
    varlen_supports,
)
from accel_llm.model.virtual_tokens import replace_keys

PACKED_ATTENTION, PADDED_ATTENTION = "packed", "padded"
REMEDY = "set packing: false"

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # a family that calls attention by transformers' AttentionInterface has this name
# Kinds of layers in which only attention mixes tokens. Only attention knows where a document ends.
ISOLATED_LAYERS = {"full_attention", "sliding_attention", "dense", "sparse", "moe"}


def forward_arguments(batch: dict) -> dict:
    """Return the arguments of the model's forward for a packed or padded batch, without labels.

    The boundaries of a packed batch get the names of transformers' FlashAttentionKwargs: models pass these on to every
    attention call, with and without gradient checkpointing. The lengths of the documents, which the host knows, travel
    as an attribute of the tensors. Where documents share a prompt, the keys have boundaries of their own.
    """
    lengths = batch.get("lengths")
    names = ("input_ids", "virtual_positions", "prompt_numbers", "key_positions")
    arguments = {name: batch[name] for name in names if name in batch}
    if "cu_seqlens" not in batch:
        batch["attention_mask"].lengths = lengths
        return arguments | {"attention_mask": batch["attention_mask"]}
    boundaries, longest = batch["cu_seqlens"], batch["max_seqlen"]
    key_boundaries = batch.get("cu_seqlens_k", boundaries)
    boundaries.lengths = batch["position_ids"].lengths = lengths
    key_boundaries.lengths = batch.get("key_lengths", lengths)
    return arguments | {
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": key_boundaries,
        "max_length_q": longest,
        "max_length_k": batch.get("max_seqlen_k", longest),
    }


def unwrap_causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside its wrappers: PEFT, DDP, a DeepSpeed engine, a compiled module."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def packing_obstacle(model: nn.Module) -> str | None:
    """Return the reason why this model cannot train on packed rows, or None (`check_isolation` then tests it)."""
    inner = unwrap_causal_lm(model)
    return family_obstacle(family_class(inner), inner.config)


def family_obstacle(model_class: type, config: PreTrainedConfig) -> str | None:
    """Return the reason why a family cannot train on packed rows, as its source and a config of it tell, or None."""
    config = config.get_text_config()
    source, name = _source(model_class), model_class.__name__
    kinds = set(getattr(config, "layer_types", None) or [])

    if INTERFACE not in source:
        return f"{name} computes attention outside transformers' AttentionInterface"
    # Linear attention and convolutions carry state over document boundaries.
    if mixing := kinds - ISOLATED_LAYERS:
        return f"{name} has layers of kind {', '.join(sorted(mixing))}, which mix neighboring documents"
    # We build no mask, so the family must pass its window to the attention call as well.
    sliding = "sliding_attention" in kinds or getattr(config, "sliding_window", None)
    if sliding and "create_sliding_window_causal_mask" in source and "sliding_window=" not in source:
        return f"{name} passes its sliding window to the attention mask only"
    return None


def _source(model_class: type) -> str:
    """Return the source of a family's module."""
    return inspect.getsource(sys.modules[model_class.__module__])


def family_class(model: PreTrainedModel) -> type:
    """Return the model's class of transformers: FSDP2 gives a model a class of its own, which derives from it."""
    return next(each for each in type(model).__mro__ if not each.__module__.startswith("torch."))


def calls_interface(model: PreTrainedModel) -> bool:
    """Return whether the family calls attention by transformers' AttentionInterface: only then it calls ours."""
    return INTERFACE in _source(family_class(model))


def enable_packing(model: nn.Module) -> None:
    """Switch the model to attention that keeps the documents of a packed row apart.

    From now on every forward needs the document boundaries, see `forward_arguments`. Run generation and padded batches
    inside `with stock_attention(model)`.

    Raises:
        ConfigError: the model's family does not support it.
    """
    if reason := packing_obstacle(model):
        raise ConfigError(f"packing: true does not work with this model: {reason}; {REMEDY}.")
    unwrap_causal_lm(model).set_attn_implementation(PACKED_ATTENTION)


def enable_padding(model: nn.Module) -> None:
    """Switch the model to attention that builds no mask for rows padded on the right, where its family allows it.

    Causal attention needs none: the padding comes later than all tokens. With a mask, transformers 5.24 asks the device
    whether there is padding at all, and the host waits for the answer. Run generation, which pads on the left, inside
    `with stock_attention(model)`.
    """
    inner = unwrap_causal_lm(model)
    if inner.config._attn_implementation == "sdpa" and calls_interface(inner):
        inner.set_attn_implementation(PADDED_ATTENTION)


def _mask_without_padding(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """Return transformers' mask of a row without padding: none for causal attention, else that of the window.

    Only masks of attention to both sides, which would see the padding, are transformers' own.
    """
    both_sides = "allow_is_bidirectional_skip" in kwargs  # a name that transformers passes for these only
    return sdpa_mask(*args, attention_mask=attention_mask if both_sides else None, **kwargs)


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """Use transformers' own attention inside the `with` block: for generation and comparison."""
    inner = unwrap_causal_lm(model)
    ours = inner.config._attn_implementation
    if ours not in (PACKED_ATTENTION, PADDED_ATTENTION):
        yield
        return
    inner.set_attn_implementation("sdpa" if inner._supports_sdpa else "eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(ours)


# Never traced by torch.compile: on a CPU the lengths of the documents are numbers of the host, and each new set of them
# would be a new graph.
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_positions: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    virtual_positions: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention inside each document of one packed row of T tokens, called by transformers.

    It is causal unless `is_causal` or, without it, the attention module says no, as that of an encoder does.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim of value].
    `sliding_window` includes the token itself, `softcap` is Gemma 2's tanh cap on the scores, `s_aux` [heads] are the
    sink logits of gpt-oss. A `prefix` takes the place of keys and values, see model/virtual_tokens.py.

    Documents may share a prompt, which stands in the row once. `key_positions` [K] then are the places of each
    document's keys, one document after the other: of the prompt, and of its own tokens. `cu_seq_lens_k` [documents + 1]
    are their boundaries. The last query of a document sees its last key.

    Raises:
        ConfigError: the boundaries are missing, or the model passes a score term that is not implemented here.
    """
    _check_arguments(module, attention_mask, cu_seq_lens_q, kwargs)
    assert cu_seq_lens_q is not None and max_length_q is not None
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings and float32 norms leave queries or keys in float32, but the kernels need one dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if prefix is not None and virtual_positions is not None:
        key, value = replace_keys(module, key, value, prefix, virtual_positions)
    boundaries, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    if key_positions is not None:
        assert cu_seq_lens_k is not None and max_length_k is not None
        boundaries, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        key, value = (each.transpose(1, 2).index_select(1, key_positions).transpose(1, 2) for each in (key, value))
    window = sliding_window if sliding_window is not None and sliding_window < longest[1] else None
    plain = softcap is None and s_aux is None
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)

    if plain and not dropout and varlen_supports(query, scaling, window):
        return varlen_attention(query, key, value, boundaries, longest, scaling, window, causal), None

    # With dropout there is no fused kernel: documents of similar length together.
    if plain and dropout and key_positions is None:
        return grouped_attention(
            query, key, value, document_groups(cu_seq_lens_q), dropout, scaling, window, causal
        ), None

    # Otherwise one document at a time, and not the whole row in one kernel.
    lengths, key_lengths = (document_lengths(each) for each in boundaries)
    documents = zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True)
    if plain:
        outputs = [sdpa_attention(*document, dropout, scaling, window, causal) for document in documents]
    else:
        dropout = dropout if module.training else 0.0
        terms = (dropout, scaling, window, softcap, s_aux, causal)
        outputs = [eager_attention(*document, *terms) for document in documents]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def document_lengths(boundaries: torch.Tensor) -> list[int]:
    """Return the lengths of the documents between `boundaries`, kept with them: layers need not wait for the device."""
    if getattr(boundaries, "lengths", None) is None:
        boundaries.lengths = boundaries.diff().tolist()  # type: ignore[attr-defined]
    return boundaries.lengths  # type: ignore[attr-defined]


def document_groups(boundaries: torch.Tensor) -> DocumentGroups:
    """Return the groups of the documents between `boundaries`, kept with them for all layers."""
    if getattr(boundaries, "groups", None) is None:
        boundaries.groups = group_documents(document_lengths(boundaries), boundaries.device)  # type: ignore[attr-defined]
    return boundaries.groups  # type: ignore[attr-defined]


def _check_arguments(
    module: nn.Module, mask: torch.Tensor | None, boundaries: torch.Tensor | None, others: dict
) -> None:
    if boundaries is None or mask is not None:
        reason = "an attention mask" if mask is not None else "no boundaries"
        raise ConfigError(
            f"packing: true needs the document boundaries in every attention call, but {type(module).__name__} got "
            f"{reason}; {REMEDY} (generation and padded batches run inside stock_attention(model))."
        )

    # Terms that change the scores; leaving one out without a word would train a different model.
    terms = [name for name in ("position_bias", "indices", "block_indices", "sinks") if others.get(name) is not None]
    if terms:
        raise ConfigError(f"packing: true does not support {', '.join(terms)} of {type(module).__name__}; {REMEDY}.")


def padded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args,
    prefix: torch.Tensor | None = None,
    virtual_positions: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' SDPA attention; the result and the arguments, except for a prefix, are its own."""
    caller: Any = module
    if prefix is not None and virtual_positions is not None:
        key, value = replace_keys(module, key, value, prefix, virtual_positions)
    if not is_on_cpu(query):
        # Without a mask transformers 5.24 uses enable_gqa: in float32 and before Ampere CUDA then stores all scores.
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        caller = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(caller, query, key, value, *args, **kwargs)


# Without a mask function transformers does not search the positions for documents, and need not wait for the device.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(PADDED_ATTENTION, padded_attention)
AttentionMaskInterface.register(PADDED_ATTENTION, _mask_without_padding)
