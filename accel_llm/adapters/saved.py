"""Writes and reads the folder of a LoRA adapter: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from accel_llm.errors import ConfigError
from accel_llm.model.vocabulary import NEW_ROWS, PEFT_ROWS
from accel_llm.system.tensors import write_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FINGERPRINT = "base_fingerprint"


def save_adapter(
    model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base: str, base_fingerprint: str = ""
) -> None:
    """Write an adapter's config and its trained weights `state`, gathered from all ranks, to `folder`.

    `base` is written down as the base model; a folder becomes an absolute path, so that the adapter works from
    anywhere. `base_fingerprint` goes into the header of the weights file, which other programs ignore.
    """
    # PEFT writes the config and the weights that it knows.
    local = Path(base).expanduser()
    model.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False)
    # The rows of new tokens are our own parameters; add them under PEFT's name.
    new_rows = {
        name.removesuffix(NEW_ROWS) + PEFT_ROWS: tensor
        for name, tensor in state.items()
        if name.endswith(f".{NEW_ROWS}")
    }
    path = folder / ADAPTER_WEIGHTS
    # Cloned: load_file maps the file that is about to be replaced.
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    write_tensors(
        path,
        dict(sorted((weights | new_rows).items())),
        {"format": "pt"} | ({BASE_FINGERPRINT: base_fingerprint} if base_fingerprint else {}),
    )


def read_base_fingerprint(folder: Path) -> str | None:
    """Return the `model_fingerprint` of the base that an adapter was trained on, or None if its file has none."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get(BASE_FINGERPRINT)
    except (FileNotFoundError, SafetensorError):  # reading the weights will report it
        return None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the content of an adapter's adapter_config.json.

    Raises:
        ConfigError: the folder does not exist, has no such file, or the file is not a JSON object.
    """
    path = folder / "adapter_config.json"
    if not folder.exists():
        raise ConfigError(f"adapter: {folder} does not exist; name the adapter's folder, or the run's output_dir.")
    if not path.is_file():
        kind = "a full model" if (folder / "config.json").is_file() else "not an adapter"
        raise ConfigError(f"adapter: {folder} is {kind}: it has no adapter_config.json.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"adapter: {path} is not JSON (line {error.lineno}: {error.msg}).") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"adapter: {path} holds a {type(settings).__name__}, not the settings of an adapter.")
    return settings
