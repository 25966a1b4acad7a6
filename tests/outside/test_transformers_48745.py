"""transformers 48745 (and 46077): models for causal language modelling whose tokens see later ones; the loss falls to 0.

RoFormer, BigBird, RemBERT and Megatron-BERT did so in 5.9 to 5.18 even with `is_decoder: true`; every encoder does so
without it, and Gemma or Llama where the config asks for attention both ways. A loss of 0.02 looks like a success. Right:
no logit before a changed token moves, else the run does not start.
"""

import pytest
import torch
from support import SIZES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from accel_llm.errors import ConfigError
from accel_llm.model.probe import check_causality

SMALL = {**SIZES, "num_hidden_layers": 1, "hidden_size": 16, "head_dim": 4, "embedding_size": 16}
SMALL |= {"input_embedding_size": 16, "output_embedding_size": 16}


@torch.no_grad()
def first_logits_move(model: torch.nn.Module) -> bool:
    ids = torch.arange(5, 17)[None]
    changed = ids.clone()
    changed[0, -1] = 90
    before, after = (model(input_ids=row).logits[0, :-1] for row in (ids, changed))
    return not torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roformer", "big_bird", "rembert", "megatron-bert", "gemma3_text", "llama"])
@pytest.mark.parametrize("sees_both_ways", [True, False])
def test_what_sees_later_tokens_does_not_start(family, sees_both_ways):
    options = {
        "gemma3_text": {"use_bidirectional_attention": sees_both_ways},
        "llama": {"is_causal": not sees_both_ways},
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SMALL, **options.get(family, {"is_decoder": not sees_both_ways})})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert first_logits_move(model) == sees_both_ways
    if not sees_both_ways:
        check_causality(model, "cpu", torch.float32)
        return
    with pytest.raises(ConfigError, match=f"{type(model).__name__} is not causal here"):
        check_causality(model, "cpu", torch.float32)
