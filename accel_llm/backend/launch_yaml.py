"""What `accelerate launch` tells a script about a launch YAML, as environment variables, without launching anything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from accel_llm.backend.launch_settings import LAUNCHER_PREFIXES
from accel_llm.errors import ConfigError
from accel_llm.system.project_files import project_folder

YAMLS = project_folder() / "accelerate_configs"
# Keys of `deepspeed_config` that the launcher passes on, if the YAML names no JSON file.
DEEPSPEED_KEYS = ("zero_stage", "offload_optimizer_device", "offload_param_device")
GROUP = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"}


@contextmanager
def as_launched(path: Path, processes: int) -> Iterator[None]:
    """Within the block, let this process read the settings that `processes` processes launched by a YAML would read.

    Raises:
        ConfigError: the YAML cannot be read.
    """
    variables = launch_variables(path, processes)
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHER_PREFIXES) or name in GROUP:
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch_variables(path: Path, processes: int) -> dict[str, str]:
    """Return the variables that the launcher sets for a YAML, those by which strategy and memory follow.

    Raises:
        ConfigError: the YAML cannot be read.
    """
    settings = _read(path)
    kind = str(settings.get("distributed_type", "NO")).upper()
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    if kind == "DEEPSPEED":
        return (
            group | {"ACCELERATE_USE_DEEPSPEED": "true"} | _deepspeed_variables(settings.get("deepspeed_config") or {})
        )
    if kind == "FSDP":
        fsdp = settings.get("fsdp_config") or {}
        values = {f"FSDP_{name.removeprefix('fsdp_').upper()}": _word(value) for name, value in fsdp.items()}
        return group | {"ACCELERATE_USE_FSDP": "true"} | values
    if kind == "NO":
        return {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return group


def _deepspeed_variables(config: dict[str, Any]) -> dict[str, str]:
    if name := config.get("deepspeed_config_file"):
        return {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(name)}
    return {f"ACCELERATE_DEEPSPEED_{key.upper()}": _word(config[key]) for key in DEEPSPEED_KEYS if key in config}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise ConfigError(f"config_file: {path} cannot be read: {reason}; name a file of accelerate_configs.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config_file: {path} holds no settings; name a file of accelerate_configs.")
    return settings
