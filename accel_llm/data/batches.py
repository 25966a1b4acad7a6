"""Turn encoded rows into a batch: tensors for the device, and numbers that the host needs.

The host knows lengths, counts and places when it makes the batch. Later it would have to wait for the device to read
them from the tensors.
"""

from typing import Any

import numpy as np
import torch

from accel_llm.chat.targets import IGNORED
from accel_llm.data.rows import Rows

Batch = dict[str, Any]


def _targets(labels: np.ndarray, weights: np.ndarray | None) -> dict:
    """Return where the targets of labels [B, L] are, and what they add up to; see `collate_packed`."""
    rows, columns = np.nonzero(labels[:, 1:] != IGNORED)
    weight = len(rows) if weights is None else weights[:, 1:][rows, columns].sum(dtype=np.float64)
    return {
        "target_positions": torch.from_numpy(rows * labels.shape[1] + columns),
        # One column at least: every process must take part in the backward pass.
        "target_columns": torch.from_numpy(np.unique(columns) if len(columns) else np.zeros(1, np.int64)),
        "num_targets": len(rows),
        "total_weight": float(weight),
    }


def collate_packed(
    rows: list[tuple[np.ndarray, np.ndarray]], weights: list[np.ndarray] | None = None, virtual: int = 0
) -> dict:
    """Concatenate documents (ids [n], labels [n]) into one row of T tokens without padding.

    `input_ids`, `labels` and `position_ids` are int64 [1, T]; positions start at 0 in each document. `cu_seqlens`,
    int32 [documents + 1], holds the boundaries from 0 to T, and `max_seqlen` is the length of the longest document.
    With `weights` (an array [n] for each document) the batch also has `weights`, float32 [1, T].

    The first token of a document is never a label, because no token of the same document comes before it. Position i
    predicts token i + 1, so a label at i + 1 is the target of position i. `target_positions`, int64 [targets], are such
    positions in the flattened rows, and `target_columns`, int64, those in a row that have a target in any row.
    `num_targets` is their number, and `total_weight` the number to divide the summed loss by: the sum of the weights of
    the targets, or without `weights` their number. `lengths` lists the length of each document.

    With `virtual` each document begins with that many more tokens, whose places a prompt-learning method fills: they
    count in lengths, boundaries and positions and are no labels, and what ids they have does not matter.
    `virtual_positions`, int64 [documents * virtual], are their places in the flattened rows.
    """
    rows, weights = with_virtual_tokens(rows, weights, virtual)
    batch = join_documents([ids for ids, _ in rows], virtual=virtual)
    # np.concatenate copies, so this does not change the labels of the caller.
    labels = np.concatenate([row_labels for _, row_labels in rows])
    labels[np.cumsum([0, *batch["lengths"][:-1]])] = IGNORED  # the tensors may be without data
    row_weights = None if weights is None else np.concatenate(weights)[None]
    batch |= {} if row_weights is None else {"weights": torch.from_numpy(row_weights)}
    return batch | {"labels": _as_one_row(labels)} | _targets(labels[None], row_weights)


def join_documents(documents: list[np.ndarray], first_positions: list[int] | None = None, virtual: int = 0) -> Batch:
    """Return a packed row of documents without what the loss needs; see `collate_packed`.

    `first_positions` are where the positions of each document begin, if not at 0.
    """
    # Where each document starts and ends in the row.
    lengths = np.array([len(ids) for ids in documents])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    shifts = starts if first_positions is None else starts - first_positions
    return _virtual_positions(starts, virtual) | {
        "input_ids": _as_one_row(np.concatenate(documents)),
        "position_ids": _as_one_row(np.arange(ends[-1]) - np.repeat(shifts, lengths)),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        "max_seqlen": int(lengths.max()),
        "lengths": lengths.tolist(),
    }


def _as_one_row(values: np.ndarray) -> torch.Tensor:
    """Convert values [T] to an int64 tensor [1, T]."""
    return torch.from_numpy(values.astype(np.int64, copy=False))[None]


def with_virtual_tokens(
    rows: list[tuple[np.ndarray, np.ndarray]], weights: list[np.ndarray] | None, count: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray] | None]:
    """Put `count` places before each document, without labels; its first token is no label with them either."""
    if not count:
        return rows, weights
    empty = np.full(count, IGNORED, np.int64)
    rows = [
        (np.concatenate([ids[:1].repeat(count), ids]), np.concatenate([empty, [IGNORED], labels[1:]]))
        for ids, labels in rows
    ]
    return rows, weights and [np.concatenate([np.zeros(count, np.float32), values]) for values in weights]


