"""Turn encoded rows into a batch of tensors, and count the targets in a batch."""

from typing import Any

import numpy as np
import torch

from accel_llm.chat.targets import IGNORED
from accel_llm.data.rows import Rows

Batch = dict[str, Any]


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Return how many of `labels` [B, L] the loss sums over, int64 []. The first token of a row is never a target."""
    return (labels[:, 1:] != IGNORED).sum()


def total_weight(batch: dict) -> torch.Tensor:
    """Return the number to divide the summed loss of `batch` by, float64 []: its targets, each times its weight.

    Without `weights` in the batch every target counts 1.
    """
    if "weights" not in batch:
        return count_targets(batch["labels"]).double()
    return batch["weights"][:, 1:].double()[batch["labels"][:, 1:] != IGNORED].sum()


def collate_packed(rows: list[tuple[np.ndarray, np.ndarray]], weights: list[np.ndarray] | None = None) -> dict:
    """Concatenate documents (ids [n], labels [n]) into one row of T tokens without padding.

    `input_ids`, `labels` and `position_ids` are int64 [1, T]; positions start at 0 in each document. `cu_seqlens`,
    int32 [documents + 1], holds the boundaries from 0 to T, and `max_seqlen` is the length of the longest document.
    With `weights` (an array [n] for each document) the batch also has `weights`, float32 [1, T].

    The first token of a document is never a label, because no token of the same document comes before it.
    """
    # Where each document starts and ends in the row.
    lengths = np.array([len(ids) for ids, _ in rows])
    ends = np.cumsum(lengths)
    starts = ends - lengths

    # np.concatenate copies, so this does not change the labels of the caller.
    labels = np.concatenate([row_labels for _, row_labels in rows])
    labels[starts] = IGNORED

    batch = {} if weights is None else {"weights": torch.from_numpy(np.concatenate(weights))[None]}
    return batch | {
        "input_ids": _as_one_row(np.concatenate([ids for ids, _ in rows])),
        "labels": _as_one_row(labels),
        "position_ids": _as_one_row(np.arange(ends[-1]) - np.repeat(starts, lengths)),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }


def _as_one_row(values: np.ndarray) -> torch.Tensor:
    """Convert values [T] to an int64 tensor [1, T]."""
    return torch.from_numpy(values.astype(np.int64, copy=False))[None]


def collate_padded(
    rows: list[tuple[np.ndarray, np.ndarray]], pad_token_id: int, weights: list[np.ndarray] | None = None
) -> dict:
    """Stack B documents (ids [n], labels [n]) and pad them on the right to the longest one, L tokens.

    `input_ids`, `labels` and `attention_mask` are int64 [B, L]. With `weights` (an array [n] for each document) the
    batch also has `weights`, float32 [B, L]. Padding is never a label and never attended to, whatever `pad_token_id`
    is.
    """
    # Start from tensors that are all padding.
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)

    # Write each document over the left part of its row.
    for i, (ids, row_labels) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
        labels[i, : len(ids)] = torch.from_numpy(np.asarray(row_labels, np.int64))
        attention_mask[i, : len(ids)] = 1
    # Prompt tuning puts virtual tokens before the row; a labeled first token would then be a target nobody counted.
    labels[:, 0] = IGNORED

    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    if weights is not None:
        batch["weights"] = torch.ones(shape)
        for i, row_weights in enumerate(weights):
            batch["weights"][i, : len(row_weights)] = torch.from_numpy(np.asarray(row_weights, np.float32))
    return batch


def collate(rows: Rows, indices: list[int], packed: bool, pad_token_id: int) -> Batch:
    """Make a batch of the rows at `indices`: packed into one row, or padded to the longest.

    Without any index the batch is one row of two tokens without a label. It adds nothing to a sum or a count.
    """
    empty_row = (np.full(2, pad_token_id, np.int32), np.full(2, IGNORED, np.int32))
    documents, weights = [rows[k] for k in indices] or [empty_row], rows.label_weights(indices)
    return collate_packed(documents, weights) if packed else collate_padded(documents, pad_token_id, weights)
