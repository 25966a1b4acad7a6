"""Batches of pairs of answers, built by hand: padded, packed, and packed with prompts that stand in the row once."""

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import torch

from accel_llm.chat.targets import IGNORED
from accel_llm.data.batches import Batch, collate_packed, collate_padded

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # the prompt and its two answers
LAYOUTS = ("padded", "packed", "shared")


def random_pairs(
    lengths: Iterable[tuple[int, int, int]] = ((9, 3, 5), (2, 1, 4), (6, 7, 2)), seed: int = 0
) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 97, n) for n in three) for three in lengths]  # type: ignore[misc]


def separate_documents(pairs: list[Pair]) -> list[np.ndarray]:
    return [np.concatenate([prompt, answer]) for prompt, *answers in pairs for answer in answers]


def answer_batch(pairs: list[Pair], layout: str) -> Batch:
    """All tokens of all answers count. Without pairs it is a slot of two tokens."""
    if layout == "shared" and pairs:
        documents = [part for prompt, one, other in pairs for part in (np.concatenate([prompt, one]), other)]
    else:
        documents = separate_documents(pairs) or [np.zeros(2, np.int64)]
    rows = [(ids, np.full_like(ids, IGNORED)) for ids in documents]
    batch = collate_padded(rows, 0) if layout == "padded" else collate_packed(rows)
    width = batch["input_ids"].shape[1]
    starts = [0, *accumulate(map(len, documents))] if layout != "padded" else [k * width for k in range(len(documents))]

    answers = [answer for _, *two in pairs for answer in two]
    places = []
    for k, answer in enumerate(answers):
        prompt, start = len(pairs[k // 2][0]), starts[k]
        if (
            layout == "shared" and k % 2
        ):  # its first token is predicted at the end of the prompt, in the document before
            places += [starts[k - 1] + prompt - 1, *range(start, start + len(answer) - 1)]
        else:
            places += range(start + prompt - 1, start + prompt + len(answer) - 1)
    lengths = [len(answer) for answer in answers]
    batch |= {
        "answer_positions": torch.tensor(places, dtype=torch.int64),
        "answer_ids": torch.from_numpy(np.concatenate([*answers, np.zeros(0, np.int64)])),
        "answer_numbers": torch.arange(len(answers)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        "answer_lengths": lengths,
        "target_columns": torch.tensor(sorted({place % width for place in places}) or [0]),
        "total_weight": float(len(pairs)),
    }
    return batch | (key_places(pairs, starts) if layout == "shared" and pairs else {})


def key_places(pairs: list[Pair], starts: list[int]) -> Batch:
    """Where the keys of the documents are, which begin at `starts`: a second answer also has those of its prompt."""
    keys, positions = [], []
    for k, (prompt, one, other) in enumerate(pairs):
        first, second = starts[2 * k], starts[2 * k + 1]
        keys += [[*range(first, first + len(prompt) + len(one))]]
        keys += [[*range(first, first + len(prompt)), *range(second, second + len(other))]]
        positions += [*range(len(prompt) + len(one)), *range(len(prompt), len(prompt) + len(other))]
    lengths = [len(each) for each in keys]
    return {
        "position_ids": torch.tensor([positions]),
        "key_positions": torch.tensor([place for each in keys for place in each]),
        "key_lengths": lengths,
        "cu_seqlens_k": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seqlen_k": max(lengths),
    }