def _virtual_positions(starts: np.ndarray, count: int) -> dict:
    """Return the places of the virtual tokens of documents that begin at `starts` of the flattened rows."""
    if not count:
        return {}
    return {"virtual_positions": torch.from_numpy((starts[:, None] + np.arange(count)).ravel())}


def collate_padded(
    rows: list[tuple[np.ndarray, np.ndarray]],
    pad_token_id: int,
    weights: list[np.ndarray] | None = None,
    virtual: int = 0,
) -> dict:
    """Stack B documents (ids [n], labels [n]) and pad them on the right to the longest one, L tokens.

    `input_ids`, `labels` and `attention_mask` are int64 [B, L]. With `weights` (an array [n] for each document) the
    batch also has `weights`, float32 [B, L]. Padding is never a label and never attended to, whatever `pad_token_id`
    is. What the batch says of targets, lengths and virtual tokens is described at `collate_packed`.
    """
    rows, weights = with_virtual_tokens(rows, weights, virtual)
    batch = stack_documents([ids for ids, _ in rows], pad_token_id, virtual)
    # Start from arrays that are all padding, and write each document over the left part of its row.
    shape = batch["input_ids"].shape
    labels, token_weights = np.full(shape, IGNORED, np.int64), np.ones(shape, np.float32)
    for i, (ids, row_labels) in enumerate(rows):
        labels[i, : len(ids)] = row_labels
        if weights is not None:
            token_weights[i, : len(ids)] = weights[i]
    labels[:, 0] = IGNORED
    if weights is not None:
        batch["weights"] = torch.from_numpy(token_weights)
    return batch | {"labels": torch.from_numpy(labels)} | _targets(labels, None if weights is None else token_weights)


def stack_documents(documents: list[np.ndarray], pad_token_id: int, virtual: int = 0) -> Batch:
    """Return padded rows of documents without what the loss needs; see `collate_padded`."""
    shape = len(documents), max(map(len, documents))
    input_ids, attention_mask = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    for i, ids in enumerate(documents):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
    return _virtual_positions(np.arange(len(documents)) * shape[1], virtual) | {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "lengths": [len(ids) for ids in documents],
    }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Copy the tensors of a batch to `device` by `start_copy`; other values stay as they are.

    `input_ids.on_host` are the ids on the CPU, for an embedding that stays there (model/offloaded_embedding.py).
    """
    copies: Batch = {name: start_copy(v, device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    if torch.device(device).type != "cpu":
        copies["input_ids"].on_host = batch["input_ids"]
    return copies


def start_copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a copy of a CPU tensor on `device`, where it may arrive later; the host does not wait for it."""
    # Only pinned memory is copied while the host goes on.
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def collate(rows: Rows, indices: list[int], packed: bool, pad_token_id: int, virtual: int = 0) -> Batch:
    """Make a batch of the rows at `indices`: packed into one row, or padded to the longest.

    Each row begins with `virtual` places for the tokens of a prompt-learning method.

    Without any index the batch is one row of two tokens without a label. It adds nothing to a sum or a count.
    """
    empty_row = (np.full(2, pad_token_id, np.int32), np.full(2, IGNORED, np.int32))
    documents, weights = [rows[k] for k in indices] or [empty_row], rows.label_weights(indices)
    if packed:
        return collate_packed(documents, weights, virtual)
    return collate_padded(documents, pad_token_id, weights, virtual)


def attend_across(batch: Batch, counts: list[int]) -> None:
    """Make one document of the first `counts[0]` documents of a packed batch, of the next `counts[1]`, and so on.

    So the tokens of a document see those of the documents before it, and their positions go on. What is trained stays as
    it is: the first token of a document is no label.
    """
    lengths = np.array(batch["lengths"])
    if counts:
        lengths = np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
    ends = np.cumsum(lengths)
    batch["position_ids"] = _as_one_row(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths))
    batch["cu_seqlens"] = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    batch["max_seqlen"], batch["lengths"] = int(lengths.max()), lengths.tolist()
