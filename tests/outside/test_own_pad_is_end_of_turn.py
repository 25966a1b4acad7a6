"""Many models pad with the token that ends a turn, and torch never trains the row `padding_idx` of an embedding.

In a packed or padded batch no label and no attention depends on padding, so the row must get the gradient that calculus
gives: the one of an embedding without a padding index. With -1 (old Llama configs) it was the last row.
"""

import numpy as np
import pytest
import torch
from support import tiny_model

from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.model.loading import load_model
from accel_llm.model.loss import next_token_loss

END = 2
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("pad", [END, -1])
def test_the_row_of_the_pad_token_is_trained_where_it_ends_a_turn(tmp_path, pad, packing):
    plain = tiny_model("llama")
    plain.config.pad_token_id = pad
    plain.config.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    last = plain.config.vocab_size - 1
    documents = [np.array([5, END, 6, last, 7, END, 8]), np.array([9, END, last, 3])]

    model = load_model(TrainOptions(model_name_or_path=str(tmp_path), method="full", packing=packing, max_length=64))
    rows = [(ids, ids.copy()) for ids in documents]
    next_token_loss(model, collate_packed(rows) if packing else collate_padded(rows, END)).backward()

    double = plain.double()
    double.get_input_embeddings().padding_idx = None
    for ids in documents:
        tokens = torch.tensor(ids)[None]
        (double(input_ids=tokens, labels=tokens).loss * (len(ids) - 1)).backward()
    got, right = (m.get_input_embeddings().weight.grad.double() for m in (model, double))
    assert right[END].norm() > 0.1 and right[last].norm() > 0.1
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
