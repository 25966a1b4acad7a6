"""llama.cpp 24823 and 24875: LongRoPE's short or long factors are chosen for all sequences that are computed together.

Phi-3.5 and Phi-4-mini have one set of frequencies for documents up to 4096 tokens and one for longer ones. llama.cpp
chose by the size of the context, then by the largest position of the batch, as transformers 5.24 does: a short document
that shares a row or a batch with a long one is rotated with the factors of long ones. Right is each document alone.
"""

import torch
from support import scaled_model

from accel_llm.model.positions import scale_by_document


@torch.no_grad()
def test_the_factors_are_chosen_for_each_document():
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(3, 97, (1, n), generator=generator) for n in (6, 12))  # long: more than 8 tokens
    expected = scaled_model("phi3 longrope")(input_ids=short).logits[0]
    rows, mask = torch.cat([torch.nn.functional.pad(short, (0, 6)), long]), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 6:] = 0

    plain, ours = scaled_model("phi3 longrope"), scaled_model("phi3 longrope")
    scale_by_document(ours)
    theirs, own = (model(input_ids=rows, attention_mask=mask).logits[0, :6] for model in (plain, ours))
    assert (own - expected).norm() <= 1e-5 * expected.norm()
    assert (theirs - expected).norm() > 0.1 * expected.norm()
