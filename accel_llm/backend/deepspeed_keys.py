"""The keys of a DeepSpeed configuration: each one is in force, harmless or refused.

DeepSpeed 0.19 ignores a key that it does not know without a word, and stops at an unknown one inside
`zero_optimization` only when the model is there. zero.py checks the keys that belong into the recipe.
"""

import os
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

# In force, or harmless: they print or record something. Accelerate 1.15 sets steps_per_print itself.
ALLOWED = {
    *("zero_optimization", "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size"),
    *("train_micro_batch_size_per_gpu", "communication_data_type", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "disable_python_gc", "log_level", "comms_logger", "timers"),
    *("zero_allow_untested_optimizer", "optimizer", "scheduler"),
}
# Allowed with their default alone. With another value they would change the numbers, or their part is done elsewhere.
DEFAULTS = {
    "zero_force_ds_cpu_optimizer": (False, "the recipe's optim names the optimizer"),
    "prescale_gradients": (False, "gradients are averaged after the sum, as by the other backends"),
    "gradient_predivide_factor": (1.0, "gradients are averaged after the sum, as by the other backends"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for averaged gradients"),
    "disable_allgather": (False, "every process needs all weights"),
    "sequence_parallel_size": (1, "sequence parallelism is not supported"),
    "managed_gradient_accumulation": (True, "each micro-batch calls the engine once"),
    "dataloader_drop_last": (False, "the scripts read the data themselves"),
}
# Blocks that these scripts do not use, and what to use. None of them is in force.
REMEDIES = {
    "activation_checkpointing": "use gradient_checkpointing in the recipe",
    "torch_autocast": "use precision in the recipe",
    "data_types": "use precision and master_weights in the recipe",
    "compile": "use dynamo_backend in the launch YAML",
    "checkpoint": "the scripts write checkpoints themselves, see save_steps",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "use report_to in the recipe"),
    "aio": "only cpu is supported for offload",
}
# The same inside `zero_optimization`, beyond the names and types that DeepSpeed itself checks.
ZERO_DEFAULTS = {
    "compute_grad_norm": (True, "the norm of the gradient is needed to clip it"),
    "zero_quantized_weights": (False, "it rounds the weights; load_in_4bit quantizes the base of an adapter"),
    "zero_quantized_gradients": (False, "it rounds the gradients"),
    "zero_quantized_nontrainable_weights": (
        False,
        "it rounds the weights; load_in_4bit quantizes the base of an adapter",
    ),
    "zero_hpz_partition_size": (1, "checkpoints do not support a second copy of the shards"),
    "zenflow": (None, "it steps with old gradients"),
    "legacy_stage1": (False, "it is DeepSpeed's old code"),
    "cpu_offload": (False, 'use "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": (False, 'use "offload_param": {"device": "cpu"}'),
}
DEVICES = ("none", "cpu")
# Inside `bf16` and `fp16`: the scaling of the loss is in force; the dtype of the stepped weights is in the recipe.
PRECISION_KEYS = {
    *("enabled", "loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "consecutive_hysteresis"),
    *("min_loss_scale", "check_grad_overflow", "immediate_grad_update"),
}
BF16_DEFAULTS = {"check_grad_overflow": (True, "a step whose gradient is not finite must change nothing")}
# Fields of the launch YAML that a DeepSpeed JSON replaces: beside it nothing reads them.
REPLACED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}


def deepspeed_problems(settings: dict[str, Any]) -> list[str]:
    """Return a sentence for each key of a DeepSpeed configuration that is neither in force nor harmless."""
    problems = _other_values(settings, DEFAULTS, "") + _other_values(settings.get("bf16", {}), BF16_DEFAULTS, "bf16.")
    known = ALLOWED | DEFAULTS.keys() | REMEDIES.keys()
    for key in settings.keys() - ALLOWED - DEFAULTS.keys():
        if key in REMEDIES:
            problems.append(f"{key}: this block of the DeepSpeed configuration has no effect here; remove it and "
                            f"{REMEDIES[key]}.")  # fmt: skip
        else:
            guess = get_close_matches(key, known, 1)
            problems.append(
                f"{key}: this key of the DeepSpeed configuration is not supported, so nothing would follow from it; "
                f"{f'did you mean {guess[0]}?' if guess else 'remove it.'}"
            )
    problems += [
        f"{block}.{key}: the DeepSpeed configuration sets it, but the recipe decides how weights are kept and stepped; "
        "remove it and use master_weights."
        for block in ("bf16", "fp16")
        for key in settings.get(block, {}).keys() - PRECISION_KEYS
    ]
    return sorted(problems) + _zero_problems(settings["zero_optimization"]) + _replaced_fields()


def _other_values(settings: dict[str, Any], defaults: dict[str, tuple[Any, str]], where: str) -> list[str]:
    return [
        f"{where}{key}: the DeepSpeed configuration says {settings[key]!r}, but only {default!r} is supported: "
        f"{reason}."
        for key, (default, reason) in defaults.items()
        if settings.get(key, default) not in (default, "auto")
    ]


def _zero_problems(zero: dict[str, Any]) -> list[str]:
    """Return a sentence for each problem of `zero_optimization`: by DeepSpeed's own check, and by ours."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    problems = _other_values(zero, ZERO_DEFAULTS, "zero_optimization.")
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device not in DEVICES:
            problems.append(f"zero_optimization.{part}.device: {device!r} is not supported; give none or cpu.")
    if (zero.get("offload_param") or {}).get("device", "none") != "none" and zero.get("stage") != 3:
        problems.append("zero_optimization.offload_param: only ZeRO-3 shards parameters; set stage 3, or remove it.")
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        names = {
            name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias) if name
        }
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            unknown = fault["type"] == "extra_forbidden"
            guess = get_close_matches(name, names, 1) if unknown else []
            reason = "is unknown to DeepSpeed" if unknown else f"{fault['input']!r} is not allowed ({fault['msg']})"
            problems.append(
                f"zero_optimization.{name}: {reason}; "
                f"{f'did you mean {guess[0]}?' if guess else 'correct or remove it.'}"
            )
    return problems


def _replaced_fields() -> list[str]:
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") == "none":
        return []
    return [
        f"{field}: {os.environ[variable]} in the launch YAML has no effect beside deepspeed_config_file; remove it "
        "there, and change the JSON or the recipe."
        for variable, field in REPLACED.items()
        if os.environ.get(variable, "none").lower() not in ("none", "auto")
    ]
