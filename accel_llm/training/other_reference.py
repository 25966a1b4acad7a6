"""Asks another model than the policy for the log-probabilities of the reference, before the policy is loaded."""

from typing import Any

from accelerate import Accelerator

from accel_llm.backend.strategy import compute_dtype, strategy
from accel_llm.config.preference_options import PreferenceOptions
from accel_llm.data.prepare import EncodedData
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model
from accel_llm.model.loss import check_loss
from accel_llm.model.placement import place_weights
from accel_llm.preference.reference import Reference, check_reference_tokenizer


def ask_other_reference(
    accelerator: Accelerator, options: PreferenceOptions, data: EncodedData, reference: Reference
) -> None:
    """Load `reference_model_name_or_path`, let it compute the columns of `reference`, and forget it.

    Raises:
        ConfigError: it would have to be sharded, has another tokenizer, or cannot be loaded.
    """
    if strategy() in ("zero3", "fsdp2"):
        raise ConfigError(
            f"reference_model_name_or_path: a second model cannot be sharded by {strategy()}; run the same command once "
            "with check_only and another launch YAML, for example accelerate_configs/ddp.yaml, which writes the "
            "reference's log-probabilities into cache_dir."
        )
    check_reference_tokenizer(options, data.token_ids)
    changes = {"model_name_or_path": options.reference_model_name_or_path, "revision": "main", "method": "full"}
    changes |= {"load_in_4bit": False, "load_in_8bit": False, "offload_embeddings": False}
    other = options.model_copy(update=changes)
    model: Any = load_model(other)
    model.requires_grad_(False)  # nothing is trained, so no weight needs to be a float32 master weight
    place_weights(accelerator, model, other)
    check_loss(model, accelerator.device, compute_dtype(options))
    reference.compute(model, reference.can_share(model))
