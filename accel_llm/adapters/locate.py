"""Finds an adapter and its base model, and checks that the adapter was trained on this base."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from accel_llm.adapters.saved import read_adapter_config, read_base_fingerprint
from accel_llm.errors import ConfigError
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.loading import short_reason
from accel_llm.model.model_names import check_model_name
from accel_llm.system.hub import absence_reason
from accel_llm.system.places import expand_home

# Files that a merge needs of a model on the hub.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")  # its licence


def find_adapter(name: str) -> Path:
    """Return the adapter's folder; `name` is this folder or the output folder of the run that trained it."""
    folder = Path(name)
    inner = folder / "adapter"
    if not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file():
        return inner
    return folder


def find_base(adapter: Path, chosen: str | None, field: str = "base") -> str:
    """Return the name of the base model: `chosen` if there is one, else the base in adapter_config.json.

    Raises:
        ConfigError: there is no name, or no such model.
    """
    base = chosen or expand_home(read_adapter_config(adapter).get("base_model_name_or_path") or "")
    if not base:
        raise ConfigError(f"{field}: {adapter} does not name its base model; say where it is.")
    try:
        check_model_name(base, field)
    except ConfigError as error:
        if chosen:
            raise
        # The user did not type this name: say where it comes from.
        reason = str(error).rstrip(".")
        raise ConfigError(f"{reason}; {adapter} names it as its base, say where it is with --base.") from None
    return base


def describe_other_base(adapter: Path, base: str) -> str:
    """Say that `adapter` was trained on another base model than `base`; empty if it was not, or has no fingerprint."""
    expected = read_base_fingerprint(adapter)
    if not expected:
        return ""
    fingerprint = model_fingerprint(base)
    if fingerprint == expected:
        return ""
    return f"was trained on another base model (fingerprint {expected}) than {base} ({fingerprint})"


def describe_other_name(adapter: Path, base: str) -> str:
    """Say that an adapter without a fingerprint names another base than `base`; empty if it does not."""
    named = expand_home(read_adapter_config(adapter).get("base_model_name_or_path") or "")
    same = not named or named == base or Path(named).resolve() == Path(base).resolve()
    return "" if same or read_base_fingerprint(adapter) else f"{adapter} names {named} as its base, not {base}"


def check_bases(adapters: list[Path], base: Path | str) -> None:
    """Check that all adapters were trained on `base`.

    Raises:
        ConfigError: one was trained on another model.
    """
    for adapter in adapters:
        if problem := describe_other_base(adapter, str(base)):
            raise ConfigError(
                f"base: {adapter} {problem}; name its own base with --base, or set allow_other_base if this is the "
                "same model, stored in another way."
            )


def locate_folder(name: str, field: str, revision: str = "main", allow_pickle: bool = False) -> Path:
    """Return the local folder of a model or an adapter; `name` is a folder, the folder of a run, or a hub id.

    A hub id is downloaded, unless it is in the cache.

    Raises:
        ConfigError: there is no such folder, and nothing of this name can be downloaded.
    """
    if reason := absence_reason(name, revision):
        adapter = "name the adapter's folder, or the run's output_dir"
        remedy = adapter if field.startswith("adapter") else "a model folder or a hub id (owner/name) is allowed"
        raise ConfigError(f"{field}: {name} {reason}; {remedy}.")
    if Path(name).exists():
        return find_adapter(name) if field.startswith("adapter") else Path(name)
    try:
        patterns = [*MODEL_FILES, *(["*.bin"] if allow_pickle else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {name} is not a folder, and as a hub id it cannot be downloaded ({short_reason(error)})."
        ) from None
