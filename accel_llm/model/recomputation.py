"""Recomputation of activations in the backward pass, which saves memory (`gradient_checkpointing`)."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from accel_llm.errors import ConfigError
from accel_llm.model.language_part import causal_lm_class

# In a config, the names of settings that let a layer draw random numbers in training: attention_dropout, resid_pdrop,
# router_jitter_noise, moe_jitter_eps, ...
RANDOM_SETTING = re.compile("drop|jitter|noise")


def check_recomputation(config: PreTrainedConfig) -> None:
    """Check that the model's family can recompute activations (`gradient_checkpointing`).

    Raises:
        ConfigError: it cannot.
    """
    model_class = causal_lm_class(config)
    if model_class is not None and not model_class.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing: {model_class.__name__} of transformers does not recompute activations; set it to "
            "false, and use a smaller max_length or batch if memory is short."
        )


def recompute_activations(model: PreTrainedModel, adapter_may_draw: bool = False) -> None:
    """Let each layer of `model` keep only its input, and compute everything else again in the backward pass.

    The random numbers of the first time are drawn again. Where a layer draws none, the host does not read and set the
    state of the generators around each layer. `adapter_may_draw`: the adapter that the layers will get may draw some too.
    """
    random = adapter_may_draw or _may_draw(model)
    settings = {"use_reentrant": False, "preserve_rng_state": random}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)


def _may_draw(model: PreTrainedModel) -> bool:
    """Return whether a layer may draw random numbers in training; true for code that does not come with transformers."""
    known = type(model).__module__.startswith("transformers.models.")
    return not known or _has_random_setting(model.config.get_text_config().to_dict())


def _has_random_setting(settings: dict[str, Any]) -> bool:
    return any(
        _has_random_setting(value) if isinstance(value, dict) else bool(RANDOM_SETTING.search(str(name)) and value)
        for name, value in settings.items()
    )


def has_dropout(module: nn.Module) -> bool:
    """Return whether a part of `module` drops values in training."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
