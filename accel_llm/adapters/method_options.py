"""Reads the options of a method as the installed PEFT's own config class describes them: names, types and ranges."""

import typing
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import accel_llm.system.chatter

from peft import PeftConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from accel_llm.errors import raise_problems

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
        "prefix_projection",
        "revision",
        "task_type",
        "token_dim",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )
)
# Options of nearly every method that are rarely wanted, or set by an option with a flat name.
RARE = ("bias", "layers_pattern", "modules_to_save", "target_modules")
OFFERED = 8  # names in an error


def option_names(config_class: type[PeftConfig]) -> list[str]:
    """Return the names that `method_options` may hold for a method with this config class."""
    return [field.name for field in fields(config_class) if field.name not in NOT_FOR_USERS]


def check_method_options(
    method: str, values: dict[str, Any], config_class: type, hidden: Collection[str] = ()
) -> dict[str, Any]:
    """Return `values`, converted to the types of the fields of `config_class`; an error does not offer `hidden` ones.

    Raises:
        ConfigError: the class has no such field, or a value is not of its type. It lists all problems.
    """
    problems: list[str] = []
    checked = _checked(f"method {method}", "", values, config_class, option_names(config_class), problems, hidden)
    raise_problems(problems)
    return checked


def _checked(
    owner: str,
    prefix: str,
    values: dict[str, Any],
    kind: type,
    names: list[str],
    problems: list[str],
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """Return the converted values for the fields `names` of the dataclass `kind`; add what is wrong to `problems`."""
    hints, checked = typing.get_type_hints(kind, include_extras=True), {}
    for name, value in values.items():
        if name not in names:
            problems.append(f"method_options: {owner} has no {name!r}; {_hint(name, names, kind, hidden)}")
            continue
        part = _dataclass_in(hints[name])
        if isinstance(value, dict) and part is not None:
            inner = [field.name for field in fields(part)]
            before = len(problems)
            value = _checked(f"{prefix}{name} of {owner}", f"{name}.", value, part, inner, problems)
            if len(problems) > before:
                continue
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            problems.append(f"method_options: {prefix}{name} {value!r} is not allowed ({error.errors()[0]['msg']}).")
            continue
        if isinstance(value, bool) and not isinstance(checked[name], bool):  # pydantic makes true the number 1
            problems.append(f"method_options: {prefix}{name} {value!r} is not allowed (Input should be a number).")
        elif "dropout" in name and isinstance(checked[name], float) and not 0 <= checked[name] < 1:
            # Layers of PEFT 0.21 with other values train nothing, or divide by zero.
            problems.append(
                f"method_options: {prefix}{name} {value!r} is not allowed; give 0 or more, and less than 1."
            )
    return checked


def _hint(name: str, names: list[str], kind: type, hidden: Collection[str]) -> str:
    """Say which option may be meant, or which ones there are."""
    if guess := get_close_matches(str(name), names, 1):
        return f"did you mean {guess[0]}?"
    offered = [each for each in names if each not in RARE and each not in hidden]
    more = f", and others of PEFT's {kind.__name__}" if len(offered) > OFFERED else ""
    return f"it has {', '.join(offered[:OFFERED])}{more}."


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass that a type is or allows: EvaConfig for `EvaConfig | None`."""
    if is_dataclass(hint):
        return hint if isinstance(hint, type) else None
    return next((part for each in typing.get_args(hint) if (part := _dataclass_in(each)) is not None), None)
