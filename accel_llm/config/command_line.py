"""Command line and recipe to one checked object: class default < script default < `--config recipe.yaml` < flag.

The option names are the fields of the groups in `options`. Everything that is wrong is reported at once, one sentence
for each problem. Names that other trainers use are understood where they mean the same, or answered with ours.
"""

import difflib
import json
import shutil
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from accel_llm.config.aliases import ANSWERED_OPTIONS, RENAMED_OPTIONS, TRANSLATED_VALUES
from accel_llm.config.fields import MOST_YAML, read_yaml
from accel_llm.config.options import Options
from accel_llm.errors import ConfigError
from accel_llm.system.secrecy import hide_secrets

OptionsT = TypeVar("OptionsT", bound=Options)


def parse_options(
    options_class: type[OptionsT], argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None
) -> OptionsT:
    """Reads the flags in `argv` (default: the command line) and the recipe they name into one checked object.

    `defaults` are a script's own defaults by field name; they do not count as set by the person.
    Raises ConfigError with every problem. `--help` prints the options and ends the program.
    """
    defaults = defaults or {}
    flags, problems = _read_flags(sys.argv[1:] if argv is None else argv, options_class)
    if "help" in flags:
        print(_help(options_class, defaults))
        raise SystemExit(0)

    recipe = _read_recipe(str(flags.pop("config"))) if "config" in flags else {}
    in_recipe, wrong_recipe = _translate(recipe, options_class)
    in_flags, wrong_flags = _translate(flags, options_class)
    options, wrong_values = _check(options_class, defaults, in_recipe | in_flags)

    problems += wrong_recipe + wrong_flags + wrong_values
    if problems or options is None:
        raise ConfigError(*dict.fromkeys(problems))
    return options


def resolved_options(options: Options) -> dict[str, Any]:
    """Every option with the value in force, ready for JSON and without secrets: it is written to files and sent to trackers."""
    return json.loads(hide_secrets(json.dumps(options.model_dump(mode="json", by_alias=True))))


def recipe_schema(options_class: type[Options]) -> dict[str, Any]:
    """JSON schema of a script's recipe, for editors."""
    return options_class.model_json_schema(by_alias=True)


def _read_flags(argv: Sequence[str], options_class: type[Options]) -> tuple[dict[str, Any], list[str]]:
    """`--name`, `--name value ...` and `--name=value` as name -> True, text or list of texts; and what fits nowhere.

    A repeated option is overruled by its last value, as command lines go; a repeated list grows.
    """
    fields = _fields(options_class)
    flags: dict[str, list[str]] = {}
    problems, name = [], None
    for token in argv:
        if token == "-h" or token.startswith("--"):
            name, equals, value = token.lstrip("-").partition("=")
            name = {"h": "help"}.get(name, name).replace("-", "_")
            field = fields.get(RENAMED_OPTIONS.get(name, name))
            grows = field is not None and get_origin(field.annotation) in (list, dict)
            flags[name] = (flags.get(name, []) if grows else []) + ([value] if equals else [])
        elif name is None:
            problems.append(f"{token!r} follows no option; a recipe is given as --config {token}")
        else:
            flags[name].append(token)
    if "config" in flags and len(flags["config"]) != 1:
        problems.append(f"config: {flags.pop('config')} is not allowed; give one YAML file")
    return {name: (values if values[1:] else values[0]) if values else True for name, values in flags.items()}, problems


def _read_recipe(path: str) -> dict[str, Any]:
    """Top-level keys and values of a YAML file."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            node, values = read_yaml(file.read(MOST_YAML + 1))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"config: {path}, line {line}, is not YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"config: {path} cannot be read: {reason}") from None
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"config: {path} holds a {type(values).__name__}; a recipe is lines of `option: value`")
    keys = Counter(str(key.value).replace("-", "_") for key, _ in node.value)
    if twice := [f"{key}: given {count} times in {path}; give it once" for key, count in keys.items() if count > 1]:
        raise ConfigError(*twice)
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _translate(given: dict[str, Any], options_class: type[Options]) -> tuple[dict[str, Any], list[str]]:
    """Names of one source, ours and other trainers', to our names; and a sentence for each that has no meaning."""
    fields = _fields(options_class)
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        option, meant = RENAMED_OPTIONS.get(name, name), value
        word = str(value).lower()
        if name in fields:
            option = name
        elif word in TRANSLATED_VALUES.get(name, {}):
            translation = TRANSLATED_VALUES[name][word]
            if translation is None:
                continue
            option, meant = translation
        elif name in ANSWERED_OPTIONS:
            problems.append(f"{name}: {_shown(value)} has no meaning here; {ANSWERED_OPTIONS[name]}")
            continue
        if option not in fields:
            problems.append(_unknown(name, list(fields)))
        elif option in values and values[option] != meant:
            problems.append(
                f"{name}: {_shown(value)} and another value for {option} are both given; give {option} once"
            )
        else:
            values[option] = meant
    return values, problems


