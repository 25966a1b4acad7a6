"""Answers to prompts, made by hand: as padded batches, and as rows; and a tiny random model to score them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support import make_rows, tiny_model

from accel_llm.chat.targets import IGNORED
from accel_llm.config.preference_options import DpoOptions
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.rows import Rows
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.loss import attach_loss

Document = tuple[list[int], list[int]]  # tokens of a prompt and of an answer


def answering_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = tiny_model("llama")
    attach_loss(model, 512)
    return model.train()


def random_documents(count: int, seed: int = 0, vocabulary: int = 60) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, vocabulary, rng.integers(2, 9)).tolist() for _ in range(2)) for _ in range(count)]


def answer_batch(documents: list[Document], units: int, **columns: Any) -> dict[str, Any]:
    """Padded to the longest; a batch without documents is two tokens without an answer."""
    longest = max((len(prompt + answer) for prompt, answer in documents), default=2)
    ids, mask = torch.zeros(max(len(documents), 1), longest, dtype=torch.long), None
    mask = torch.zeros_like(ids)
    positions, targets, numbers = [], [], []
    for row, (prompt, answer) in enumerate(documents):
        ids[row, : len(prompt + answer)] = torch.tensor(prompt + answer)
        mask[row, : len(prompt + answer)] = 1
        first = row * longest + len(prompt) - 1
        positions += range(first, first + len(answer))
        targets += answer
        numbers += [row] * len(answer)
    if not documents:
        mask[:] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= {"answer_positions": torch.tensor(positions, dtype=torch.long)}
    batch |= {"answer_ids": torch.tensor(targets, dtype=torch.long)}
    batch |= {"answer_numbers": torch.tensor(numbers, dtype=torch.long)}
    columns_used = sorted({place % longest for place in positions}) or [0]
    batch |= {"target_columns": torch.tensor(columns_used)}
    batch["answer_lengths"] = [len(answer) for _, answer in documents]
    batch["lengths"] = [len(prompt + answer) for prompt, answer in documents] or [2]
    return batch | {"total_weight": float(units), "num_targets": len(targets)} | columns


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in unwrap_causal_lm(model).parameters()])


DOCUMENTS = random_documents(24)


def single_rows(labels: list[int] | None = None) -> Rows:
    encoded = [(k // 2, p + a, [IGNORED] * len(p) + a) for k, (p, a) in enumerate(DOCUMENTS)]
    return replace(make_rows(encoded), label=None if labels is None else np.array(labels, np.int8))


def pair_rows() -> Pairs:
    """The prompt of each pair is that of its chosen answer."""
    encoded = []
    for k, (_, answer) in enumerate(DOCUMENTS):
        prompt = DOCUMENTS[k - k % 2][0]
        encoded.append((k // 2, prompt + answer, [IGNORED] * len(prompt) + answer))
    shared = np.array([len(DOCUMENTS[k - k % 2][0]) for k in range(24)], np.int32)
    return as_units(replace(make_rows(encoded), shared=shared), False)  # type: ignore


def dpo_options(**changes: Any) -> DpoOptions:
    return DpoOptions(**{"max_length": 64, "packing": False, "per_device_eval_batch_size": 5} | changes)
