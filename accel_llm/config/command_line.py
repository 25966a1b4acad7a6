"""Reads command line and recipe into one checked object: class default < script default < recipe (--config) < flag.

The option names are the fields of the groups in `options`. All problems are reported at once, one sentence each. Option
names of other trainers (`aliases`) are translated if they mean the same here; otherwise the problem names our option.
"""

import difflib
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from accel_llm.config.aliases import (
    ANSWERED_OPTIONS,
    METHOD_NAMES,
    RENAMED_OPTIONS,
    SECRET_OPTIONS,
    SHARES,
    TRANSLATED_VALUES,
    VALUES_BESIDE_AN_OPTION,
)
from accel_llm.config.fields import MAX_YAML_CHARACTERS, Options, parse_method, read_yaml
from accel_llm.config.help_text import describe_values, help_text
from accel_llm.config.method import (
    DEFAULT_METHOD,
    METHODS_WITHOUT_ADAPTER,
    SET_BY_ADAPTER,
    options_for_another_method,
)
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.system.launcher import process_rank
from accel_llm.system.places import expand_home
from accel_llm.system.project_files import script_words
from accel_llm.system.secrecy import MASK, hide_secrets

OptionsT = TypeVar("OptionsT", bound=Options)


def parse_options(
    options_class: type[OptionsT], argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None
) -> OptionsT:
    """Read the flags in `argv` (default: the command line) and the recipe that they name into one checked object.

    `defaults` are a script's own defaults by field name; they do not count as set by the user. `--help` prints the
    options and ends the program.

    Raises:
        ConfigError: with one sentence for each problem.
    """
    # Flags first: they name the recipe.
    defaults = defaults or {}
    flags, problems = _read_flags(sys.argv[1:] if argv is None else argv, options_class)
    if "help" in flags:
        print(help_text(options_class, defaults))
        raise SystemExit(0)

    # Names of other trainers become ours; then values and rules are checked.
    recipe = _read_recipe(str(flags.pop("config"))) if "config" in flags else {}
    given, typed_names = recipe.keys() | flags.keys(), {}
    recipe_values, recipe_problems = _translate(recipe, options_class, given, typed_names)
    flag_values, flag_problems = _translate(flags, options_class, given, typed_names)
    recipe_values = _without_other_method(recipe_values, flag_values, defaults.get("method", DEFAULT_METHOD))
    options, value_problems = _check(options_class, defaults, recipe_values | flag_values, typed_names)

    problems += recipe_problems + flag_problems + value_problems
    if problems or options is None:
        raise ConfigError(*dict.fromkeys(problems))
    return options


def _without_other_method(recipe: dict[str, Any], flags: dict[str, Any], default: str) -> dict[str, Any]:
    """Leave out of the recipe what is meant for its method, if the flags name another one; print what is left out.

    `default` is the method of a recipe that names none. A flag `adapter_name_or_path` without a method stands for that
    adapter's method and settings. What the flags set is not taken from the recipe anyway.
    """
    own, other = parse_method(recipe.get("method", default)), parse_method(flags.get("method", default))
    if not isinstance(own, str) or not isinstance(other, str):
        return recipe
    if "method" in flags:
        reason, names = f"whose method is {own}", options_for_another_method(own, other)
    elif "adapter_name_or_path" in flags and own not in METHODS_WITHOUT_ADAPTER:
        reason, names = "because the adapter has its own", [*SET_BY_ADAPTER]
        if own not in ("lora", "qlora"):  # another method's rates; most adapters are LoRA
            names += ["learning_rate", "learning_rate_patterns"]
    else:
        return recipe
    printed = [name for name in names if name in recipe and name not in flags]
    if printed and process_rank() == 0:
        print(f"not taken from the recipe, {reason}: {', '.join(printed)}", flush=True)
    kept = {name: value for name, value in recipe.items() if name not in names}
    # Whatever adapter it is, the recipe's base stays in 4 bits.
    return {"load_in_4bit": True} | kept if own == "qlora" and "method" not in flags else kept


def resolved_options(options: Options) -> dict[str, Any]:
    """Return every option with its value in force as plain JSON values, without secrets, for files and trackers."""
    return json.loads(hide_secrets(json.dumps(options.model_dump(mode="json", by_alias=True))))


def shell_command(script: str, **options: str | Path) -> str:
    """Return a command that starts the script beside the one that runs, ready to paste where the user stands."""
    words = script_words(script)
    for name, value in options.items():
        # A dash would begin an option, and a tilde the home folder.
        words += [f"--{name}", f"./{value}" if str(value).startswith(("-", "~")) else str(value)]
    return shlex.join(words)


def _read_flags(argv: Sequence[str], options_class: type[Options]) -> tuple[dict[str, Any], list[str]]:
    """Read `--name`, `--name value ...` and `--name=value` as {name: True, text or list of texts}; return problems too.

    If an option is repeated, its last value counts; only lists and mappings grow.
    """
    fields = _fields(options_class)
    flags: dict[str, list[str]] = {}
    problems, name = [], options_class.before_names
    for token in argv:
        # Each `--name` starts an option; the words after it are its values.
        if token == "-h" or token.startswith("--"):
            name, equals, value = token.lstrip("-").partition("=")
            name = {"h": "help"}.get(name, name).replace("-", "_")
            field = fields.get(RENAMED_OPTIONS.get(name, name))
            grows = field is not None and get_origin(field.annotation) in (list, dict)
            flags[name] = (flags.get(name, []) if grows else []) + ([value] if equals else [])
        elif name is None:
            problems.append(f"{token!r} does not belong to an option; a recipe is given as --config {token}.")
        else:
            flags.setdefault(name, []).append(token)

    # An option without a value is True, one value is a text, several are a list.
    if "config" in flags and len(flags["config"]) != 1:
        problems.append(f"config: {flags.pop('config')} is not allowed; give one YAML file.")
    return {name: (values if values[1:] else values[0]) if values else True for name, values in flags.items()}, problems


