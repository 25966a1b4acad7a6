"""Encoded rows become a batch of tensors, and the targets in it are counted."""

from typing import Any

import numpy as np
import torch

from accel_llm.chat.targets import IGNORED
from accel_llm.data.rows import Rows

Batch = dict[str, Any]


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """How many of `labels` [B, L] the loss sums over, int64 []: a row's first token has nothing to predict it."""
    return (labels[:, 1:] != IGNORED).sum()


def total_weight(batch: dict) -> torch.Tensor:
    """What the loss of a batch is to be divided by, float64 []: its targets, each times its weight if it has one."""
    if "weights" not in batch:
        return count_targets(batch["labels"]).double()
    return batch["weights"][:, 1:].double()[batch["labels"][:, 1:] != IGNORED].sum()


def collate_packed(rows: list[tuple[np.ndarray, np.ndarray]], weights: list[np.ndarray] | None = None) -> dict:
    """Concatenate documents (ids [n], labels [n]) to one padding-free row of T tokens.

    `input_ids`, `labels` and `position_ids` (0 at each document's start) are int64 [1, T]; `cu_seqlens` int32
    [documents + 1] holds the boundaries from 0 to T, `max_seqlen` the longest document. The first token of a
    document is never a label: nothing before it in the row may predict it. With `weights` of each document [n] the
    batch has `weights` too, float32 [1, T].
    """
    lengths = np.array([len(ids) for ids, _ in rows])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    labels = np.concatenate([row_labels for _, row_labels in rows])
    labels[starts] = IGNORED
    weighted = {} if weights is None else {"weights": torch.from_numpy(np.concatenate(weights))[None]}
    return weighted | {
        "input_ids": _row(np.concatenate([ids for ids, _ in rows])),
        "labels": _row(labels),
        "position_ids": _row(np.arange(ends[-1]) - np.repeat(starts, lengths)),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))[None]


def collate_padded(
    rows: list[tuple[np.ndarray, np.ndarray]], pad_token_id: int, weights: list[np.ndarray] | None = None
) -> dict:
    """Stack documents (ids [n], labels [n]) to `input_ids`, `labels`, `attention_mask`, int64 [B, longest]; with
    `weights` of each document [n] also `weights`, float32 [B, longest].

    Padding stands on the right, is never a label and never attended to, whatever token it is. A first token is never a
    label here either: behind the virtual tokens of prompt tuning it would be one more target than was counted.
    """
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for i, (ids, row_labels) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
        labels[i, : len(ids)] = torch.from_numpy(np.asarray(row_labels, np.int64))
        attention_mask[i, : len(ids)] = 1
    labels[:, 0] = IGNORED
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    if weights is not None:
        batch["weights"] = torch.ones(shape)
        for i, row_weights in enumerate(weights):
            batch["weights"][i, : len(row_weights)] = torch.from_numpy(np.asarray(row_weights, np.float32))
    return batch


def collate(rows: Rows, chosen: list[int], packed: bool, pad_token_id: int) -> Batch:
    """The batch of the rows with the indices `chosen`, packed into one row or padded to the longest.

    A slot without a row holds two tokens with no label, which add nothing to a sum or a count.
    """
    empty = (np.full(2, pad_token_id, np.int32), np.full(2, IGNORED, np.int32))
    documents, weights = [rows[k] for k in chosen] or [empty], rows.weights_of(chosen)
    return collate_packed(documents, weights) if packed else collate_padded(documents, pad_token_id, weights)
