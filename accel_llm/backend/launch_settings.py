"""Settings from outside the recipe, of the launch YAML and the environment: each is in force, harmless or refused.

`accelerate launch` turns its YAML and its flags into environment variables, which may also be set by hand. So the
tables are about these variables. What the launcher drops without a word is read from the YAML, see `_yaml_problems`.
"""

import contextlib
import os
import re
from argparse import Namespace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from accel_llm.system.launcher import is_launched, launcher_flag, launcher_pid
from accel_llm.system.secrecy import hide_secrets, names_secret

LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")

# In force: read by Accelerate or by this package, and checked in accelerator.py, compilation.py and zero.py.
IN_FORCE = {
    *("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"),
    *("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL"),
    *("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
    *("ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
    *("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"),
    *("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS"),
}
# Harmless: the result is the same with any value. Layers are always compiled one by one, read one by one and wrapped by
# the names in the model; weights are gathered for the export; the rest is FSDP1's, or only about memory and speed.
HARMLESS = {
    *("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH"),
    *("ACCELERATE_ALLOW_CP_STANDALONE", "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_DEBUG_RDV_FILE"),
    *("ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"),
    *("FSDP_MIN_NUM_PARAMS", "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_BACKWARD_PREFETCH", "FSDP_FORWARD_PREFETCH"),
    *("FSDP_STATE_DICT_TYPE", "FSDP_USE_ORIG_PARAMS", "FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"),
}
# Allowed with one value, which is also the default. Otherwise the remedy is told.
FIXED = {
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("false", "the attention of packed rows runs outside the graphs; remove it"),
    "ACCELERATE_TORCH_DEVICE": ("", "use use_cpu in the launch YAML, or CUDA_VISIBLE_DEVICES"),
    "ACCELERATE_BYPASS_DEVICE_MAP": ("false", "a model must not bring a device map of its own; remove it"),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": ("false", "buffers are built with the model; remove it"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "false",
        "tensor, context and sequence parallelism are not supported; remove parallelism_config. fsdp2.yaml and "
        "zero3.yaml shard the model over all processes",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM is not supported; use fsdp2.yaml or zero3.yaml"),
    "ACCELERATE_USE_SAGEMAKER": (
        "false",
        "SageMaker is not supported; start the script with `accelerate launch` there",
    ),
    "ACCELERATE_IN_TPU_POD": ("false", "TPUs are not supported"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": ("none", "only cpu is supported for offload"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": ("none", "only cpu is supported for offload"),
    "FSDP_SHARDING_STRATEGY": ("full_shard", "FSDP2 does not read it; use fsdp_reshard_after_forward: true or false"),
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap", "set TRANSFORMER_BASED_WRAP"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "remove it there and use gradient_checkpointing in the recipe"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", "remove it"),
    "FSDP_IGNORED_MODULES": ("none", "all modules are sharded; remove it"),
}
OFF = ("0", "no", "off")  # other spellings of false
# Read by Accelerate without DeepSpeed; with it they are checked in zero.py.
FIXED_WITHOUT_DEEPSPEED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "use gradient_accumulation_steps in the recipe"),
    "ACCELERATE_GRADIENT_CLIPPING": ("auto", "use max_grad_norm in the recipe"),
}
# They only say more about a variable above, which is checked.
DETAILS = ("ACCELERATE_FP8_", "ACCELERATE_SAGEMAKER_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")

# Sections of the YAML, the distributed_type that reads them, and what to do about those that nothing here can use.
SECTION_KINDS = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED"}
UNSUPPORTED_SECTIONS = {
    "parallelism_config": "remove it and use fsdp2.yaml or zero3.yaml, which shard the model over all processes",
    "megatron_lm_config": "use fsdp2.yaml or zero3.yaml",
    "fp8_config": "use precision in the recipe",
    "mpirun_config": "use ddp.yaml",
}
# With these the launcher starts several processes and does not pass on use_cpu.
PASSED_ON_KINDS = ("MULTI_GPU", "FSDP", "DEEPSPEED")

# Variables by which the libraries change what a run does, or how fast. They are kept in run.json.
RECORDED = re.compile(
    r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|DEEPSPEED|DS|PYTORCH|TORCH|TORCHDYNAMO|TORCHINDUCTOR|TRITON|HF|"
    r"HUGGINGFACE|TRANSFORMERS|DATASETS|TOKENIZERS|PEFT|BNB|BITSANDBYTES|NCCL|GLOO|CUDA|CUBLAS|CUDNN|NVIDIA|NVTE|HIP|"
    r"ROCR|ROCM|XLA|OMP|MKL|KMP|OPENBLAS|FLASH_ATTENTION|USE_HUB_KERNELS|PYTHONHASHSEED)(_|$)"
)


def recorded_environment() -> dict[str, str]:
    """Return the environment variables that the libraries read, without secrets."""
    recorded = {name: value for name, value in os.environ.items() if RECORDED.match(name) and not names_secret(name)}
    return {name: hide_secrets(recorded[name]) for name in sorted(recorded)}


