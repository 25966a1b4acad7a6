"""The config of a model with random weights: that of a folder, a hub id or a family, with fields changed by the options."""

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.language_part import causal_lm_class
from accel_llm.system.launcher import process_rank

# Fields that say who wrote a file, or that an option of its own sets.
_NOT_TO_CHANGE = {"transformers_version", "architectures", "model_type", "quantization_config", "_name_or_path"}
_OTHER_OPTIONS = {"dtype": "precision", "torch_dtype": "precision", "attn_implementation": "attn_implementation"}
# Older names of settings that transformers 5 keeps in `rope_parameters`.
_ROTARY = ("rope_theta", "partial_rotary_factor")
_LAYERS = "num_hidden_layers"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    _LAYERS,
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# What transformers raises for a value that a family cannot use.
_UNUSABLE = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def is_family(name: str) -> bool:
    """Tell whether `name` is a family of language models (a `model_type` of transformers), and no folder of a model."""
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (Path(name) / "config.json").is_file()


def similar_family(name: str) -> str:
    """Return the family whose name is nearly `name`, which is none; empty if there is no such family."""
    word = name.lower().replace("-", "_")
    return next(iter(get_close_matches(word, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), 1, 0.75)), "")


def family_config(name: str) -> PreTrainedConfig:
    """Return the config of a family with the defaults that transformers has for it.

    Raises:
        ConfigError: transformers has no model of this family that can be built from its defaults.
    """
    try:
        return CONFIG_MAPPING[name]()
    except (*_UNUSABLE, ImportError) as error:
        raise ConfigError(f"config_name: the family {name} cannot be built from its defaults ({error}).") from None


