"""Finds out from an estimate of memory that failed whether a method, or its options, cannot compute on a model.

The estimate runs the real code on tensors without data (empty_step.py). An error there may only mean that some code
needs data. So the same is tried with LoRA, with the method's usual options, and on a plain Llama: only the method or
its options can be at fault if all of these work.
"""

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from accel_llm.adapters.defaults import fill_method_options
from accel_llm.adapters.quantized_base import SIZES
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import short_reason
from accel_llm.training.empty_model import attach_without_weights


def check_method_computes(
    error: Exception, options: TrainOptions, config: PreTrainedConfig, estimate: Callable[[Any, Any], Any]
) -> None:
    """Check that `error` of `estimate(options, config)` is not one that the method would raise in training too.

    Raises:
        ConfigError: it is.
    """
    # An adapter that was trained before has computed with its options already.
    if needs_data(error) or options.adapter_name_or_path is not None:
        return
    if isinstance(error, ConfigError):
        return _check_whole_model(options, config)
    if not options.has_adapter:
        return
    kept = {name: value for name, value in options.method_options.items() if name == "token_indices"}
    usual = fill_method_options(options.model_copy(update={"method_options": kept, "use_dora": False}))
    lora = usual.model_copy(update={"method": "qlora" if options.in_4_bits else "lora", "method_options": {}})
    if not _works(estimate, lora, config):
        return
    if _works(estimate, usual, config):
        given = {name: value for name, value in options.method_options.items() if name not in kept}
        what = f"method_options: {given} of method {options.method}" if given else "use_dora: it"
        raise ConfigError(f"{what} cannot be trained ({short_reason(error)}); give other values, or leave it out.")
    everywhere = usual.model_copy(update={"lora_target_modules": "all-linear", "modules_to_save": []})
    if _works(estimate, everywhere, LlamaConfig(**SIZES)):
        family = (config.architectures or [type(config).__name__])[0]
        raise ConfigError(
            f"method: {options.method} cannot compute on {family} ({short_reason(error)}); name other "
            "lora_target_modules, or use method lora."
        )


def needs_data(error: Exception) -> bool:
    """Return whether an error on tensors without data is for lack of data: torch then speaks of meta tensors."""
    return "meta" in str(error).lower()


def _check_whole_model(options: TrainOptions, config: PreTrainedConfig) -> None:
    """Attach the method to all layers: what does not fit may be a layer that the estimate left out.

    Raises:
        ConfigError: it does not fit the whole model.
    """
    if getattr(options, "add_tokens", None):  # rows for them come only with the weights
        return
    try:
        attach_without_weights(options, config)
    except ConfigError as error:
        # What PEFT itself stumbles over may be the lack of data, whatever it says: DoRA reads 4-bit weights.
        by_peft = str(error).startswith(f"method: {options.method}") and " does not fit the model (" in str(error)
        if not needs_data(error) and not by_peft:
            raise


def _works(estimate: Callable[[Any, Any], Any], options: TrainOptions, config: PreTrainedConfig) -> bool:
    try:
        estimate(options, config)
    except Exception:
        return False
    return True
