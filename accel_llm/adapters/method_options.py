"""Reads the options of a method as the installed PEFT's own config class describes them: names, types and ranges."""

import typing
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import accel_llm.system.chatter

from peft import PeftConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from accel_llm.errors import ConfigError

# Fields of each config class that follow from the model or from the run.
NOT_FOR_USERS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "token_dim",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )
)


def option_names(config_class: type[PeftConfig]) -> list[str]:
    """Return the names that `method_options` may hold for a method with this config class."""
    return [field.name for field in fields(config_class) if field.name not in NOT_FOR_USERS]


def check_method_options(method: str, values: dict[str, Any], config_class: type[PeftConfig]) -> dict[str, Any]:
    """Return `values`, converted to the types of the fields of `config_class`.

    Raises:
        ConfigError: the class has no such field, or a value is not of its type. It lists all problems.
    """
    names, hints = option_names(config_class), typing.get_type_hints(config_class, include_extras=True)
    checked, problems = {}, []
    for name, value in values.items():
        if name not in names:
            guess = get_close_matches(name, names, 1)
            hint = f"did you mean {guess[0]}? " if guess else ""
            problems.append(f"method_options: method {method} has no {name!r}; {hint}It has {', '.join(names)}.")
            continue
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, strict=False))
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            problems.append(f"method_options: {name} {value!r} is not allowed ({error.errors()[0]['msg']}).")
    if problems:
        raise ConfigError(*problems)
    return checked
