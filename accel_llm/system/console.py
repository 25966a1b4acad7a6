"""The command `accel-llm`, which finds scripts, recipes and launch YAMLs by name, wherever the package is installed."""

import difflib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from accel_llm.errors import ConfigError
from accel_llm.system.project_files import first_sentence, launch_configs, project_recipes, project_scripts

USAGE = """\
accel-llm SCRIPT ...                 start a script in one process
accel-llm SCRIPT --help              list its options
accel-llm launch OPTIONS SCRIPT ...  start it by `accelerate launch OPTIONS`
accel-llm where                      print the folder of the launch YAMLs
accel-llm where NAME                 print the path of a script, recipe or YAML

Recipes and launch YAMLs are found by name:

accel-llm sft --config demo
accel-llm launch --config_file zero2 --num_processes 2 sft --config demo
accelerate launch --config_file $(accel-llm where zero2) \\
    $(accel-llm where sft) --config $(accel-llm where demo)
"""


def run_command() -> None:
    """Run the command line. A script takes the place of this process, so signals and exit codes are its own."""
    words = sys.argv[1:]
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_overview())
        elif words[0] == "where":
            print(_find(words[1:]))
        else:
            _replace_process(script_command(words))
        sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # standard output is closed, as by `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None


def script_command(words: Sequence[str]) -> list[str]:
    """Return the command, from the interpreter on, that `accel-llm` with these words stands for.

    Raises:
        ConfigError: no word is the name of a script.
    """
    scripts = project_scripts()
    launched = words[0] == "launch"
    at = next((k for k, word in enumerate(words) if word in scripts), None) if launched else 0
    if at is None:
        raise ConfigError(f"accel-llm launch: no script is named; add one of {', '.join(scripts)}.")
    if words[at] not in scripts:
        raise ConfigError(_no_such(words[at], [*scripts, "launch", "where"]))
    script = [str(scripts[words[at]]), *_by_name(words[at + 1 :], "--config", project_recipes())]
    launcher = ["-m", "accelerate.commands.accelerate_cli", *_by_name(words[:at], "--config_file", launch_configs())]
    return [sys.executable, *(launcher if launched else []), *script]


def _by_name(words: Sequence[str], option: str, files: Mapping[str, Path]) -> list[str]:
    """Replace the value of `option` by the path of the file that it names, unless there is such a file here."""

    def path(value: str) -> str:
        return str(files[value]) if value in files and not Path(value).is_file() else value

    replaced = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        is_value = before == option
        replaced.append(path(word) if is_value else f"{name}={path(value)}" if equals and name == option else word)
    return replaced


def _find(names: Sequence[str]) -> Path:
    """Return the path of a script, recipe or launch YAML; without a name, the folder of the launch YAMLs."""
    configs = launch_configs()
    if not names:
        return next(iter(configs.values())).parent
    files = project_scripts() | project_recipes() | configs
    if len(names) > 1:
        raise ConfigError(f"accel-llm where: {len(names)} names are given; give one.")
    if names[0] not in files:
        raise ConfigError(_no_such(names[0], list(files)))
    return files[names[0]]


def _no_such(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "accel-llm without a word lists all."
    return f"accel-llm: there is no {name!r}; {hint}"


def _overview() -> str:
    scripts = project_scripts()
    room = shutil.get_terminal_size().columns - 16
    said = {name: textwrap.shorten(first_sentence(path), room, placeholder=" ...") for name, path in scripts.items()}
    lines = [f"  {name:14}{sentence}" for name, sentence in said.items()]
    lines += ["", "Recipes (--config):", *_columns(list(project_recipes()))]
    lines += ["", "Launch YAMLs (--config_file):", *_columns(list(launch_configs()))]
    return "\n".join([USAGE, "Scripts:", *lines])


def _columns(names: Sequence[str], count: int = 4) -> list[str]:
    rows = [names[k : k + count] for k in range(0, len(names), count)]
    return ["  " + "".join(f"{name:18}" for name in row).rstrip() for row in rows]


def _replace_process(command: list[str]) -> None:
    sys.stdout.flush()
    if os.name == "nt":  # Windows cannot replace a process: the new one would go on behind the prompt
        raise SystemExit(subprocess.call(command))
    os.execv(command[0], command)
