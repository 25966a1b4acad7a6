"""Units of preference training: pairs of answers, which stay together, or single answers with a label; and their batches.

Both answers of a pair begin with the same prompt. A packed row holds it once: after it comes the chosen answer, then
the rejected one, whose tokens attend to the prompt and to each other, not to the chosen answer.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from accel_llm.chat.targets import IGNORED
from accel_llm.data.batches import Batch, join_documents, stack_documents, with_virtual_tokens
from accel_llm.data.rows import Rows
from accel_llm.errors import DataError


@dataclass(frozen=True)
class Pairs:
    """Rows of answers as pairs: pair k is the rows 2k (chosen) and 2k + 1 (rejected).

    With `share_prompts` a packed row holds the prompt of a pair once, else once before each answer.
    """

    rows: Rows
    share_prompts: bool = True
    rows_per_unit: ClassVar[int] = 2

    def __len__(self) -> int:
        return len(self.rows) // 2

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair as it stands in a packed row, int64 [pairs]."""
        both = np.diff(self.rows.offsets[::2])
        return both if self.rows.shared is None or not self.share_prompts else both - self.rows.shared[::2]

    @property
    def source(self) -> np.ndarray:
        """The number of each pair's training source (-1: an evaluation source), int64 [pairs]."""
        return self.rows.source[::2]

    @property
    def digest(self) -> np.ndarray:
        """A hash of each pair, uint64 [pairs], to find equal ones."""
        return self.rows.digest[::2]

    def name(self, k: int) -> str:
        """Return file and row of pair k, as messages name it."""
        return self.rows.name(2 * k)


def as_units(rows: Rows, share_prompts: bool = True) -> Rows | Pairs:
    """Return what is packed and counted: pairs if the rows are pairs of answers, else the rows themselves."""
    return rows if rows.shared is None else Pairs(rows, share_prompts)


def count_labels(labels: np.ndarray) -> str:
    """Return a sentence with the numbers of desirable and undesirable answers; there are some of both.

    Raises:
        DataError: all answers have the same label.
    """
    desirable = int(labels.sum())
    if desirable in (0, len(labels)):
        found, missing = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
        raise DataError(
            f"train_files: all {len(labels):,} answers are {found}; KTO needs {missing} ones too, so add such rows, or "
            "train with launch/sft.py."
        )
    return f"Answers to train on: {desirable:,} desirable, {len(labels) - desirable:,} undesirable."


def advise_weights(labels: np.ndarray, desirable_weight: float, undesirable_weight: float) -> str | None:
    """Return advice if the two kinds of answers are weighted far from how the paper weights them, else None.

    KTO (arXiv 2402.01306, section 4.2) lets all desirable answers together count 1 to 4/3 times as much as the others.
    """
    desirable = int(labels.sum())
    undesirable = len(labels) - desirable
    if not desirable_weight or not undesirable_weight:  # one kind is left out on purpose
        return None
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if 0.8 <= ratio <= 1.6:
        return None
    name, weight = "desirable_weight", desirable_weight / ratio
    if ratio > 1:
        name, weight = "undesirable_weight", undesirable_weight * ratio
    return (
        f"{name}: all desirable answers together weigh {ratio:.2g} times as much as the undesirable ones; the KTO paper "
        f"has 1 to 4/3. {weight:.2g} makes it 1."
    )


