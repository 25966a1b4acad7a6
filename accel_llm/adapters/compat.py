"""Reads adapters saved by any release of PEFT, or by other scripts, in the form that the installed PEFT understands.

No file is changed. `notes` says what was ignored or read in another way.
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

from accel_llm.adapters.saved import ADAPTER_WEIGHTS, read_adapter_config
from accel_llm.errors import ConfigError
from accel_llm.model.loading import short_reason
from accel_llm.system.memory import release_pages

PEFT_PREFIX = "base_model.model."
# Keys that PEFT has removed, and the last release that had them.
REMOVED_KEYS = {"enable_lora": "0.2", "merge_weights": "0.2"}
# Values of init_lora_weights that take a part out of the base that cannot be computed again, and where it came from.
LOST_INITS = {
    "pissa_niter_": "a random decomposition",
    "corda": "texts that are not in its folder",
    "lora_ga": "gradients that are not in its folder",
    "loftq": "rounding the base and a decomposition that another device rounds otherwise",
}
# Parts that training wrappers (FSDP, torch.compile, DDP, ...) leave in names when weights are saved without unwrapping.
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its folder.

    `settings` is adapter_config.json unchanged, `config` is the same for the installed PEFT. `weights` are on the CPU
    and memory-mapped: they take no memory until they are read.
    """

    folder: Path
    settings: dict[str, Any]
    config: PeftConfig
    weights: dict[str, torch.Tensor]
    notes: tuple[str, ...]


def read_adapter(folder: Path, allow_pickle: bool = False) -> SavedAdapter:
    """Read the adapter in `folder`. A .bin file, which is a pickle, is read only with `allow_pickle`, and only tensors.

    Raises:
        ConfigError: the folder is not an adapter, is damaged, or has a kind that the installed PEFT does not know.
    """
    settings = read_adapter_config(folder)
    check_first_values(settings, str(folder))
    cleaned, notes = clean_settings(settings, folder)
    weights = _read_weights(folder, allow_pickle)
    # Prompts are saved under names without a module, so there is nothing to rename.
    if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[cleaned["peft_type"]], PromptLearningConfig):
        pattern = _adapter_name_pattern(cleaned["peft_type"])
        weights = _rename_weights(weights, pattern)
        _check_adapter_weights(folder, weights, pattern)

    # PEFT 0.1 and 0.2 had LoRA for parts of a fused projection; as one LoRA its rank is the sum of theirs.
    enabled = settings.get("enable_lora")
    if isinstance(enabled, list) and enabled:
        weights = {name: _ungroup(name, weight, enabled) for name, weight in weights.items()}
        cleaned["r"], cleaned["lora_alpha"] = (cleaned[key] * sum(enabled) for key in ("r", "lora_alpha"))
    return SavedAdapter(folder, settings, build_peft_config(cleaned, folder), weights, tuple(notes))


def check_first_values(settings: dict[str, Any], name: str, field: str = "adapter") -> None:
    """Refuse an adapter whose base cannot be had: its first values were taken out of the base and are in no file.

    PEFT 0.21 draws or computes other ones at each load, or leaves the base whole, without a word.

    Raises:
        ConfigError: `init_lora_weights` in its settings is such a method.
    """
    init = str(settings.get("init_lora_weights"))
    for prefix, source in LOST_INITS.items():
        if init.startswith(prefix):
            raise ConfigError(
                f"{field}: {name} has init_lora_weights {init}, which took first values out of the base; they came "
                f"from {source}, so nobody can compute that base again. Export the adapter as a plain LoRA where it "
                "was trained, by PEFT's save_pretrained with path_initial_model_for_weight_conversion."
            )


