"""Recomputed layers draw the same random numbers again; where nothing is random, no generator is read or set."""

from typing import Any

import pytest
import torch
from support import random_rows, tiny_model
from torch.utils import checkpoint as checkpointing

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_padded
from accel_llm.model.loading import configure_for_training
from accel_llm.model.loss import next_token_loss

# peft 0.21.2 asks for a property that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUIET = [
    ("llama", {}, {}),
    ("qwen3_moe", {}, {}),
    ("gpt_neox", {"hidden_dropout": 0.0, "classifier_dropout": 0.0}, {}),
    ("llama", {}, {"method": "lora"}),
]
RANDOM = [
    ("llama", {"attention_dropout": 0.3}, {}),
    ("gpt2", {"resid_pdrop": 0.3}, {}),
    ("mixtral", {"router_jitter_noise": 0.3}, {}),
    ("llama", {}, {"method": "lora", "lora_dropout": 0.3}),
    ("llama", {}, {"method": "lora", "lora_dropout": 0.3, "lora_target_modules": ["lm_head"]}),
]


def gradients(family: str, sizes: dict, settings: dict, **more: Any) -> dict[str, torch.Tensor]:
    """Gradients of one micro-batch in training mode; `more` are options that must not change them."""
    options = TrainOptions(**{"method": "full", "packing": False, "seed": 1} | settings | more)
    torch.manual_seed(1)
    model: Any = configure_for_training(tiny_model(family, tie_word_embeddings=False, **sizes), options)
    if options.method == "lora":
        model = attach_adapter(model, options.model_copy(update={"init_lora_weights": False})).train()
    torch.manual_seed(2)
    next_token_loss(model, collate_padded(random_rows(4, 12), 0)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("case", "kept"), [*((case, False) for case in QUIET), *((case, True) for case in RANDOM)])
def test_recomputation_changes_no_gradient_and_keeps_random_numbers_only_where_there_are_any(case, kept, monkeypatch):
    states = []
    read_state = torch.get_rng_state
    expected = gradients(*case)
    monkeypatch.setattr(checkpointing.torch, "get_rng_state", lambda: states.append(1) or read_state())
    recomputed = gradients(*case, gradient_checkpointing=True)
    assert bool(states) == kept
    assert recomputed.keys() == expected.keys()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in expected.items())
