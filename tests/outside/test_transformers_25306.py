"""transformers 25306: with `dynamic` NTK scaling the answer to a short prompt changes after a long one was computed.

The rotary embedding keeps the frequencies of the longest input; 5.24 forgets them only for an input that is shorter than
the unscaled length. A training step then depends on the steps before it, and an evaluation on its order. Right is what
a new model in plain transformers computes for the document alone.
"""

import torch
from support import scaled_model

from accel_llm.model.positions import scale_by_document


@torch.no_grad()
def test_a_long_input_does_not_change_the_next_one():
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(3, 97, (1, n), generator=generator) for n in (40, 12))  # scaled beyond 8 tokens
    expected = scaled_model("llama dynamic")(input_ids=short).logits
    plain, ours = scaled_model("llama dynamic"), scaled_model("llama dynamic")
    scale_by_document(ours)
    for model in (plain, ours):
        model(input_ids=long)
    assert torch.equal(ours(input_ids=short).logits, expected)
    assert (plain(input_ids=short).logits - expected).norm() > 0.05 * expected.norm()
