"""Checks untrusted model folders and repositories before they are used, and refuses what could harm a run.

transformers does what a model's files say: import code, fetch kernels, read other files, and unpickle weights (a pickle
is a program). These checks only parse the files as JSON.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import get_configuration_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.utils.hub import cached_file, has_file
from transformers.utils.import_utils import DummyObject

from accel_llm.errors import ConfigError

SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def check_untrusted_config(name: str, field: str, revision: str, trust_remote_code: bool) -> None:
    """Check that a model's config.json is harmless. `field` is the option to name in an error.

    If transformers has the model's family itself, code that comes with the model is ignored, not refused.

    Raises:
        ConfigError: the model needs its own Python code, its config.json names files outside its folder, or it is an
            adapter.
    """
    config = _read_config(name, field, revision)
    needed = config.get("auto_map") and str(config.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # For code of a part of a model (a vision tower) transformers 5.23 would ask at the terminal.
    if (needed or any("auto_map" in part for part in _nested_mappings(config))) and not trust_remote_code:
        raise ConfigError(_code_refusal(name, field, "config.json"))
    if not Path(name).is_dir() and _has_file(name, "adapter_config.json", revision):
        raise ConfigError(f"{field}: {name} is an adapter, not a model; name its base model.")


def check_untrusted_tokenizer(name: str, revision: str, trust_remote_code: bool) -> None:
    """Check that the files of a tokenizer are harmless.

    Raises:
        ConfigError: the tokenizer needs its own Python code, or its files name files outside its folder.
    """
    field, file = "tokenizer_name", "tokenizer_config.json"
    config, settings = _read_config(name, field, revision), _read_json(name, file, revision)
    _check_file_names(settings.get("fast_tokenizer_files"), name, field, file)
    classes = [_tokenizer_class(values.get("tokenizer_class"), name) for values in (settings, config)]
    # transformers takes a class of its own if it has one for the family or for the name in tokenizer_config.json.
    has_own_class = str(config.get("model_type")) in TOKENIZER_MAPPING_NAMES or classes[0] is not None
    if settings.get("auto_map") and not has_own_class and not trust_remote_code:
        raise ConfigError(_code_refusal(name, field, file))


def check_untrusted_weights(name: str, field: str, revision: str, allow_pickle: bool) -> None:
    """Check the weight files of a model by their names, without opening them.

    Raises:
        ConfigError: the weights are only there as a pickle and `allow_pickle` is false, or an index names files outside
            the folder or of another type.
    """
    # Every file that an index names must be in the folder and have the index's own type.
    weights_file = _read_config(name, field, revision).get("transformers_weights")
    extra_indexes = [PICKLE_INDEX] if allow_pickle else []
    extra_indexes += [weights_file] if weights_file else []
    for index in (SAFETENSORS_INDEX, *extra_indexes):
        if index.endswith(".index.json"):
            weights = _read_json(name, index, revision).get("weight_map")
            shards = list(weights.values()) if isinstance(weights, dict) else None
            # transformers decides by the name of a shard whether to unpickle it.
            _check_file_names(shards, name, field, index, ".bin" if index == PICKLE_INDEX else ".safetensors")

    # A pickle is refused only if there are no other weights.
    if allow_pickle or weights_file:
        return
    if any(_has_file(name, file, revision) for file in (SAFETENSORS_FILE, SAFETENSORS_INDEX)):
        return
    if any(_has_file(name, file, revision) for file in (PICKLE_FILE, PICKLE_INDEX)):
        raise ConfigError(
            f"{field}: the weights of {name} are a pickle ({PICKLE_FILE}), not safetensors. A pickle is a program: "
            "convert it to safetensors in a safe place, or set allow_pickle: true, which unpickles only tensors."
        )


def _code_refusal(name: str, field: str, file: str) -> str:
    return (
        f"{field}: {name} needs its own Python code (auto_map in {file}), which is not run by default; read the code, "
        "and if you trust it, set trust_remote_code: true."
    )


def _read_config(name: str, field: str, revision: str) -> dict[str, Any]:
    """Return the config that transformers will use: config.json, or the file it names for this version of transformers.

    Raises:
        ConfigError: it names files outside the folder.
    """
    config = _read_json(name, "config.json", revision)
    others = config.get("configuration_files")
    _check_file_names(others, name, field, "config.json", ".json")
    if others:
        config = _read_json(name, get_configuration_file(others), revision)
    file = config.get("transformers_weights")
    endings = (".safetensors", ".safetensors.index.json")
    _check_file_names([file] if file else None, name, field, "config.json", *endings)
    return config


def _nested_mappings(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every mapping inside a config, at any depth, without the config itself."""
    if isinstance(value, dict):
        if depth:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _nested_mappings(item, depth + 1)


def _check_file_names(file_names: Any, name: str, field: str, file: str, *endings: str) -> None:
    """Check names of files, with Linux or Windows separators, that the model's `file` lists; None is an empty list.

    Raises:
        ConfigError: a name is not text, leads out of the model's folder, or has none of `endings`.
    """
    if not isinstance(file_names, list):
        file_names = [file_names] if file_names else []
    for file_name in file_names:
        is_relative = isinstance(file_name, str) and not re.match(r"[\\/]|\w:", file_name)
        if not is_relative or ".." in re.split(r"[\\/]", file_name):
            allowed = "files of its own folder are"
        elif endings and not file_name.endswith(endings):
            allowed = f"{' or '.join(endings)} is"
        else:
            continue
        raise ConfigError(f"{field}: {name} names {file_name!r} in its {file}; only {allowed} allowed.")


def _tokenizer_class(class_name: Any, name: str) -> Any:
    """Return the tokenizer class that transformers has under `class_name`, or None (then it uses its general one).

    transformers 5.23 accepts the name of any of its classes here, even of a model, and calls its from_pretrained.

    Raises:
        ConfigError: the class is not a tokenizer.
    """
    tokenizer_class = tokenizer_class_from_name(class_name) if isinstance(class_name, str) else None
    is_tokenizer = isinstance(tokenizer_class, type) and issubclass(tokenizer_class, PreTrainedTokenizerBase)
    # transformers has a DummyObject for a class whose library is not installed; loading it says so.
    if tokenizer_class is None or is_tokenizer or isinstance(tokenizer_class, DummyObject):
        return tokenizer_class
    raise ConfigError(f"tokenizer_name: {name} has {class_name!r} as its tokenizer_class, which is not a tokenizer.")


def _has_file(name: str, file: str, revision: str) -> bool:
    try:
        return has_file(name, file, revision=revision)
    except Exception:  # of huggingface_hub or httpx; loading the model will report it
        return False


def _read_json(name: str, file: str, revision: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder or repository; empty if it cannot be read: loading reports that."""
    try:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