def clean_settings(settings: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return `settings` without everything that the installed PEFT does not accept, and a note for each ignored key.

    Raises:
        ConfigError: the kind of adapter or the task is unknown to the installed PEFT.
    """
    # The kind of adapter and the task cannot be ignored.
    kind = settings.get("peft_type", "LORA")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(PeftType(name).value for name in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ConfigError(
            f"adapter: {folder} is of peft_type {kind!r}, unknown to PEFT {peft.__version__}; known are {known}."
        )
    task = settings.get("task_type")
    if task not in (None, *TaskType):
        raise ConfigError(f"adapter: {folder} has task_type {task!r}; known are {', '.join(TaskType)}.")

    # Drop unknown keys. A set `enable_lora` is used when the weights are read, so it needs no note.
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    unknown = [key for key in settings if key not in known and not (key == "enable_lora" and settings[key])]
    notes = [_unknown_key_note(key, settings) for key in unknown]
    cleaned = {key: value for key, value in settings.items() if key in known}

    # Values that the installed PEFT does not accept.
    if cleaned.get("fan_in_fan_out", False) is None:
        cleaned["fan_in_fan_out"] = False
    for key in ("lora_dropout", "module_dropout", "rank_dropout"):
        if key in cleaned:
            # Dropout has no effect outside training, and some layers of PEFT 0.21 refuse it.
            cleaned[key] = 0.0
    if cleaned.get("megatron_config"):
        notes.append(f"megatron_config of {folder} is ignored: transformers' models have no Megatron layers.")
        cleaned["megatron_config"] = None
    cleaned["inference_mode"] = True
    return cleaned | {"peft_type": kind}, notes


def _unknown_key_note(key: str, settings: dict[str, Any]) -> str:
    version = REMOVED_KEYS.get(key) or settings.get("peft_version")
    release = f"PEFT {version}" if version else "another release of PEFT"
    return (
        f"adapter_config.json: {key} ({json.dumps(settings[key])[:60]}) is a key of {release}, unknown to PEFT "
        f"{peft.__version__}; it is ignored."
    )


def build_peft_config(cleaned: dict[str, Any], folder: Path) -> PeftConfig:
    """Return PEFT's config from settings that `clean_settings` has cleaned.

    Raises:
        ConfigError: the installed PEFT refuses a value.
    """
    values = {key: value for key, value in cleaned.items() if key != "peft_type"}
    if values.get("init_lora_weights") in ("eva", "gaussian", "orthogonal"):
        values["init_lora_weights"] = True  # first values do not matter: the weights come from the file
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[cleaned["peft_type"]](**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"adapter: the settings of {folder} cannot be used ({short_reason(error)}).") from None
    config.inference_mode = True
    return config


def _read_weights(folder: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    path, pickle_path = folder / ADAPTER_WEIGHTS, folder / "adapter_model.bin"
    try:
        if path.is_file():
            return load_file(path)
        if pickle_path.is_file() and not allow_pickle:
            raise ConfigError(
                f"allow_pickle: {pickle_path} is a pickle, which can run code when it is loaded; set allow_pickle to "
                "read only the tensors in it."
            )
        if pickle_path.is_file():
            state = torch.load(pickle_path, map_location="cpu", weights_only=True)
            return {str(name): weight for name, weight in state.items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, OSError) as error:
        raise ConfigError(f"adapter: the weights of {folder} cannot be read ({short_reason(error)}).") from None
    file_names = ", ".join(sorted(file.name for file in folder.iterdir())[:8])
    raise ConfigError(f"adapter: {folder} has no {ADAPTER_WEIGHTS} (it holds {file_names}).")


def _adapter_name_pattern(kind: str) -> re.Pattern[str]:
    """Return a pattern for the names of an adapter's own weights; the others in its file are whole modules."""
    # Only the first part of PEFT's prefix: VeRA's is "vera_lambda_", but it also has weights such as vera_A.
    stem = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(kind), "").split("_")[0]
    return re.compile(rf"\.{stem}_|\.token_adapter\.|\.trainable_tokens_")


def _rename_weights(weights: dict[str, torch.Tensor], pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
    """Give the weights the names under which the installed PEFT would save them."""
    renamed = {}
    for name, weight in weights.items():
        name = WRAPPERS.sub("", name)
        if not name.startswith("base_model."):
            name = PEFT_PREFIX + name
        if pattern.search(name):
            # A plain state_dict has the adapter's name in its keys; it is nearly always `default`.
            name = re.sub(r"\.default(?=\.|$)", "", name)
        else:
            # A module that was trained as a whole.
            name = re.sub(r"\.(modules_to_save|original_module)(\.default)?(?=\.)", "", name)
        renamed[name] = weight
    return renamed


def _check_adapter_weights(folder: Path, weights: dict[str, torch.Tensor], pattern: re.Pattern[str]) -> None:
    if not any(pattern.search(name) for name in weights):
        raise ConfigError(
            f"adapter: {folder} holds {len(weights)} weights, but none of an adapter (one is "
            f"{min(weights, default='')}); a folder with weights of a model, averaged or not, is not an adapter: give "
            "--adapter the folders of adapters, several to combine them."
        )
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not _is_finite(weight)]
    if broken:
        raise ConfigError(
            f"adapter: {folder} cannot be merged, {len(broken)} of its weights hold NaN or infinity, such as "
            f"{min(broken)}."
        )


def _is_finite(weight: torch.Tensor) -> bool:
    # One sum instead of a check of each value: values of a narrower dtype cannot overflow a float64 sum.
    finite = bool(weight.sum(dtype=torch.float64).isfinite())
    release_pages(weight)
    return finite


def _ungroup(name: str, weight: torch.Tensor, enabled: list[bool]) -> torch.Tensor:
    """Turn the B of a LoRA on parts of a fused projection (PEFT 0.1 and 0.2) into one plain matrix.

    `enabled` says for each part whether it has a LoRA. In the file B is a grouped convolution [parts with LoRA x width
    of a part, r, 1]. As a matrix over all parts [parts x width, parts with LoRA x r] it is block-diagonal, with zero
    rows for a part without LoRA. A needs no change.
    """
    if not name.endswith(".lora_B.weight"):
        return weight
    blocks = iter(weight.squeeze(-1).chunk(sum(enabled)))
    width, rank = weight.shape[0] // sum(enabled), weight.shape[1]
    matrix = weight.new_zeros(width * len(enabled), rank * sum(enabled))
    column = 0
    for part, has_lora in enumerate(enabled):
        if has_lora:
            matrix[part * width : (part + 1) * width, column : column + rank] = next(blocks)
            column += rank
    return matrix