def collate_answers(rows: Rows | Pairs, units: list[int], packed: bool, pad_token_id: int, virtual: int = 0) -> Batch:
    """Make a batch of the pairs, or of the answers, at `units`: packed into one row, or padded to the longest answer.

    What the model reads is that of `collate_packed` or `collate_padded`; labels are given as lists of targets. Target j
    is the token `answer_ids[j]`; it is predicted at place `answer_positions[j]` of the flattened rows, where another
    target may be predicted too, and belongs to answer `answer_numbers[j]`: int64 [n] each, by answers in their order.
    Pair i has the answers 2i (chosen) and 2i + 1 (rejected). `answer_lengths` lists the targets of each answer,
    `last_positions`, int64 [answers], is the place of its last token, `num_targets` is n, `total_weight` the number
    of units. `target_columns` are the columns with a target in any row.

    In a packed row whose pairs share their prompt, the tokens of a rejected answer are a document of their own: its
    positions go on after the prompt. `key_positions`, int64 [K], are the places of the keys of each document, one after
    the other: for a rejected answer the prompt's, then its own. `key_lengths`, `cu_seqlens_k` (int32) and
    `max_seqlen_k` are their numbers, boundaries and the most.

    Where the rows have them, there are `reference`, float64 [answers], `labels_of_answers`, bool [answers], and
    `margins`, float32 [units]. Without any unit the batch has two tokens and no answer: it adds nothing to a sum.
    """
    table, indices = rows, units
    if isinstance(rows, Pairs):
        table, indices = rows.rows, [row for k in units for row in (2 * k, 2 * k + 1)]
    assert isinstance(table, Rows)
    sharing = isinstance(rows, Pairs) and packed and rows.share_prompts and not virtual and table.shared is not None
    documents, _ = with_virtual_tokens([table[k] for k in indices], None, virtual)
    empty = [np.full(2, pad_token_id, np.int32)]

    # The tokens of each answer that stand elsewhere in the row: the shared prompt, if it is a rejected one.
    left_out = [int(table.shared[k]) if sharing and k % 2 else 0 for k in indices]  # type: ignore
    own = [ids[count:] for (ids, _), count in zip(documents, left_out, strict=True)] or empty
    if packed:
        batch = join_documents(own, left_out or None, virtual)
        starts = np.cumsum([0, *batch["lengths"][:-1]])
    else:
        batch = stack_documents(own, pad_token_id, virtual)
        starts = np.arange(len(own)) * batch["input_ids"].shape[1]
    batch |= _answer_targets(documents, starts, left_out, batch["input_ids"].shape[1])
    if sharing:
        batch |= _keys(starts, batch["lengths"], left_out or [0])
    batch["total_weight"] = float(len(units))
    if table.reference is not None:
        batch["reference"] = torch.from_numpy(table.reference[indices].astype(np.float64))
    if table.label is not None:
        batch["labels_of_answers"] = torch.from_numpy(table.label[indices] == 1)
    if table.margin is not None:
        batch["margins"] = torch.from_numpy(table.margin[indices[::2]].astype(np.float32))
    return batch


def _answer_targets(
    documents: list[tuple[np.ndarray, np.ndarray]], starts: np.ndarray, left_out: list[int], row_length: int
) -> Batch:
    """Return where the targets of the answers are predicted; see `collate_answers`.

    The first `left_out` tokens of an answer stand where they stand in the answer before it.
    """
    positions, ids, lengths, last = [], [], [], []
    for k, ((_, labels), count) in enumerate(zip(documents, left_out, strict=True)):
        targets = np.flatnonzero(labels[1:] != IGNORED)  # the places of the tokens before them
        before = int(starts[k - 1]) if count else 0
        positions.append(np.where(targets < count, before + targets, starts[k] + targets - count))
        ids.append(labels[1:][targets])
        lengths.append(len(targets))
        last.append(int(starts[k]) + len(labels) - 1 - count)
    flat = np.concatenate([np.zeros(0, np.int64), *positions])
    return {
        "answer_positions": torch.from_numpy(flat),
        "answer_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.int64)),
        "answer_numbers": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        "answer_lengths": lengths,
        "last_positions": torch.tensor(last, dtype=torch.int64),
        # One column at least, as in `collate_packed`.
        "target_columns": torch.from_numpy(np.unique(flat % row_length) if len(flat) else np.zeros(1, np.int64)),
        "num_targets": len(flat),
    }


def _keys(starts: np.ndarray, lengths: list[int], left_out: list[int]) -> Batch:
    """Return the keys of documents that attend to the first `left_out` tokens of the document before, and to their own."""
    parts = []
    for k, (length, count) in enumerate(zip(lengths, left_out, strict=True)):
        if count:
            parts.append(np.arange(starts[k - 1], starts[k - 1] + count))
        parts.append(np.arange(starts[k], starts[k] + length))
    key_lengths = [length + count for length, count in zip(lengths, left_out, strict=True)]
    return {
        "key_positions": torch.from_numpy(np.concatenate(parts)),
        "cu_seqlens_k": torch.from_numpy(np.cumsum([0, *key_lengths], dtype=np.int32)),
        "max_seqlen_k": max(key_lengths),
        "key_lengths": key_lengths,
    }
