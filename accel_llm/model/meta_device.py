"""Builds a model whose weights have a shape and a dtype, but no data (torch's device `meta`)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import accel_llm.system.chatter

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.integrations import deepspeed as transformers_deepspeed

from accel_llm.model.language_part import causal_lm_loader
from accel_llm.model.stored_quantization import stored_quantization

# A config.json can name an implementation of attention or experts, even a kernel on the hub. These override it.
OWN_IMPLEMENTATIONS: dict[str, Any] = {"attn_implementation": None, "experts_implementation": None}


@contextmanager
def unsharded() -> Iterator[None]:
    """Within the block, keep transformers from sharding a model while it builds it; other processes may build none."""
    settings: Any = transformers_deepspeed
    reference = settings._hf_deepspeed_config_weak_ref
    settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        settings._hf_deepspeed_config_weak_ref = reference


def build_on_meta(config: PreTrainedConfig, tie: bool = True, **arguments: Any) -> PreTrainedModel:
    """Build the causal LM of a config in float32 without data; `arguments` go to transformers' `from_config`.

    Without `tie` weights that are to be one are not so yet.
    """
    config = without_quantization(config)
    with unsharded(), torch.device("meta"), nullcontext() if tie else no_tie_weights():
        return causal_lm_loader(config).from_config(config, dtype=torch.float32, **(OWN_IMPLEMENTATIONS | arguments))


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the config that says nothing of quantized weights, which only its files have."""
    config = deepcopy(config)
    if stored_quantization(config):
        del config.quantization_config  # type: ignore[attr-defined]
    return config
