"""Attention for packed rows, whose documents do not see each other, and for padded rows, which need no mask."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from accel_llm.errors import ConfigError
from accel_llm.model.virtual_tokens import replace_keys

PACKED_ATTENTION, PADDED_ATTENTION = "packed", "padded"
REMEDY = "set packing: false"
# torch 2.10 and 2.11 have `is_causal`, but no `scale`, `window_size`, `enable_gqa`; since 2.12 the window says causal.
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
VARLEN_MAX_HEAD_DIM = 256
_assumed_gpu = ContextVar("assumed_gpu", default=False)

# Kinds of layers in which only attention mixes tokens. Only attention knows where a document ends.
ISOLATED_LAYERS = {"full_attention", "sliding_attention", "dense", "sparse", "moe"}


def forward_arguments(batch: dict) -> dict:
    """Return the arguments of the model's forward for a packed or padded batch, without labels.

    The boundaries of a packed batch get the names of transformers' FlashAttentionKwargs: models pass these on to every
    attention call, with and without gradient checkpointing. The lengths of the documents, which the host knows, travel
    as an attribute of the tensors.
    """
    lengths = batch.get("lengths")
    names = ("input_ids", "virtual_positions", "prompt_numbers")
    arguments = {name: batch[name] for name in names if name in batch}
    if "cu_seqlens" not in batch:
        batch["attention_mask"].lengths = lengths
        return arguments | {"attention_mask": batch["attention_mask"]}
    boundaries, longest = batch["cu_seqlens"], batch["max_seqlen"]
    boundaries.lengths = batch["position_ids"].lengths = lengths
    return arguments | {
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def unwrap_causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside its wrappers: PEFT, DDP, a DeepSpeed engine, a compiled module."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def packing_obstacle(model: nn.Module) -> str | None:
    """Return the reason why this model cannot train on packed rows, or None (`check_isolation` then tests it)."""
    inner = unwrap_causal_lm(model)
    config = inner.config.get_text_config()
    source = _source(inner)
    kinds = set(getattr(config, "layer_types", None) or [])

    if not _calls_interface(inner):
        return f"{type(inner).__name__} computes attention outside transformers' AttentionInterface"
    # Linear attention and convolutions carry state over document boundaries.
    if mixing := kinds - ISOLATED_LAYERS:
        return f"{type(inner).__name__} has layers of kind {', '.join(sorted(mixing))}, which mix neighboring documents"
    # We build no mask, so the family must pass its window to the attention call as well.
    sliding = "sliding_attention" in kinds or getattr(config, "sliding_window", None)
    if sliding and "create_sliding_window_causal_mask" in source and "sliding_window=" not in source:
        return f"{type(inner).__name__} passes its sliding window to the attention mask only"
    return None


def _source(model: PreTrainedModel) -> str:
    """Return the source of the family's module."""
    return inspect.getsource(sys.modules[type(model).__module__])


def _calls_interface(model: PreTrainedModel) -> bool:
    """Return whether the family calls attention by transformers' AttentionInterface: only then it calls ours."""
    return "ALL_ATTENTION_FUNCTIONS" in _source(model)


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
    if inner.config._attn_implementation == "sdpa" and _calls_interface(inner):
        inner.set_attn_implementation(PADDED_ATTENTION)


