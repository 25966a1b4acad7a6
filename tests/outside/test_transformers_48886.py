"""transformers 48886: some mixtures offer `output_router_logits`, but never compute the balance loss of their experts.

A config that asks for it then trains without it, and nothing says so. Right is the loss that the config asks for; where
the family has none, a sentence.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from accel_llm.data.batches import collate_padded
from accel_llm.errors import ConfigError
from accel_llm.model.loss import attach_loss, next_token_loss

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def _model(family: str, asks: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, output_router_logits=asks))


@pytest.mark.parametrize("family", ["afmoe", "hy_v3"])
def test_a_balance_loss_that_the_family_lacks_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"output_router_logits: .* computes none; set it to false in config\.json\."):
        attach_loss(_model(family, asks=True), 100)
    attach_loss(_model(family, asks=False), 100)


def test_a_balance_loss_that_the_family_has_is_trained() -> None:
    """The oracle is the family's own loss, which is a mean."""
    model, ids = _model("qwen3_moe", asks=True), torch.arange(1, 13).view(1, 12)
    expected = model(input_ids=ids, labels=ids).loss.item() * 11
    attach_loss(model, 100)
    batch = collate_padded([(ids[0].numpy(), ids[0].numpy())], pad_token_id=0)
    assert next_token_loss(model.train(), batch).item() == pytest.approx(expected, rel=1e-6)
    assert next_token_loss(model.eval(), batch).item() < expected - 0.01  # an evaluation is the plain loss
