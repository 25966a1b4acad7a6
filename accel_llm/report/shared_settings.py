"""The settings of a run that others may see, on a model card and in trackers: no path, prompt, file name or secret."""

from collections.abc import Mapping
from typing import Any

from accel_llm.system.secrecy import hide_secrets

# Numbers, truth values, choices, and names of modules. Every other option stays here; a test lists both kinds.
SHARED_OPTIONS = (
    *("precision", "attn_implementation", "gradient_checkpointing", "offload_embeddings", "eval_share", "limit_rows"),
    *("data_format", "on_bad_row", "add_tokens", "allow_special_in_text", "train_on", "train_on_eos", "split_turns"),
    *("open_thought", "max_length", "overlong", "max_lost", "packing", "order", "method", "load_in_4bit"),
    *("load_in_8bit", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules", "modules_to_save"),
    *("init_lora_weights", "prompt_ensemble", "use_dora", "use_rslora", "optim", "learning_rate"),
    *("learning_rate_patterns", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "master_weights"),
    *("max_grad_norm", "lr_scheduler_type", "min_lr_rate", "decay_share", "warmup_steps", "neftune_noise_alpha"),
    *("loraplus_lr_ratio", "label_smoothing_factor", "z_loss_coef", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "total_batch_size", "num_train_epochs"),
    *("max_steps", "logging_steps", "eval_steps", "save_steps", "metric_for_best_model", "early_stopping_patience"),
    *("max_skipped_steps", "seed", "eval_on_start", "eval_generate", "decay_steps", "spike_threshold"),
    *("tokens_per_step", "max_tokens", "warmup_tokens", "decay_tokens", "batch_warmup_steps", "batch_warmup_tokens"),
    *("sample_steps", "sample_tokens", "sample_by"),
    # of preferences, reward models and classifiers
    *("loss_type", "loss_weights", "beta", "label_smoothing", "simpo_gamma", "cpo_alpha", "rpo_alpha"),
    *("use_weighting", "desirable_weight", "undesirable_weight", "scored_answers", "center_rewards_coefficient"),
    *("problem_type", "class_weights", "focal_gamma", "overfit"),
    # of pretraining
    *("streaming", "cross_document_attention"),
)


def shared_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared ones of a run's options, as JSON values; those that are not given are left out.

    Of `method_options` only numbers and truth values are shared: a text can be a prompt.
    """
    settings = {name: options[name] for name in SHARED_OPTIONS if options.get(name) not in (None, [], {}, "")}
    own: Mapping[str, Any] = options.get("method_options") or {}
    if numbers := {name: value for name, value in own.items() if isinstance(value, int | float)}:
        settings["method_options"] = numbers
    return settings


def as_plain_values(settings: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return settings as trackers take them: lists and mappings become one text."""
    values: dict[str, int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}={number}" for key, number in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        values[name] = hide_secrets(value) if isinstance(value, str) else value
    return values
