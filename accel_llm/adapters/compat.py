"""An adapter's folder as any release of PEFT, or somebody's script, has left it, read as the installed PEFT understands it.

Nothing on disk is changed. What is set aside or read in another way is told in `notes`.
"""

import json
import pickle
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import peft
import torch
from peft import PeftConfig, PeftType, PromptLearningConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file

from accel_llm.adapters.saved import read_adapter_config
from accel_llm.errors import ConfigError
from accel_llm.model.loading import short_reason
from accel_llm.system.memory import release_pages

PEFT_PREFIX = "base_model.model."
# Keys that PEFT once knew, and the last release that did.
REMOVED_KEYS = {"enable_lora": "0.2", "merge_weights": "0.2"}
# What wrappers of a training leave in names, where weights were saved without unwrapping, or with the adapter's own name.
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.")


@dataclass(frozen=True)
class SavedAdapter:
    """`settings` is adapter_config.json as it lies there, `config` the same for this PEFT, `weights` are on the CPU.

    Weights are maps of the file, which take no memory until they are read.
    """

    folder: Path
    settings: dict[str, Any]
    config: PeftConfig
    weights: dict[str, torch.Tensor]
    notes: tuple[str, ...]


def read_adapter(folder: Path, allow_pickle: bool = False) -> SavedAdapter:
    """The adapter in `folder`; weights in a .bin file, a pickle, are read with `allow_pickle` alone, and tensors alone.

    Raises:
        ConfigError: it is no adapter, it is broken, or it is of a kind that the installed PEFT does not know.
    """
    settings = read_adapter_config(folder)
    cleaned, notes = clean_settings(settings, folder)
    weights = _load(folder, allow_pickle)
    if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[cleaned["peft_type"]], PromptLearningConfig):
        own = _own_names(cleaned["peft_type"])
        weights = _rename(weights, own)
        _check_own(folder, weights, own)
    enabled = settings.get("enable_lora")
    if isinstance(enabled, list) and enabled:
        weights = {name: _ungrouped(name, weight, enabled) for name, weight in weights.items()}
        cleaned["r"], cleaned["lora_alpha"] = (cleaned[key] * sum(enabled) for key in ("r", "lora_alpha"))
    return SavedAdapter(folder, settings, build_peft_config(cleaned, folder), weights, tuple(notes))


def clean_settings(settings: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """`settings` without what this PEFT does not know or would stumble over, and a sentence for each key set aside.

    Raises:
        ConfigError: of a kind of adapter or a task that this PEFT does not know.
    """
    kind = settings.get("peft_type", "LORA")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(PeftType(name).value for name in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ConfigError(
            f"adapter: {folder} is of peft_type {kind!r}, unknown to PEFT {peft.__version__}; known are {known}."
        )
    task = settings.get("task_type")
    if task not in (None, *TaskType):
        raise ConfigError(f"adapter: {folder} has task_type {task!r}; known are {', '.join(TaskType)}.")
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    # What `enable_lora` says of the parts of a fused projection is read with the weights.
    unknown = [key for key in settings if key not in known and not (key == "enable_lora" and settings[key])]
    notes = [_set_aside(key, settings) for key in unknown]
    cleaned = {key: value for key, value in settings.items() if key in known}
    if cleaned.get("fan_in_fan_out", False) is None:
        cleaned["fan_in_fan_out"] = False
    for key in ("lora_dropout", "module_dropout", "rank_dropout"):
        if key in cleaned:
            # Nothing is dropped when weights are added, and PEFT 0.21 has layers that refuse any dropout.
            cleaned[key] = 0.0
    if cleaned.get("megatron_config"):
        notes.append(
            f"megatron_config of {folder} is set aside: layers of Megatron are not in a model of transformers."
        )
        cleaned["megatron_config"] = None
    cleaned["inference_mode"] = True
    return cleaned | {"peft_type": kind}, notes


def _set_aside(key: str, settings: dict[str, Any]) -> str:
    wrote = settings.get("peft_version")
    release = (
        f"PEFT {REMOVED_KEYS[key]}" if key in REMOVED_KEYS else f"PEFT {wrote}" if wrote else "another release of PEFT"
    )
    return (
        f"adapter_config.json: {key} ({json.dumps(settings[key])[:60]}) is a key of {release}, unknown to PEFT "
        f"{peft.__version__}, and is set aside."
    )


def build_peft_config(cleaned: dict[str, Any], folder: Path) -> PeftConfig:
    """Raises ConfigError for values that this PEFT refuses."""
    values = {key: value for key, value in cleaned.items() if key != "peft_type"}
    if values.get("init_lora_weights") in ("eva", "gaussian", "orthogonal"):
        values["init_lora_weights"] = True  # other first values of what is read from the file in any case
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[cleaned["peft_type"]](**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"adapter: the settings of {folder} cannot be used ({short_reason(error)}).") from None
    config.inference_mode = True
    return config


def _load(folder: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    path, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    try:
        if path.is_file():
            return load_file(path)
        if pickled.is_file() and not allow_pickle:
            raise ConfigError(
                f"allow_pickle: {pickled} is a pickle, which can run code when it is loaded carelessly; set allow_pickle "
                "to read the tensors in it and nothing else."
            )
        if pickled.is_file():
            loaded = torch.load(pickled, map_location="cpu", weights_only=True)
            return {str(name): weight for name, weight in loaded.items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, OSError) as error:
        raise ConfigError(f"adapter: the weights of {folder} cannot be read ({short_reason(error)}).") from None
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8])
    raise ConfigError(f"adapter: {folder} has no adapter_model.safetensors (it holds {found}).")


def _own_names(kind: str) -> re.Pattern[str]:
    """Matches the names of an adapter's own weights; every other weight in its file is one of the base, saved along."""
    stem = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(kind), "").split("_")[0]
    return re.compile(rf"\.{stem}_|\.token_adapter\.|\.trainable_tokens_")