def _mask_without_padding(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """Return transformers' mask of a row without padding: none for causal attention, else that of the window."""
    return sdpa_mask(*args, attention_mask=None, **kwargs)


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


@contextmanager
def assumed_gpu() -> Iterator[None]:
    """Compute packed attention as an Ampere GPU would, for tensors without data, which need no GPU."""
    token = _assumed_gpu.set(True)
    try:
        yield
    finally:
        _assumed_gpu.reset(token)


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
    max_length_q: int | None = None,
    prefix: torch.Tensor | None = None,
    virtual_positions: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention inside each document of one packed row of T tokens, called by transformers.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim of value].
    `sliding_window` includes the token itself, `softcap` is Gemma 2's tanh cap on the scores, `s_aux` [heads] are the
    sink logits of gpt-oss. A `prefix` takes the place of keys and values, see model/virtual_tokens.py.

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
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    plain = softcap is None and s_aux is None

    if plain and not dropout and _varlen_supports(query, scaling, window):
        return _varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling, window), None

    # Otherwise one document at a time, and not the whole row in one kernel.
    lengths = document_lengths(cu_seq_lens_q)
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    if plain:
        outputs = [_sdpa_attention(*document, dropout, scaling, window) for document in documents]
    else:
        dropout = dropout if module.training else 0.0
        outputs = [_eager_attention(*document, dropout, scaling, window, softcap, s_aux) for document in documents]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def document_lengths(boundaries: torch.Tensor) -> list[int]:
    """Return the lengths of the documents between `boundaries`, kept with them: layers need not wait for the device."""
    if getattr(boundaries, "lengths", None) is None:
        boundaries.lengths = boundaries.diff().tolist()  # type: ignore[attr-defined]
    return boundaries.lengths  # type: ignore[attr-defined]


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
    if others.get("is_causal") is False:
        terms.append("is_causal=False")
    if terms:
        raise ConfigError(f"packing: true does not support {', '.join(terms)} of {type(module).__name__}; {REMEDY}.")


def _varlen_supports(query: torch.Tensor, scaling: float | None, window: int | None) -> bool:
    head_dim = query.shape[-1]
    # The kernel refuses GPUs older than Ampere.
    on_ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return (
        (on_ampere or _assumed_gpu.get())
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= VARLEN_MAX_HEAD_DIM
        and ("scale" in VARLEN_OPTIONS or scaling is None or abs(scaling * head_dim**0.5 - 1) < 1e-6)
        and ("window_size" in VARLEN_OPTIONS or window is None)
    )


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Return [1, T, heads, head_dim of value] from torch's variable-length flash kernel: one launch for the row."""
    # Options have changed between torch releases, see VARLEN_OPTIONS.
    options: dict = {"scale": scaling} if "scale" in VARLEN_OPTIONS else {}
    if "window_size" in VARLEN_OPTIONS:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = _repeat_heads(query, key), _repeat_heads(query, value)

    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # multi-head latent attention, but the kernel supports only one head_dim
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    places = boundaries, boundaries, longest, longest  # of queries and keys alike
    output: torch.Tensor = varlen_attn(query, key, value, *places, **options)  # type: ignore
    return output[None, ..., :value_dim]


def _sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute the attention of one document by torch's fused kernel.

    On a CPU one call per document was 1.1 to 10 times faster than a padded [documents, heads, longest, head_dim] batch
    and 2 to 20 times faster than one masked row, for 40 short documents and for one long one, forward and backward.
    """
    length = query.shape[2]
    on_cpu = _is_on_cpu(query)
    if not on_cpu:  # with enable_gqa, CUDA has no fused float32 kernel and stores the full score matrix
        key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    banded = window is not None and length > window
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        # A mask excludes is_causal, so build one only if the window is shorter than the document.
        attn_mask=_visible_keys(length, window, query.device) if banded else None,
        is_causal=not banded,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=on_cpu and query.shape[1] != key.shape[1],
    )


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Compute one document's attention with explicit scores, in O(length^2) memory: no fused kernel has these terms."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ _repeat_heads(query, key).transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_visible_keys(query.shape[2], window, query.device), float("-inf"))
    if sinks is not None:  # one extra score per head: it takes part in the softmax, but has no value
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)[..., : query.shape[2]]
    return F.dropout(weights, dropout) @ _repeat_heads(query, value)


def _visible_keys(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [length, length]: the keys (columns) that each query (row) of one document sees."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


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
    if not _is_on_cpu(query):
        # Without a mask transformers 5.24 uses enable_gqa: in float32 and before Ampere CUDA then stores all scores.
        key, value = _repeat_heads(query, key), _repeat_heads(query, value)
        caller = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(caller, query, key, value, *args, **kwargs)


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not _assumed_gpu.get()


def _repeat_heads(query: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor


# Without a mask function transformers does not search the positions for documents, and need not wait for the device.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(PADDED_ATTENTION, padded_attention)
AttentionMaskInterface.register(PADDED_ATTENTION, _mask_without_padding)
