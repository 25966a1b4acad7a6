"""Answers beside a prompt that is not theirs, from which KTO estimates how far the policy is from the reference."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from accel_llm.chat.targets import IGNORED
from accel_llm.data.answers import collate_answers
from accel_llm.data.batches import Batch
from accel_llm.data.rows import Rows
from accel_llm.errors import DataError


@dataclass(frozen=True)
class MismatchedRows(Rows):
    """Rows in which row k is the prompt of row k of others, and the answer of their row `partners[k]`."""

    partners: np.ndarray = field(kw_only=True)  # int64 [rows]
    max_length: int = field(kw_only=True)  # an answer is cut where its row would be longer

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        (ids, labels), (other_ids, other_labels) = super().__getitem__(k), super().__getitem__(int(self.partners[k]))
        prompt, answer = first_label(labels), first_label(other_labels)
        joined = np.concatenate([ids[:prompt], other_ids[answer:]])[: self.max_length]
        targets = np.concatenate([np.full(prompt, IGNORED, labels.dtype), other_labels[answer:]])[: self.max_length]
        return joined, targets

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        prompts = np.array([first_label(super(MismatchedRows, self).__getitem__(k)[1]) for k in range(len(self))])
        return np.minimum(prompts + (np.diff(self.offsets) - prompts)[self.partners], self.max_length)


def first_label(labels: np.ndarray) -> int:
    """Return the place of the first label; what stands before is the prompt."""
    return int(np.argmax(labels != IGNORED))


def mismatch(rows: Rows, seed: int, max_length: int) -> MismatchedRows:
    """Return rows in which each prompt has the answer of another row, chosen by `seed` once for the whole run.

    So the reference's log-probability of each such pair is a column too, and a step's estimate does not depend on which
    rows happen to be in its batches. The paper (arXiv 2402.01306, section 4) shifts the answers of each micro-batch by
    one. Every answer is used once, and with another prompt than its own, as long as no prompt has more than half of the
    answers.

    Raises:
        DataError: all rows have the same prompt.
    """
    # Rows in a random order of the prompts, those of one together. Then each takes the answer that stands as many places
    # further on as the largest group has rows.
    prompts = [ids[: first_label(labels)].tobytes() for ids, labels in (rows[k] for k in range(len(rows)))]
    number_of = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(number_of) < 2:
        raise DataError(
            f"{rows.name(0)}: loss_type kto compares prompts with answers to other prompts, but all {len(rows):,} "
            "answers of train_files, or of eval_files, have one prompt; give more, or use loss_type: bco."
        )
    groups = np.array([number_of[prompt] for prompt in prompts])
    sizes = np.bincount(groups)
    order = np.argsort(np.random.default_rng(seed).permutation(len(sizes))[groups], kind="stable")
    partners = np.empty(len(rows), np.int64)
    partners[order] = np.roll(order, -min(int(sizes.max()), max(1, len(rows) - 1)))
    values: dict[str, Any] = {each.name: getattr(rows, each.name) for each in fields(Rows)} | {
        "label": None,
        "reference": None,
    }
    return MismatchedRows(**values, partners=partners, max_length=max_length)


def collate_with_mismatched(
    rows: Rows, indices: list[int], packed: bool, pad_token_id: int, virtual: int = 0, *, mismatched: MismatchedRows
) -> Batch:
    """Make a batch of answers with a label by `collate_answers`; its `mismatched` is the batch of the same rows mismatched."""
    batch = collate_answers(rows, indices, packed, pad_token_id, virtual)
    return batch | {"mismatched": collate_answers(mismatched, indices, packed, pad_token_id, virtual)}