def family_fingerprint(name: str) -> str:
    """Return 16 hexadecimal digits for the defaults of a family, which may change with a version of transformers."""
    settings = family_config(name).to_dict()
    settings.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def change_config(config: PreTrainedConfig, settings: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return a config like `config`, but with other values of some fields; what follows from them is computed anew.

    `settings` is what the file of the config says, empty for the defaults of a family. A name in `overrides` is that of a
    field, or, with dots, of a field in a part (`text_config.hidden_size`, `rope_parameters.rope_theta`). Of a model with
    several parts, those of the language part need no dots.

    Raises:
        ConfigError: with one sentence for each field that is unknown, has a value of another type, or does not fit.
    """
    settings, problems, places = deepcopy(settings), [], {}
    for name, value in overrides.items():
        place = _find(config, name)
        if isinstance(place, str):
            problems.append(place)
            continue
        value = _convert(_owner(config, place[:-1]), place, value)
        if problem := _wrong_value(_owner(config, place[:-1]), name, place[-1], value):
            problems.append(problem)
        places[place] = value
    raise_problems(problems)
    for place, value in places.items():
        _put(config, settings, place, value)
    _refit_layers(config, settings, places)
    try:
        changed = type(config)(**settings)
    except _UNUSABLE as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip(" .")
        raise ConfigError(f"config_overrides: {_shown(overrides)} cannot be used together ({reason}).") from None
    raise_problems([*_ignored(changed, places), *_unfit_heads(changed, {place[-1] for place in places})])
    return changed


def _text_key(config: PreTrainedConfig) -> str | None:
    """Return the name of the part for text; None if the whole config is it."""
    text = config.get_text_config(decoder=True)
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def _names(part: PreTrainedConfig | dict[str, Any]) -> list[str]:
    """Return the names of the fields of a config, or of the keys of a mapping in it."""
    if isinstance(part, dict):
        return list(part)
    own = [field.name for field in fields(part)] if is_dataclass(part) else list(part.to_dict())
    aliases: dict[str, str] = getattr(part, "attribute_map", {})
    return [name for name in (*own, *aliases) if name not in _NOT_TO_CHANGE and name not in _OTHER_OPTIONS]


def _find(config: PreTrainedConfig, name: str) -> tuple[str, ...] | str:
    """Return where a field is, as the names of its parts; or the problem, if there is none of this name."""
    if name in _OTHER_OPTIONS:
        return f"config_overrides: {name} is set by an option of its own; write --{_OTHER_OPTIONS[name]}."
    owner: Any = config
    place: tuple[str, ...] = ()
    parts, text = name.split("."), _text_key(config)
    if text and parts[0] not in _names(config):
        parts.insert(0, text)
    for part in parts:
        if part in _ROTARY and part not in _names(owner) and part in (getattr(owner, "rope_parameters", None) or {}):
            place, owner = (*place, "rope_parameters"), owner.rope_parameters
        known = _names(owner) if isinstance(owner, PreTrainedConfig | dict) else []
        if part not in known and not _is_read(config, owner, part):
            of = ".".join(place) or config.model_type
            return f"config_overrides: {of} has no field {part!r}; {_hint(owner, part, known)}"
        part = part if isinstance(owner, dict) else owner.attribute_map.get(part, part)
        owner, place = owner[part] if isinstance(owner, dict) else getattr(owner, part, None), (*place, part)
    return place


def _is_read(config: PreTrainedConfig, owner: Any, name: str) -> bool:
    """Tell whether the model reads a field that its config does not declare, as Qwen3-MoE does `head_dim`."""
    model_class = causal_lm_class(config) if isinstance(owner, PreTrainedConfig) else None
    if model_class is None:
        return False
    return f'getattr(config, "{name}"' in inspect.getsource(sys.modules[model_class.__module__])


def _hint(owner: Any, part: str, known: list[str]) -> str:
    """Say which field may be meant: one that is misspelt, or one that each kind of layer has (Gemma 3)."""
    rotary = getattr(owner, "rope_parameters", None) or {}
    kinds = [kind for kind, values in rotary.items() if isinstance(values, dict) and part in values]
    guess = [f"rope_parameters.{kinds[0]}.{part}"] if kinds else get_close_matches(part, [*known, *_ROTARY], 1, 0.7)
    return f"did you mean {guess[0]}?" if guess and guess[0] != part else "see the config.json of such a model."


def _owner(config: PreTrainedConfig, place: tuple[str, ...]) -> Any:
    """Return the part of the config at `place`: a config or a mapping."""
    owner: Any = config
    for part in place:
        owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
    return owner


def _value(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)


def _kind(owner: Any, name: str) -> str:
    """Return the type of a field as its family writes it, such as `int | None`; of others that of the value."""
    if is_dataclass(owner):
        for field in fields(owner):
            if field.name == name:
                return field.type if isinstance(field.type, str) else str(getattr(field.type, "__name__", field.type))
    return type(_value(owner, name)).__name__


def _convert(owner: Any, place: tuple[str, ...], value: Any) -> Any:
    """Read a number that YAML takes for a text (1e-6), and a whole number where the field has fractions."""
    kind = _kind(owner, place[-1])
    if "float" in kind or isinstance(_value(owner, place[-1]), float):
        try:
            return value if isinstance(value, bool | None) else float(value)
        except (TypeError, ValueError):
            return value
    return value


def _wrong_value(owner: Any, name: str, field: str, value: Any) -> str | None:
    """Say what is wrong with a value, by the type of its field as transformers checks it; None if nothing is."""
    kind, old = _kind(owner, field), _value(owner, field)
    if isinstance(value, bool) and "bool" not in kind and not isinstance(old, bool) and "Any" not in kind:
        return f"config_overrides: {name} {str(value).lower()} is not allowed; give {_allowed(kind)}."
    if field in _SIZES and isinstance(value, int) and value < 1:
        return f"config_overrides: {name} {value} is not allowed; give a number of at least 1."
    if isinstance(owner, dict):
        return None
    for check in getattr(owner, "__validators__", {}).get(field, []):
        try:
            check(value)
        except (ValueError, TypeError):
            return f"config_overrides: {name} {value!r} is not allowed; give {_allowed(kind)}."
    return None


def _allowed(kind: str) -> str:
    """Describe the values that a type of Python allows."""
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "list": "a list"}
    words |= {"tuple": "a list", "dict": "a mapping"}
    found = [text for name, text in words.items() if re.search(rf"\b{name}\b", kind)]
    return " or ".join(dict.fromkeys(found)) or kind


def _put(config: PreTrainedConfig, settings: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set a value in the settings of a file, which may have its field under another name."""
    owner: Any = config
    for part in place[:-1]:
        inner = _value(owner, part)
        if isinstance(inner, dict) and not isinstance(settings.get(part), dict):
            # The file has it under older names, or not at all.
            settings[part] = deepcopy(inner)
        if part == "rope_parameters":
            for older in (*_ROTARY, "rope_scaling"):
                settings.pop(older, None)
        settings, owner = settings.setdefault(part, {}), inner
    for other, field in getattr(owner, "attribute_map", {}).items():
        if field == place[-1]:
            settings.pop(other, None)
    settings[place[-1]] = value


def _refit_layers(config: PreTrainedConfig, settings: dict[str, Any], places: dict[tuple[str, ...], Any]) -> None:
    """With another number of layers, leave out lists with a value for each layer, if the family makes the same itself.

    Raises:
        ConfigError: the file has such a list that nobody can continue.
    """
    for place in places:
        part = _owner(config, place[:-1])
        if isinstance(part, dict) or place[-1] != part.attribute_map.get(_LAYERS, _LAYERS):
            continue
        old, own = getattr(part, place[-1]), settings
        for key in place[:-1]:
            own = own[key]
        for name, value in list(own.items()):
            if not isinstance(value, list) or len(value) != old or (*place[:-1], name) in places:
                continue
            if name in _NOT_TO_CHANGE or name.endswith("_token_id"):  # a list, but not one of the layers
                continue
            before = {key: old if key == place[-1] else each for key, each in own.items() if key != name}
            if getattr(type(part)(**deepcopy(before)), name, None) != value:
                raise ConfigError(
                    f"config_overrides: {name} of the config has a value for each of {old} layers; give {name} for "
                    f"{places[place]} layers too."
                )
            del own[name]


def _ignored(changed: PreTrainedConfig, places: dict[tuple[str, ...], Any]) -> Iterator[str]:
    """Yield a sentence for each field that the family has set to another value than was asked for."""
    for place, asked in places.items():
        value = _value(_owner(changed, place[:-1]), place[-1])
        if value != asked and not isinstance(value, PreTrainedConfig) and not isinstance(asked, dict):
            yield (
                f"config_overrides: {'.'.join(place)} {asked!r} has no effect: {changed.model_type} makes {value!r} of it; "
                "remove it, or change what it follows from."
            )


def _unfit_heads(config: PreTrainedConfig, fields_changed: set[str]) -> Iterator[str]:
    """Yield a sentence for each size that does not fit the number of attention heads any more."""
    text: Any = config.get_text_config(decoder=True)
    names = {"num_attention_heads", "num_key_value_heads", "hidden_size"}
    if fields_changed.isdisjoint({text.attribute_map.get(name, name) for name in names}):
        return
    heads, groups = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    width = getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    if isinstance(groups, int) and groups > 0 and heads % groups:
        yield (
            f"config_overrides: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}; change "
            "one of them."
        )
    if not getattr(text, "head_dim", None) and not getattr(text, "kv_lora_rank", None) and width % heads:
        yield f"config_overrides: hidden_size {width} is no multiple of num_attention_heads {heads}; change one of them."


def _shown(overrides: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in overrides.items())


def fit_to_tokenizer(options: PretrainOptions, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """Write the tokens of `tokenizer` into the config of a fresh model, and say so; a field that was given stays.

    A family has no vocabulary of its own, so it gets the tokenizer's. Tokens that begin and end a document are the
    tokenizer's in any case: a model with random weights knows no others. Returns what to do about a token without a row.
    """
    if options.config_name is None:
        return "use the model's own tokenizer"
    text, notes, family = config.get_text_config(decoder=True), [], is_family(options.config_name)
    values: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family:
        own_pad = tokenizer.pad_token_id != tokenizer.eos_token_id
        values |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id if own_pad else None}
    for name, value in values.items():
        old = getattr(text, name, None)
        same = old == value or (isinstance(old, list) and value in old)
        if same or name in options.config_overrides or (value is None and name != "pad_token_id"):
            continue
        for part in {id(part): part for part in (config, text) if hasattr(part, name)}.values():
            setattr(part, name, value)
        notes.append(f"{name}={value}")
    if notes and process_rank() == 0:
        print(f"config_name: taken from the tokenizer: {', '.join(notes)}", flush=True)
    return f"set config_overrides: vocab_size={len(tokenizer)}, or use another tokenizer"
