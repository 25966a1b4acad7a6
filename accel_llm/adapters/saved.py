"""An adapter's folder, written and read."""

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


def save_adapter(model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base: str, of_base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors from gathered trainable weights `state`.

    `base` is recorded as the base model, an absolute path where it is a folder, so the adapter can be used from anywhere.
    The fingerprint `of_base` goes into the header of the weights, where no other program minds it.
    """
    local = Path(base).expanduser()
    model.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False)
    new_rows = {
        name.removesuffix(NEW_ROWS) + PEFT_ROWS: tensor
        for name, tensor in state.items()
        if name.endswith(f".{NEW_ROWS}")
    }
    path = folder / ADAPTER_WEIGHTS
    # Not as a map of the file that is about to be replaced.
    written = {name: tensor.clone() for name, tensor in load_file(path).items()}
    write_tensors(
        path,
        dict(sorted((written | new_rows).items())),
        {"format": "pt"} | ({BASE_FINGERPRINT: of_base} if of_base else {}),
    )


def read_base_fingerprint(folder: Path) -> str | None:
    """`fingerprint.of_model` of the base that an adapter was trained on, if its file says so."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get(BASE_FINGERPRINT)
    except (FileNotFoundError, SafetensorError):  # for who reads the weights to say
        return None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's adapter_config.json.

    Raises:
        ConfigError: the folder is no adapter.
    """
    path = folder / "adapter_config.json"
    if not folder.exists():
        raise ConfigError(f"adapter: {folder} does not exist; name the adapter's folder, or the run's output_dir.")
    if not path.is_file():
        kind = "a full model" if (folder / "config.json").is_file() else "no adapter"
        raise ConfigError(f"adapter: {folder} is {kind}: it has no adapter_config.json.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"adapter: {path} is not JSON (line {error.lineno}: {error.msg}).") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"adapter: {path} holds a {type(settings).__name__}, not the settings of an adapter.")
    return settings
