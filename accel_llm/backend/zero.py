"""DeepSpeed ZeRO: the settings that the launch YAML names, checked and completed by the recipe."""

import json
import os
from pathlib import Path
from typing import Any

from accelerate.utils import DeepSpeedPlugin

from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]


def deepspeed_settings() -> dict[str, Any]:
    """The DeepSpeed JSON that the launch YAML names, or the settings written into the YAML itself.

    Raises:
        ConfigError: the file is missing or broken, or sets what the recipe decides.
    """
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        # What these fields say is in the settings now; Accelerate 1.15 would refuse them beside settings that it is given.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        settings = DeepSpeedPlugin().deepspeed_config
        # Where the YAML is silent the launcher says 1.
        silent = settings.get("gradient_accumulation_steps") == 1
        return settings | ({"gradient_accumulation_steps": "auto"} if silent else {})
    path = next((p for p in (Path(name), CHECKOUT / name) if p.is_file()), None)
    if path is None:
        raise ConfigError(f"deepspeed_config_file: {name} does not exist, neither here nor in {CHECKOUT}.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed_config_file: {path} is not JSON (line {error.lineno}: {error.msg}).") from None
    if "stage" not in settings.get("zero_optimization", {}):
        raise ConfigError(f"deepspeed_config_file: {path} has no zero_optimization.stage; it must be 0, 1, 2 or 3.")
    return settings


def _check_recipe_decides(settings: dict[str, Any]) -> None:
    """One place says how a run trains: a DeepSpeed file that says it too would silently win over the recipe."""
    recipe = {
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "train_batch_size": "total_batch_size",
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    }
    problems = [
        f'{key}: the DeepSpeed configuration says {settings[key]!r}; set it to "auto" there and use {ours} in the recipe.'
        for key, ours in recipe.items()
        if settings.get(key, "auto") != "auto"
    ]
    for key, ours in {"optimizer": "optim", "scheduler": "lr_scheduler_type"}.items():
        if key in settings:
            problems.append(
                f"{key}: the DeepSpeed configuration sets one; remove it there and use {ours} in the recipe."
            )
    for key in ("bf16", "fp16"):
        if settings.get(key, {}).get("enabled", "auto") not in ("auto", False):
            problems.append(
                f'{key}: the DeepSpeed configuration enables it; set it to "auto" there and use precision: {key}.'
            )
    if problems:
        raise ConfigError(*problems)


def build_deepspeed_plugin(options: TrainOptions, accumulation: int, cpu: bool) -> DeepSpeedPlugin:
    settings = deepspeed_settings()
    _check_recipe_decides(settings)
    zero = settings["zero_optimization"]
    settings = settings | {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": options.max_grad_norm,
        # Accelerate would otherwise replace the optimizer by DeepSpeedCPUAdam under offload, which needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if cpu:
        # There is no pinned memory and no stream to overlap with on a CPU.
        for part in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(part), dict):
                zero[part]["pin_memory"] = False
        zero["overlap_comm"] = False
    # DeepSpeed reads whole numbers written 2e8 as floats and refuses them in places.
    for key, value in zero.items():
        if isinstance(value, float) and value.is_integer():
            zero[key] = int(value)
    return DeepSpeedPlugin(hf_ds_config=settings, gradient_accumulation_steps=accumulation)


def prepare_deepspeed_on_cpu() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # DeepSpeed 0.19.8 compiles a shared-memory collective on first use: a minute, and a C++ compiler that may not be
    # there. Gloo gives the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
