"""Finds an adapter and its base model, and checks that they belong together."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from accel_llm.adapters.saved import read_adapter_config, read_base_fingerprint
from accel_llm.errors import ConfigError
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.loading import check_model_name, short_reason

# Files of a hub model that a merge needs.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def find_adapter(name: str) -> Path:
    """The adapter itself, whether its folder was named or the output folder of the run that made it."""
    folder = Path(name).expanduser()
    inner = folder / "adapter"
    if not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file():
        return inner
    return folder


def find_base(adapter: Path, named: str | None, field: str = "base") -> str:
    """The base model: the one named, else the one that adapter_config.json names.

    Raises:
        ConfigError: it is nowhere to be found.
    """
    base = named or read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{field}: {adapter} does not name its base model; say where it is.")
    try:
        check_model_name(base, field)
    except ConfigError as error:
        if named:
            raise
        reason = str(error).rstrip(".")
        raise ConfigError(f"{reason}; {adapter} names it as its base, say where it is with --base.") from None
    return base


def check_bases(adapters: list[Path], base: Path | str) -> None:
    """Raises ConfigError when `base` is another model than the one that an adapter says it was trained on."""
    for folder in adapters:
        expected = read_base_fingerprint(folder)
        if expected and expected != (found := model_fingerprint(str(base))):
            raise ConfigError(
                f"base: {base} is another model (fingerprint {found}) than the one that {folder} was trained on "
                f"({expected}); name that one with --base, or set allow_other_base if it is the same, stored in another way."
            )


def locate_folder(name: str, field: str, revision: str = "main", allow_pickle: bool = False) -> Path:
    """The folder of a model or an adapter that is a folder, the folder of a run or a hub id.

    Raises:
        ConfigError: a hub id that cannot be had.
    """
    folder = find_adapter(name) if field == "adapter" else Path(name).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return folder
    try:
        patterns = [*MODEL_FILES, *(["*.bin"] if allow_pickle else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {name} is no folder, and no hub id that can be had ({short_reason(error)})."
        ) from None
