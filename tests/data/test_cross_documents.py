"""Cross-document attention: by choice a document sees those before it in its packed row, as in blocks of joined text."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import make_rows, random_rows, tiny_model

from accel_llm.chat.targets import IGNORED
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.rows import Rows
from accel_llm.data.stream import Position, Stream
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss, next_token_loss


def rows() -> Rows:
    return make_rows((k, ids.tolist(), labels.tolist()) for k, (ids, labels) in enumerate(random_rows(30, 20)))


def stream(**more: Any) -> Stream:
    options = PretrainOptions(**{"config_name": "x", "max_length": 48, "max_steps": 3} | more)
    return Stream(rows(), options, Position(), 0)


def plain_loss(model: Any, documents: list[list[int]], data: Rows, joined: bool) -> float:
    """Plain transformers: each packed row as one text, or each document by itself. Labels as they are in the data."""
    texts = documents if joined else [[k] for part in documents for k in part]
    total = 0.0
    for text in texts:
        ids = torch.tensor(np.concatenate([data[k][0] for k in text]).astype(np.int64))
        labels = torch.cat([torch.tensor([IGNORED, *data[k][1][1:].tolist()]) for k in text])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits.double(), labels[1:], reduction="sum", ignore_index=IGNORED))
    return total


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("across", [False, True])
def test_the_loss_is_that_of_plain_transformers(across, size):
    model, oracle = tiny_model("llama"), tiny_model("llama")
    attach_loss(model, 1024)
    enable_packing(model)
    opened = stream(cross_document_attention=across, per_device_train_batch_size=size)
    for step in range(2):
        documents = [opened.documents(step * size + k) for k in range(size)]
        with torch.no_grad():
            loss = float(next_token_loss(model, opened.micro_batch(step, 0)))
        assert loss == pytest.approx(plain_loss(oracle, documents, opened.rows, across), rel=1e-5)
        assert loss != pytest.approx(plain_loss(oracle, documents, opened.rows, not across), rel=1e-4)


def test_off_by_default_and_nothing_but_boundaries_and_positions_changes():
    plain, apart, across = (
        stream(**more).micro_batch(0, 0)
        for more in ({}, {"cross_document_attention": False}, {"cross_document_attention": True})
    )
    assert plain.keys() == apart.keys() == across.keys()
    changed = {"position_ids", "cu_seqlens", "max_seqlen", "lengths"}
    for name, value in plain.items():
        equal = torch.equal(value, across[name]) if isinstance(value, torch.Tensor) else value == across[name]
        assert equal == (name not in changed), name
        assert torch.equal(value, apart[name]) if isinstance(value, torch.Tensor) else value == apart[name]
    assert across["lengths"] == [sum(plain["lengths"])] and across["position_ids"].tolist() == [
        list(range(sum(plain["lengths"])))
    ]


def test_it_needs_packing_and_an_empty_slot_stays_empty(monkeypatch):
    problems = PretrainOptions(
        config_name="x", cross_document_attention=True, packing=False, train_files=["a"]
    ).problems()
    assert any(problem.startswith("cross_document_attention: without packing") for problem in problems)
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = PretrainOptions(
        config_name="x", max_length=48, cross_document_attention=True, total_batch_size=1, max_steps=1
    )
    ranks = [Stream(rows(), options, Position(rank=rank, world=3), 0).micro_batch(0, 0) for rank in range(3)]
    assert sorted(batch["num_targets"] > 0 for batch in ranks) == [False, False, True]
    assert [batch["lengths"] for batch in ranks if not batch["num_targets"]] == [[2], [2]]
