"""Batches of texts with targets, for models that give scores of whole texts."""

import numpy as np
import torch

from accel_llm.chat.targets import IGNORED
from accel_llm.data.batches import Batch, join_documents, stack_documents, with_virtual_tokens
from accel_llm.data.labels import SINGLE_LABEL
from accel_llm.data.rows import Rows


def collate_texts(rows: Rows, indices: list[int], packed: bool, pad_token_id: int, virtual: int = 0) -> Batch:
    """Make a batch of the texts at `indices`: packed into one row, or padded to the longest.

    What the model reads is that of `join_documents` or `stack_documents`, with `token_type_ids`, int64 of the shape of
    `input_ids`, if the rows have them: 1 from the second text of a pair on, 0 before it and for padding.

    `first_positions` and `last_positions`, int64 [texts], are the places of the first and the last token of each text
    in the flattened rows. The `virtual` places before a text do not belong to it; their token type is 0.

    `targets` are class numbers, int64 [texts], or float32 [texts, labels]. `row_indices` lists the indices,
    `num_targets` is their number, and `total_weight` the number to divide the summed loss by: their number, or the sum
    of the weights of their classes. `problem_type` is that of the rows, and `class_weights`, float64 [labels], is there if
    the rows have some. Without any index the batch has one text of two tokens with a target that is not to
    be counted: `num_targets` and `total_weight` are 0, so the loss is a sum over `scores[:num_targets]`.
    """
    assert rows.targets is not None
    empty_row = (np.full(2, pad_token_id, np.int32), np.full(2, IGNORED, np.int32))
    documents, _ = with_virtual_tokens([rows[k] for k in indices] or [empty_row], None, virtual)
    seconds = None if rows.second_start is None else rows.second_start[indices].tolist()
    batch = place_texts([ids for ids, _ in documents], seconds, packed, pad_token_id, virtual)
    targets = rows.targets[indices] if indices else np.zeros((1, rows.targets.shape[1]), np.float32)
    total = float(len(indices))
    if rows.problem_type == SINGLE_LABEL:
        targets = targets[:, 0].astype(np.int64)
        if rows.class_weights is not None and indices:
            total = float(rows.class_weights[targets].sum(dtype=np.float64))
    if rows.class_weights is not None:
        batch["class_weights"] = torch.from_numpy(np.array(rows.class_weights, np.float64))
    return batch | {
        "targets": torch.from_numpy(np.array(targets)),
        "total_weight": total,
        "num_targets": len(indices),
        "row_indices": list(indices),
        "problem_type": rows.problem_type,
    }


def place_texts(
    ids: list[np.ndarray], second_start: list[int] | None, packed: bool, pad_token_id: int, virtual: int = 0
) -> Batch:
    """Return what a model reads of texts with token ids [n], and where each begins and ends; see `collate_texts`.

    `second_start` are the places in each text where token types turn from 0 to 1, None if there are no types. Of the
    ids the first `virtual` are not those of the text.
    """
    if packed:
        batch = join_documents(ids, virtual=virtual)
        starts = np.cumsum([0, *batch["lengths"][:-1]])
    else:
        batch = stack_documents(ids, pad_token_id, virtual)
        starts = np.arange(len(ids)) * batch["input_ids"].shape[1]
    ends = starts + batch["lengths"]
    if second_start is not None:
        types = np.zeros(batch["input_ids"].numel(), np.int64)
        for start, end, second in zip(starts, ends, second_start, strict=False):
            types[start + virtual + second : end] = 1
        batch["token_type_ids"] = torch.from_numpy(types.reshape(batch["input_ids"].shape))
    return batch | {
        "first_positions": torch.from_numpy(starts + virtual),
        "last_positions": torch.from_numpy(ends - 1),
    }