def _check(
    options_class: type[OptionsT], defaults: dict[str, Any], given: dict[str, Any]
) -> tuple[OptionsT | None, list[str]]:
    """The object, or none, and what is wrong: values by themselves, then the rules between those that are right."""
    values, problems, options = defaults | given, [], None
    try:
        options = options_class.model_validate(values)
    except ValidationError as error:
        fields = _fields(options_class)
        wrong = {str(item["loc"][0]): item for item in error.errors()}
        problems = [_sentence(name, item, values, fields[name]) for name, item in wrong.items()]
        # A required option that is missing leaves nothing to ask the rules about.
        if wrong.keys() <= values.keys():
            options = options_class.model_validate({k: v for k, v in values.items() if k not in wrong})
    if options is None:
        return None, problems
    options.model_fields_set.difference_update(defaults.keys() - given.keys())
    return options, problems + options.problems()


def _sentence(name: str, error: ErrorDetails, values: dict[str, Any], field: FieldInfo) -> str:
    if error["type"] == "value_error":
        return f"{name}: {error.get('ctx', {})['error']}"
    if error["type"] == "missing":
        return f"{name}: it is required; give {_allowed(field)}"
    return f"{name}: {_shown(values[name])} is not allowed; give {_allowed(field)}"


def _fields(options_class: type[Options]) -> dict[str, FieldInfo]:
    """Fields by the name that a person types."""
    return {field.alias or name: field for name, field in options_class.model_fields.items()}


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name}: no such option; " + (f"did you mean {near[0]}?" if near else "--help lists them all")


def _shown(value: Any) -> str:
    """A value as a person wrote it; an option without a value reads as true."""
    if isinstance(value, bool):
        return "true (or no value)" if value else "false"
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 300 else f"{shown[:300]} ..."


def _allowed(field: FieldInfo) -> str:
    """The values that a field takes, in words."""
    ranges = [words for item in field.metadata if (words := _range(item))]
    return _kind(field.annotation, " and".join(ranges))


def _range(constraint: Any) -> str:
    match constraint:
        case Ge(ge=bound):
            return f" of at least {bound}"
        case Gt(gt=bound):
            return f" above {bound}"
        case Le(le=bound):
            return f" of at most {bound}"
        case Lt(lt=bound):
            return f" below {bound}"
    return ""


def _kind(annotation: Any, ranges: str = "") -> str:
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join([", ".join(map(str, args[:-1])), str(args[-1])] if len(args) > 1 else map(str, args))
    if get_origin(annotation) is dict:
        return "pairs name=value"
    if get_origin(annotation) is list:
        return "any of " + ", ".join(get_args(args[0])) if get_origin(args[0]) is Literal else "one or several texts"
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join("none" if arg is type(None) else _kind(arg, ranges) for arg in args)
    return {bool: "true or false", int: f"a whole number{ranges}", float: f"a number{ranges}", str: "text"}[annotation]


def _help(options_class: type[Options], defaults: dict[str, Any]) -> str:
    """Every option under the title of its group, with what it takes and its default."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = ["Options (--name value, or name: value in the YAML file of --config):"]
    for group in options_class.__mro__:
        if not issubclass(group, Options):
            continue
        inherited = {
            name for parent in group.__mro__[1:] if issubclass(parent, Options) for name in parent.model_fields
        }
        own = [(name, field) for name, field in group.model_fields.items() if name not in inherited]
        lines += ["", f"{(group.__doc__ or '').strip()}:"] if own else []
        for name, field in own:
            default = defaults.get(name, field.get_default(call_default_factory=True))
            shown = "required" if field.is_required() else f"default: {_plain(default)}"
            text = f"{field.description}. Takes {_allowed(field)} ({shown})."
            lines.append(f"  --{field.alias or name}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A default as one types it."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