def _read_recipe(path: str) -> dict[str, Any]:
    """Return the options in a YAML file as {name: value}."""
    path = expand_home(path)
    try:
        with Path(path).open(encoding="utf-8") as file:
            node, values = read_yaml(file.read(MAX_YAML_CHARACTERS + 1))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"config: {path}, line {line}, is not YAML: {error.problem}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"config: {path} cannot be read: {reason}.") from None
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"config: {path} holds a {type(values).__name__}; a recipe consists of lines `option: value`."
        )

    # YAML itself keeps the last value of a repeated key without a word.
    keys = Counter(str(key.value).replace("-", "_") for key, _ in node.value)
    problems = [f"{key}: given {count} times in {path}; give it once." for key, count in keys.items() if count > 1]
    raise_problems(problems)
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _translate(
    raw: dict[str, Any], options_class: type[Options], given: Set[str], typed_names: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Translate the names in `raw` (a recipe or flags) to our options; return the values and the problems.

    `given` are all names that the user has written. The name that the user has written for an option of ours goes into
    `typed_names`.
    """
    fields = _fields(options_class)
    values: dict[str, Any] = {}
    problems = []
    for name, value in raw.items():
        translated = (name, value) if name in fields else _translate_one(name, value, given)
        if isinstance(translated, str):
            problems.append(translated)
            continue
        if translated is None:
            continue

        # Two names may mean the same option.
        option, our_value = translated
        if option not in fields:
            problems.append(_unknown_option(name, list(fields)))
        elif option in values and values[option] != our_value:
            problems.append(
                f"{name}: {_format_value(value)} contradicts another value of {option}; give {option} once."
            )
        else:
            values[option], typed_names[option] = our_value, name
    return values, problems


def _translate_one(name: str, value: Any, given: Set[str]) -> tuple[str, Any] | str | None:
    """Return our option for another trainer's name, and its value. None: it changes nothing here. A text: the problem."""
    word = str(value).lower()
    if word in TRANSLATED_VALUES.get(name, {}):
        return TRANSLATED_VALUES[name][word]
    if name in METHOD_NAMES and re.fullmatch(r"\w+", word):
        return "method", value
    if VALUES_BESIDE_AN_OPTION.get((name, word)) in given:
        return None
    if name in SHARES and _is_number_from_1(value):
        return f"{name}: {_format_value(value)} is not a share below 1; {SHARES[name]}."
    if name in ANSWERED_OPTIONS:
        return f"{name}: {MASK if name in SECRET_OPTIONS else _format_value(value)} has no meaning here; {ANSWERED_OPTIONS[name]}."
    return RENAMED_OPTIONS.get(name, name), value


def _is_number_from_1(value: Any) -> bool:
    try:
        return float(value) >= 1
    except (TypeError, ValueError):
        return False


def _check(
    options_class: type[OptionsT],
    defaults: dict[str, Any],
    user_values: dict[str, Any],
    typed_names: dict[str, str],
) -> tuple[OptionsT | None, list[str]]:
    """Return the checked object (None if a required option is missing or wrong) and the problems, of values and rules."""
    values, problems, options = defaults | user_values, [], None
    errors: dict[str, ErrorDetails] = {}
    try:
        options = options_class.model_validate(values)
    except ValidationError as error:
        fields = _fields(options_class)
        # A default that follows from other options is not computed if one of them is wrong; the user gave no value.
        given = (item for item in error.errors() if item["type"] != "default_factory_not_called")
        errors = {str(item["loc"][0]): item for item in given}
        for name, item in errors.items():
            typed = typed_names.get(name, name)
            label = name if typed == name else f"{typed} (here {name})"
            problems.append(_problem(label, item, values.get(name), fields[name]))
        # The rules are still checked, with the defaults of the wrong options. Required options have no default.
        if not any(fields[name].is_required() for name in errors):
            options = options_class.model_validate({k: v for k, v in values.items() if k not in errors})
    if options is None:
        return None, problems
    # Defaults of the script must not count as set by the user.
    options.model_fields_set.difference_update(defaults.keys() - user_values.keys())
    # A rule about a wrong option would speak of its default, which the user did not give.
    wrong = re.compile("|".join(rf"\b{name}\b" for name in errors) or "$.")
    return options, problems + [problem for problem in options.problems() if not wrong.search(problem)]


def _problem(label: str, error: ErrorDetails, value: Any, field: FieldInfo) -> str:
    if error["type"] == "value_error":
        return f"{label}: {error.get('ctx', {})['error']}."
    if error["type"] == "missing":
        return f"{label}: it is required; give {describe_values(field)}."
    return f"{label}: {_format_value(value)} is not allowed; give {describe_values(field)}."


def _fields(options_class: type[Options]) -> dict[str, FieldInfo]:
    """Return the fields by the name that the user types."""
    return {field.alias or name: field for name, field in options_class.model_fields.items()}


def _unknown_option(name: str, options: list[str]) -> str:
    """Say that an option does not exist, and which ones may be meant: one that is misspelt, or some with its words."""
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.8)
    if not matches:
        matches = [option for option in options if f"_{name}_" in f"_{option}_"]
    hint = f"did you mean {' or '.join(matches)}?" if 1 <= len(matches) <= 3 else "--help lists all options."
    return f"{name}: no such option; {hint}"


def _format_value(value: Any) -> str:
    """Return a value as the user wrote it; an option without a value is true."""
    if isinstance(value, bool):
        return "true (or no value)" if value else "false"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."
