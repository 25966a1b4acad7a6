"""The text of --help: how to call a script, examples, the options that people change most, and all options in groups."""

import ast
import re
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from accel_llm.config.fields import Options
from accel_llm.config.options import TrainOptions
from accel_llm.config.scripts import OPTIONS_BESIDE, OPTIONS_BY_STEP

# Of training; of the other scripts those that must be given.
MOST_CHANGED = ("model_name_or_path", "train_files", "eval_files", "output_dir", "method", "max_length")
MOST_CHANGED += ("num_train_epochs", "total_batch_size", "learning_rate")


def help_text(options_class: type[Options], defaults: dict[str, Any]) -> str:
    """Return the text of --help for the script that runs; `defaults` are its own, by field name.

    What the script does and the examples are those of its docstring.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    trains = issubclass(options_class, TrainOptions)
    lines = [*_usage(options_class), "  --config RECIPE.yaml"]
    about = "A YAML file with lines `name: value`; what is given on the command line wins over it."
    about += " Those in launch/recipes are examples." if trains else ""
    lines += _indented(about, width)

    fields = options_class.model_fields
    front = [name for name, field in fields.items() if field.is_required()]
    if front := [name for name in MOST_CHANGED if name in fields] if trains else front:
        lines += ["", "Changed most often:" if trains else "Always given:"]
        lines += [f"  --{name:<20} {_first_part(fields[name])}" for name in front]
    for title, names in option_groups(options_class):
        lines += ["", f"{title}:"]
        # Two parts for each: its name, and its description with values and default.
        for name in names:
            field = fields[name]
            default = defaults.get(name, field.get_default(call_default_factory=True, validated_data={}))
            default_text = "required" if field.is_required() else f"default: {_format_default(default)}"
            text = f"{field.description}. Takes {describe_values(field)} ({default_text})."
            lines += [f"  --{field.alias or name}", *_indented(text, width)]
    return "\n".join(lines)


def _usage(options_class: type[Options]) -> list[str]:
    """Return how to call the script that runs, and what its docstring says and shows."""
    path, before = Path(sys.argv[0]), options_class.before_names
    trains = issubclass(options_class, TrainOptions) and path.stem not in OPTIONS_BESIDE
    steps = " | ".join(OPTIONS_BY_STEP.get(path.stem, ()))
    first = (
        f" {steps}"
        if steps
        else f" {before.upper()} ..."
        if before
        else " [SCRIPT]"
        if path.stem in OPTIONS_BESIDE
        else ""
    )
    words = f"launch/{path.name}{first} [--config RECIPE.yaml] [--NAME VALUE ...]"
    launcher = ["usage: accelerate launch --config_file accelerate_configs/STRATEGY.yaml \\", f"           {words}"]
    lines = [*(launcher if trains else [f"usage: python {words}"]), ""]
    if path.suffix == ".py" and path.is_file():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        # Python joins lines that end with a backslash.
        docstring = re.sub(
            r"(?<=\S) {8,}(?=--)", " \\\n        ", docstring.replace(" `--help` lists all options.", "")
        )
        dry_run = f"    python launch/{path.name} --config RECIPE.yaml --dry_run\n"
        lines += [docstring.replace("\n\n    ", f"\n\n{dry_run}    ", 1) if trains else docstring, ""]
    return lines


def option_groups(options_class: type[Options]) -> Iterator[tuple[str, list[str]]]:
    """Yield the title of each group of options and the fields that the group itself adds."""
    for group in options_class.__mro__:
        if not issubclass(group, Options):
            continue
        skipped = {name for parent in group.__mro__[1:] if issubclass(parent, Options) for name in parent.model_fields}
        # As the script has them: a group of its own may allow other values.
        if names := [name for name in group.model_fields if name not in skipped | {*options_class.unused}]:
            yield (group.__doc__ or "").strip(), names


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _first_part(field: FieldInfo) -> str:
    return (field.description or "").partition(";")[0]


def _format_default(value: Any) -> str:
    """Return a default as the user would type it."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def describe_values(field: FieldInfo) -> str:
    """Return the values that a field takes, in words."""
    ranges = [words for item in field.metadata if (words := _describe_range(item))]
    return _describe_type(field.annotation, " and".join(ranges))


def _describe_range(constraint: Any) -> str:
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


def _describe_type(annotation: Any, ranges: str = "") -> str:
    """Return in words what an annotation allows: choices, pairs, lists, alternatives or one of the plain types."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join([", ".join(map(str, args[:-1])), str(args[-1])] if len(args) > 1 else map(str, args))
    if get_origin(annotation) is dict:
        return "pairs name=value"
    if get_origin(annotation) is list:
        if get_origin(args[0]) is Literal:
            return "any of " + ", ".join(get_args(args[0]))
        return "one or several numbers" if args[0] is float else "one or several texts"
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join("none" if arg is type(None) else _describe_type(arg, ranges) for arg in args)
    if get_origin(annotation) is Annotated:  # a type of ours as one of several alternatives
        return _describe_type(args[0], ranges)
    return {bool: "true or false", int: f"a whole number{ranges}", float: f"a number{ranges}", str: "text"}[annotation]
