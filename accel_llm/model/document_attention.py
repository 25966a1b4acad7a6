"""The attention of documents: one variable-length kernel for a row of them, or one call for each.

A document has as many keys as queries, or more: the keys of a shared prompt come before its own. Causal means that its
last query sees its last key, and the query before it all keys but that one. Otherwise each query sees all keys; then a
window, which counts the token itself, opens to both sides.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.10 and 2.11 have `is_causal`, but no `scale`, `window_size`, `enable_gqa`; since 2.12 the window says causal.
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
VARLEN_MAX_HEAD_DIM = 256
GROUP_RATIO, GROUP_TOKENS = 1.25, 8
_assumed_gpu = ContextVar("assumed_gpu", default=False)


@contextmanager
def assumed_gpu() -> Iterator[None]:
    """Compute packed attention as an Ampere GPU would, for tensors without data, which need no GPU."""
    token = _assumed_gpu.set(True)
    try:
        yield
    finally:
        _assumed_gpu.reset(token)


def varlen_supports(query: torch.Tensor, scaling: float | None, window: int | None) -> bool:
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


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """Return [1, T, heads, head_dim of value] from torch's variable-length flash kernel: one launch for the row.

    `boundaries` are the `cu_seqlens` of queries and of keys, `longest` the lengths of the longest documents in both.
    """
    # Options have changed between torch releases, see VARLEN_OPTIONS.
    options: dict = {"scale": scaling} if "scale" in VARLEN_OPTIONS else {}
    if "window_size" in VARLEN_OPTIONS:
        reach = -1 if window is None else window - 1
        options["window_size"] = (reach, 0 if causal else reach)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = repeat_heads(query, key), repeat_heads(query, value)

    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # multi-head latent attention, but the kernel supports only one head_dim
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: torch.Tensor = varlen_attn(query, key, value, *boundaries, *longest, **options)  # type: ignore
    return output[None, ..., :value_dim]


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """Compute the attention of one document by torch's fused kernel.

    On a CPU one call per document was 1.1 to 10 times faster than a padded [documents, heads, longest, head_dim] batch
    and 2 to 20 times faster than one masked row, for 40 short documents and for one long one, forward and backward.
    """
    queries, keys = query.shape[2], key.shape[2]
    on_cpu = is_on_cpu(query)
    if not on_cpu:  # with enable_gqa, CUDA has no fused float32 kernel and stores the full score matrix
        key, value = repeat_heads(query, key), repeat_heads(query, value)
    # A mask excludes is_causal, which with more keys than queries means that the first query sees the first key only.
    masked = (causal and queries != keys) or (window is not None and keys > window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_visible_keys(queries, keys, window, query.device, causal) if masked else None,
        is_causal=causal and not masked,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=on_cpu and query.shape[1] != key.shape[1],
    )


class DocumentGroups(NamedTuple):
    """Documents of similar length of a packed row of T tokens, to be computed together.

    `places` has for each group where its tokens stand in the row, int64 [documents * longest]; behind the end of a document
    the place of its last token is repeated. `lengths` are int64 [documents]. `order`, int64 [T], is where each token of
    the row stands in the groups, one after the other.
    """

    places: list[torch.Tensor]
    lengths: list[torch.Tensor]
    order: torch.Tensor


def group_documents(lengths: list[int], device: torch.device) -> DocumentGroups:
    """Group the documents of a row: the longest of a group is at most GROUP_RATIO times, or GROUP_TOKENS over, the shortest."""
    sizes = np.array(lengths)
    starts, by_size = np.cumsum(sizes) - sizes, np.argsort(sizes, kind="stable")
    order, groups, end, first = np.empty(sizes.sum(), np.int64), [], 0, 0
    for k in range(1, len(sizes) + 1):
        shortest = sizes[by_size[first]]
        if k < len(sizes) and sizes[by_size[k]] <= max(GROUP_RATIO * shortest, shortest + GROUP_TOKENS):
            continue
        documents, first = by_size[first:k], k
        own = sizes[documents][:, None]
        columns = np.arange(own.max())
        places = starts[documents][:, None] + np.minimum(columns, own - 1)
        inside = columns < own
        order[places[inside]] = end + np.flatnonzero(inside)
        end += places.size
        groups.append((torch.from_numpy(places.ravel()).to(device), torch.from_numpy(own[:, 0]).to(device)))
    return DocumentGroups([p for p, _ in groups], [n for _, n in groups], torch.from_numpy(order).to(device))


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: DocumentGroups,
    dropout: float,
    scaling: float | None,
    window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """Return [1, T, heads, head_dim of value], computed by one call of torch's kernel for each of `groups`.

    With dropout torch 2.13 has no fused kernel on a CPU: a call for each of 33 short documents of a row took 40% of the
    time of a step of a small BERT.
    """
    outputs = []
    for places, lengths in zip(groups.places, groups.lengths, strict=True):
        # [documents, heads, longest, head_dim] of each
        queries, keys, values = (
            tensor[0].transpose(0, 1).index_select(0, places).unflatten(0, (len(lengths), -1)).transpose(1, 2)
            for tensor in (query, key, value)
        )
        longest = queries.shape[2]
        inside = torch.arange(longest, device=query.device) < lengths[:, None]
        visible = inside[:, None, None]
        if causal or (window is not None and window < longest):
            # What stands behind the end of a document may see everything: with no key at all its result would be NaN.
            visible = (
                visible & _visible_keys(longest, longest, window, query.device, causal) | ~inside[:, None, :, None]
            )
        keys, values = repeat_heads(queries, keys), repeat_heads(queries, values)
        output = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, dropout_p=dropout, scale=scaling
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, groups.order)[None]


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    causal: bool = True,
) -> torch.Tensor:
    """Compute one document's attention with explicit scores, queries x keys of them: no fused kernel has these terms."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ repeat_heads(query, key).transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    visible = _visible_keys(query.shape[2], key.shape[2], window, query.device, causal)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # one extra score per head: it takes part in the softmax, but has no value
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ repeat_heads(query, value)


def _visible_keys(
    queries: int, keys: int, window: int | None, device: torch.device, causal: bool = True
) -> torch.Tensor:
    """Return bool [queries, keys]: which keys of a document each query sees; the last query stands at the last key."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril(keys - queries)
    elif window is not None:
        visible = visible.tril(keys - queries + window - 1)
    return visible if window is None else visible.triu(keys - queries + 1 - window)


def is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not _assumed_gpu.get()


def repeat_heads(query: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor
