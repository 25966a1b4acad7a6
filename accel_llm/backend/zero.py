"""DeepSpeed ZeRO: reads the settings of the launch YAML, checks them against the recipe and completes them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin

from accel_llm.backend.deepspeed_keys import deepspeed_problems
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.system.project_files import project_folder

DEFAULT_BUCKET = 500_000_000  # DeepSpeed 0.19.8's own reduce_bucket_size


def deepspeed_settings() -> dict[str, Any]:
    """Return the settings in the DeepSpeed JSON that the launch YAML names, or those in the YAML itself.

    Raises:
        ConfigError: the file is missing, is not JSON, or has no ZeRO stage.
    """
    # Settings in the YAML itself.
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        # Accelerate 1.15 refuses these fields beside settings that it gets as an argument. The settings below contain
        # them.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        settings = DeepSpeedPlugin().deepspeed_config
        # The launcher sets 1 if the YAML does not set it.
        is_default = settings.get("gradient_accumulation_steps") == 1
        return settings | ({"gradient_accumulation_steps": "auto"} if is_default else {})

    # A JSON file, found from the current folder or from where accelerate_configs/ is.
    home = project_folder()
    path = next((p for p in (Path(name), home / name) if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"deepspeed_config_file: {name} does not exist here or in {home}; correct the path in the launch YAML."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed_config_file: {path} is not JSON (line {error.lineno}: {error.msg}).") from None
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict) or "stage" not in zero:
        raise ConfigError(f"deepspeed_config_file: {path} has no zero_optimization.stage; it must be 1, 2 or 3.")
    return settings


def _check_against_recipe(settings: dict[str, Any]) -> None:
    """Check that the DeepSpeed settings leave to the recipe what it decides: they would silently win over the recipe.

    Raises:
        ConfigError: with one sentence for each setting that belongs into the recipe.
    """
    # Settings that may only be "auto".
    recipe = {
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "train_batch_size": "total_batch_size",
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    }
    problems = [
        f'{key}: the DeepSpeed configuration says {settings[key]!r}; set it to "auto" there and use {option} in the '
        "recipe."
        for key, option in recipe.items()
        if settings.get(key, "auto") != "auto"
    ]

    # Stage 0 would be DDP, but in DeepSpeed 0.19.8 it reports no gradient norm.
    if settings["zero_optimization"].get("stage", 0) == 0:
        problems.append("zero_optimization.stage: 0 shards nothing; use ddp.yaml, or set stage 1, 2 or 3.")

    for key in ("bf16", "fp16"):
        if settings.get(key, {}).get("enabled", "auto") not in ("auto", False):
            problems.append(
                f'{key}: the DeepSpeed configuration enables it; set it to "auto" there and use precision: {key}.'
            )
    raise_problems(problems + deepspeed_problems(settings))


def build_deepspeed_plugin(options: TrainOptions, accumulation: int, precision: str, cpu: bool) -> DeepSpeedPlugin:
    """Return Accelerate's DeepSpeed plugin with the settings of the launch YAML, completed by the recipe.

    `precision` is fp32, bf16 or fp16. Gradients are added up and reduced in float32 with each of them.

    Raises:
        ConfigError: the settings are missing or broken, or contradict the recipe.
    """
    settings = deepspeed_settings()
    _check_against_recipe(settings)
    # They are options by now (deepspeed_recipe.py), and Accelerate prepares what the options ask for.
    settings = {key: value for key, value in settings.items() if key not in ("optimizer", "scheduler")}
    zero = settings["zero_optimization"]

    # What the recipe decides.
    settings = settings | {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": options.max_grad_norm,
        # Otherwise, under offload, Accelerate 1.15 replaces the optimizer by DeepSpeedCPUAdam, which needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Otherwise DeepSpeed adds up gradients, and reduces them, in the dtype of the weights.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": settings.get("communication_data_type", "fp32"),
    }
    if zero["stage"] == 1 and precision == "bf16":
        _keep_zero1_optimizer()

    # A CPU has neither pinned memory nor streams to overlap.
    if cpu:
        for part in ("offload_optimizer", "offload_param"):
            if isinstance(zero.get(part), dict):
                zero[part]["pin_memory"] = False
        zero["overlap_comm"] = False

    # DeepSpeed reads whole numbers such as 2e8 as floats, and refuses floats in some places.
    for key, value in zero.items():
        if isinstance(value, float) and value.is_integer():
            zero[key] = int(value)
    return DeepSpeedPlugin(hf_ds_config=settings, gradient_accumulation_steps=accumulation)


def _keep_zero1_optimizer() -> None:
    """Make DeepSpeed use the same optimizer class for ZeRO-1 in bf16 as in float32 and fp16."""
    # For float32 gradients of bf16 weights DeepSpeed 0.19.8 would take its BF16_Optimizer. That gives the same gradient
    # (5.3e-3 from float64 in tests/proofs/accumulation.py), but keeps weights and gradients in a form of its own, which
    # checkpoints do not know.
    from deepspeed.runtime import engine

    deepspeed_engine: Any = engine.DeepSpeedEngine
    deepspeed_engine._do_optimizer_sanity_check = lambda *_: engine.ZERO_OPTIMIZATION


def fit_buckets(settings: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Lower `reduce_bucket_size` in DeepSpeed settings to the number of trained elements, if it is larger.

    DeepSpeed allocates that many elements, up to two times, whatever is trained. The other buckets only say when to
    begin the next message, and take no memory themselves.
    """
    zero = settings["zero_optimization"]
    size = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if size != "auto":  # then Accelerate takes the square of the model's hidden size
        trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
        # Under ZeRO-3 a parameter is an empty vector; DeepSpeed keeps its size in `ds_numel`.
        zero["reduce_bucket_size"] = min(size, sum(getattr(p, "ds_numel", p.numel()) for p in trained))


def prepare_deepspeed_on_cpu() -> None:
    """Make DeepSpeed run on the CPU with gloo, without a compiler."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # DeepSpeed 0.19.8 compiles a shared-memory collective at its first use. That takes a minute and needs a C++
    # compiler; gloo gives the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
