"""accelerate 3878: FSDP2 stops at a model whose embedding and head share a weight.

torch shards a parameter in one group only. With `modules_to_save` PEFT wraps the embedding or the head, and the shared
weight lies in two places under other names. Right is that no group but the last shares a parameter with the rest of the
model; three steps of two processes then print the digits of one process (checked by hand, also under ZeRO-3).
"""

import pytest
from support import tiny_model

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.model.placement import _shard_units

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21.2
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [[], ["embed_tokens"], ["lm_head"]])
def test_no_group_shares_a_parameter_with_the_rest(saved: list[str], tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    if saved:
        model = attach_adapter(model, TrainOptions(output_dir="unused", lora_r=1, modules_to_save=saved))
    *groups, last = _shard_units(model)
    assert last is model and len(groups) == 2 + (not tied)
    for group in groups:
        inside = set(group.modules())
        rest = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
        assert rest.isdisjoint(group.parameters())
