"""unsloth 10681: a document of exactly `original_max_position_embeddings` tokens got LongRoPE's long factors.

Phi-3 was trained with the short factors up to and including that length. Right is plain transformers with a config whose
long factors are the short ones, for that length; and one whose short factors are the long ones, for one token more.
"""

import numpy as np
import pytest
import torch
from support import scaled_model

from accel_llm.data.batches import collate_packed
from accel_llm.model.attention import enable_packing, forward_arguments
from accel_llm.model.positions import scale_by_document


@torch.no_grad()
@pytest.mark.parametrize(("length", "side"), [(8, "short_factor"), (9, "long_factor")])
def test_the_short_factors_reach_to_the_length_itself(length, side):
    ids = np.random.default_rng(0).integers(3, 97, length)
    reference = scaled_model("phi3 longrope", 8)
    scaling = reference.config.rope_parameters
    scaling["short_factor"] = scaling["long_factor"] = scaling[side]
    reference = type(reference)(reference.config).eval()

    model = scaled_model("phi3 longrope", 8)
    reference.load_state_dict(model.state_dict())
    expected = reference(input_ids=torch.from_numpy(ids)[None]).logits[0]
    scale_by_document(model)
    enable_packing(model)
    neighbours = [(other, other) for other in (ids[:3], np.tile(ids, 3))]
    batch = collate_packed([neighbours[0], (ids, ids), neighbours[1]])
    logits = model(**forward_arguments(batch), use_cache=False).logits[0, 3 : 3 + length]
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
