"""Model folders and repositories of strangers: what their own files could make a run do is refused before they are used.

transformers follows what these files say: code to import, kernels to fetch, files to read, and where there is nothing
else a pickle, which is a program. Here they are looked at as JSON alone.
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
    """Refuse a model whose config.json asks for more than a model's settings.

    Code that comes with a family which transformers has itself is passed over: transformers' own is used.

    Raises:
        ConfigError: it needs code of its own, names files outside, or is an adapter.
    """
    config = _config(name, field, revision)
    needed = config.get("auto_map") and str(config.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # transformers 5.23 asks at the terminal whether to run the code of a part of a model.
    if (needed or any("auto_map" in part for part in _parts(config))) and not trust_remote_code:
        raise ConfigError(_code(name, field, "config.json"))
    if not Path(name).is_dir() and _has(name, "adapter_config.json", revision):
        raise ConfigError(f"{field}: {name} is an adapter, not a model; name its base model.")


def check_untrusted_tokenizer(name: str, revision: str, trust_remote_code: bool) -> None:
    """Refuse a tokenizer that needs code of its own, or whose files name others outside.

    Raises:
        ConfigError: it is such a one.
    """
    field, file = "tokenizer_name", "tokenizer_config.json"
    config, settings = _config(name, field, revision), _json(name, file, revision)
    _check_names(settings.get("fast_tokenizer_files"), name, field, file)
    classes = [_named_class(found.get("tokenizer_class"), name) for found in (settings, config)]
    known = str(config.get("model_type")) in TOKENIZER_MAPPING_NAMES or classes[0] is not None
    if settings.get("auto_map") and not known and not trust_remote_code:
        raise ConfigError(_code(name, field, file))


def check_untrusted_weights(name: str, field: str, revision: str, allow_pickle: bool) -> None:
    """Refuse weights that are pickles, unless that is allowed and there are no others, and maps that lead outside.

    Raises:
        ConfigError: they are such.
    """
    listed = _config(name, field, revision).get("transformers_weights")
    for index in (SAFETENSORS_INDEX, *([PICKLE_INDEX] if allow_pickle else []), *([listed] if listed else [])):
        if index.endswith(".index.json"):
            weights = _json(name, index, revision).get("weight_map")
            named = list(weights.values()) if isinstance(weights, dict) else None
            # A shard's own name decides whether transformers unpickles it.
            _check_names(named, name, field, index, ".bin" if index == PICKLE_INDEX else ".safetensors")
    if allow_pickle or listed or _has(name, SAFETENSORS_FILE, revision) or _has(name, SAFETENSORS_INDEX, revision):
        return
    if _has(name, PICKLE_FILE, revision) or _has(name, PICKLE_INDEX, revision):
        raise ConfigError(
            f"{field}: {name} has its weights as a pickle ({PICKLE_FILE}) and not as safetensors; a pickle is a program, so "
            "convert it where you trust it, or set allow_pickle: true, by which tensors alone are unpickled."
        )


def _code(name: str, field: str, file: str) -> str:
    return (
        f"{field}: {name} needs Python code of its own (auto_map in its {file}), which is not run; read it, and if you trust "
        "it set trust_remote_code: true."
    )


def _config(name: str, field: str, revision: str) -> dict[str, Any]:
    """config.json, or the other one that it names for this version of transformers, with no name that leads outside."""
    config = _json(name, "config.json", revision)
    others = config.get("configuration_files")
    _check_names(others, name, field, "config.json", ".json")
    if others:
        config = _json(name, get_configuration_file(others), revision)
    listed = config.get("transformers_weights")
    _check_names([listed] if listed else None, name, field, "config.json", ".safetensors", ".safetensors.index.json")
    return config


def _parts(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Every mapping inside a config, but the config itself."""
    if isinstance(value, dict):
        if depth:
            yield value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _parts(item, depth + 1)


def _check_names(found: Any, name: str, field: str, file: str, *ends: str) -> None:
    """Raises ConfigError for what is no list of files of the model's own folder, whatever system they were named on."""
    for one in found if isinstance(found, list) else [found] if found else []:
        inside = isinstance(one, str) and not re.match(r"[\\/]|\w:", one) and ".." not in re.split(r"[\\/]", one)
        if not inside:
            raise ConfigError(f"{field}: {name} names {one!r} in its {file}; files of its own folder are allowed.")
        if ends and not one.endswith(ends):
            raise ConfigError(f"{field}: {name} names {one!r} in its {file}; {' or '.join(ends)} is allowed.")


def _named_class(named: Any, name: str) -> Any:
    """The class that transformers takes for a tokenizer of this name, None if it takes a tokenizer that is like most.

    transformers 5.23 takes any of its own names, such as that of a model, and calls its from_pretrained.
    """
    found = tokenizer_class_from_name(named) if isinstance(named, str) else None
    is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    # A dummy stands for a class whose library is not installed, and says so.
    if found is None or is_tokenizer or isinstance(found, DummyObject):
        return found
    raise ConfigError(f"tokenizer_name: {name} names {named!r} as its tokenizer_class; a tokenizer is allowed.")


def _has(name: str, file: str, revision: str) -> bool:
    try:
        return has_file(name, file, revision=revision)
    except Exception:  # of huggingface_hub or httpx; loading will meet it again and say it
        return False


def _json(name: str, file: str, revision: str) -> dict[str, Any]:
    """The JSON object in a file of a folder or repository; empty where it cannot be had, which loading will say."""
    try:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