def launch_problems() -> list[str]:
    """Return a sentence for each setting of the launcher that is neither in force nor harmless."""
    problems = []
    known = IN_FORCE | HARMLESS | FIXED.keys()
    # Without FSDP nothing reads its variables.
    unread = DETAILS if launcher_flag("ACCELERATE_USE_FSDP") else (*DETAILS, "FSDP_")
    fixed = FIXED | ({} if launcher_flag("ACCELERATE_USE_DEEPSPEED") else FIXED_WITHOUT_DEEPSPEED)
    for name, value in sorted(os.environ.items()):
        if not name.startswith(LAUNCHER_PREFIXES) or name.startswith(unread):
            continue
        allowed, remedy = fixed.get(name, (None, ""))
        if allowed is not None and value.lower() not in ("", allowed, *(OFF if allowed == "false" else ())):
            problems.append(f"{_yaml_name(name)}: {value} is not supported here: {remedy}.")
        elif name not in known:
            guess = get_close_matches(name, known, 1)
            problems.append(
                f"{name}: this environment variable is unknown, so nothing would follow from it; "
                f"{f'did you mean {guess[0]}?' if guess else 'remove it.'}"
            )
    return problems + _yaml_problems()


def _yaml_name(variable: str) -> str:
    """Return the key of the launch YAML from which the launcher makes an environment variable."""
    special = {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
        "ACCELERATE_USE_MEGATRON_LM": "megatron_lm_config",
    }
    return special.get(variable, variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower())


def launch_yaml() -> str | None:
    """Return the YAML of the `accelerate launch` that started this process, as far as it can be seen (on Linux).

    Without `--config_file` the launcher reads the one that `accelerate config` has once written, and does not say so.
    """
    arguments = _launcher_arguments()
    return arguments.config_file if arguments and Path(arguments.config_file).is_file() else None


def _yaml_problems() -> list[str]:
    """Return a sentence for each key of the launch YAML that the launcher drops without a word.

    The launcher passes on no name of its YAML, but its command line can be read on Linux. Elsewhere nothing is checked.
    """
    arguments, path = _launcher_arguments(), launch_yaml()
    if arguments is None:
        return []
    settings: dict[str, Any] = {}
    if path:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    return _dropped_keys(settings, arguments) + _dropped_processes(settings, arguments, path)


def _dropped_keys(settings: dict[str, Any], arguments: Namespace) -> list[str]:
    problems = []
    kind = settings.get("distributed_type", "NO")
    known = vars(arguments).keys() | {"fsdp_ignored_modules"}
    for section, values in settings.items():
        if not isinstance(values, dict) or not values:
            continue
        if kind != SECTION_KINDS.get(section, kind):
            problems.append(
                f"{section}: it has no effect with distributed_type: {kind}; remove it, or set distributed_type: "
                f"{SECTION_KINDS[section]}."
            )
        if section in UNSUPPORTED_SECTIONS and not launcher_flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
            problems.append(f"{section}: it is not supported; {UNSUPPORTED_SECTIONS[section]}.")
        prefix = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}.get(section, "")
        for key in values:
            name = key if key.startswith(prefix) else prefix + key
            if name not in known:
                guess = get_close_matches(name, known, 1)
                problems.append(
                    f"{section}.{key}: `accelerate launch` does not know this key and ignores it; "
                    f"{f'did you mean {guess[0]}?' if guess else 'remove it.'}"
                )
    if settings.get("use_cpu") and kind in PASSED_ON_KINDS:
        problems.append(
            f"use_cpu: `accelerate launch` ignores it with distributed_type: {kind}; hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=-1."
        )
    compiler = settings.get("dynamo_backend") or (settings.get("dynamo_config") or {}).get("dynamo_backend")
    compiler = arguments.dynamo_backend or compiler or "no"
    if compiler.lower() != "no" and "ACCELERATE_DYNAMO_BACKEND" not in os.environ:
        problems.append(
            "dynamo_backend: `accelerate launch` does not pass it on with DeepSpeed; set the environment variable "
            f"ACCELERATE_DYNAMO_BACKEND={compiler.lower()} instead."
        )
    return problems


def _dropped_processes(settings: dict[str, Any], arguments: Namespace, path: str | None) -> list[str]:
    """Return a sentence if several processes were asked for, but the launcher's simple way started a single one."""
    asked = str(arguments.num_processes or settings.get("num_processes"))
    if is_launched() or not asked.isdigit() or int(asked) <= 1:
        return []
    starter = Path(path).name if path else "the launcher"
    return [
        f"num_processes: {asked} processes were asked for, but {starter} starts one, with use_cpu or distributed_type "
        "NO; use ddp.yaml, which also runs without a GPU, or set num_processes: 1."
    ]


def _launcher_arguments() -> Namespace | None:
    """Return the arguments of the `accelerate launch` that started this process; None if there is none to be seen."""
    pid = launcher_pid()
    if pid is None:
        return None
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    with contextlib.suppress(OSError, SystemExit, StopIteration):
        words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
        names = ("launch", "accelerate-launch", "launch.py")
        start = next(k for k, word in enumerate(words) if Path(word).name in names)
        arguments = launch_command_parser().parse_args(words[start + 1 :])
        folder = Path(f"/proc/{pid}/cwd").resolve()
        arguments.config_file = str(folder / Path(arguments.config_file or default_config_file).expanduser())
        return arguments
    return None