def _rename(weights: dict[str, torch.Tensor], own: re.Pattern[str]) -> dict[str, torch.Tensor]:
    """The names that PEFT gives to the weights it saves today."""
    renamed = {}
    for name, weight in weights.items():
        name = WRAPPERS.sub("", name)
        if not name.startswith("base_model."):
            name = PEFT_PREFIX + name
        if own.search(name):
            # A state dict saved as it stood in memory has the adapter's name in it, which is `default` but for a few.
            name = re.sub(r"\.default(?=\.|$)", "", name)
        else:
            name = re.sub(r"\.(modules_to_save|original_module)(\.default)?(?=\.)", "", name)
        renamed[name] = weight
    return renamed


def _check_own(folder: Path, weights: dict[str, torch.Tensor], own: re.Pattern[str]) -> None:
    if not any(own.search(name) for name in weights):
        raise ConfigError(
            f"adapter: {folder} holds {len(weights)} weights and none of an adapter, such as {min(weights, default='')}; "
            "weights of a model, averaged by hand or not, are no adapter: give adapters of their own folders to --adapter, "
            "several to combine them."
        )
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not _finite(weight)]
    if broken:
        raise ConfigError(
            f"adapter: {folder} cannot be merged, {len(broken)} of its weights hold NaN or infinity, such as "
            f"{min(broken)}."
        )


def _finite(weight: torch.Tensor) -> bool:
    # The sum is finite unless a value is not: none of a narrower dtype is near the end of float64's range.
    finite = bool(weight.sum(dtype=torch.float64).isfinite())
    release_pages(weight)
    return finite


def _ungrouped(name: str, weight: torch.Tensor, enabled: list[bool]) -> torch.Tensor:
    """One matrix of a fused projection's LoRA in PEFT 0.1 and 0.2, where `enable_lora` says which of its parts have one.

    There B was a grouped convolution [parts with LoRA x width of a part, r, 1]; as one matrix over all parts
    [parts x width, parts with LoRA x r] it is block-diagonal, with zero rows where a part has no LoRA.
    """
    if not name.endswith(".lora_B.weight"):
        return weight
    blocks = iter(weight.squeeze(-1).chunk(sum(enabled)))
    width, rank = weight.shape[0] // sum(enabled), weight.shape[1]
    whole = weight.new_zeros(width * len(enabled), rank * sum(enabled))
    column = 0
    for part, has in enumerate(enabled):
        if has:
            whole[part * width : (part + 1) * width, column : column + rank] = next(blocks)
            column += rank
    return whole
