"""Qwen 401: in a batch the `dynamic` NTK value of the longest prompt is used for all of them.

Seven short prompts beside a long one are rotated as if they were long. The same holds for a padded training batch, a
packed row and an evaluation: the loss of a document depends on what it is batched with. Right is the loss of each
document alone in plain transformers.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import scaled_model

from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.positions import scale_by_document


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_short_documents_beside_a_long_one_keep_their_loss(packed):
    rng = np.random.default_rng(0)
    rows = [(ids := rng.integers(3, 97, n), ids) for n in (6, 6, 6, 40, 6, 6)]  # scaled beyond 8 tokens
    expected = 0.0
    for ids, _ in rows:
        logits = scaled_model("llama dynamic")(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        expected += float(F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum"))

    losses = []
    for by_document in (True, False):
        model = scaled_model("llama dynamic")
        if by_document:
            scale_by_document(model)
        attach_loss(model, 128)
        if packed:
            enable_packing(model)
        losses.append(float(next_token_loss(model, collate_packed(rows) if packed else collate_padded(rows, 0))))
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert abs(losses[1] / expected - 1) > 1e-3
