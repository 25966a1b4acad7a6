"""What a script says before it imports its libraries, which takes up to ten seconds: --help, and what is wrong with its
options. Import this module first, for what it does; elsewhere than in a script of launch/ it does nothing.
"""

import contextlib
import itertools
import os
import sys
from functools import partial
from pathlib import Path

from accel_llm.config.command_line import parse_options
from accel_llm.config.scripts import TRAINING_SCRIPTS, options_of_script
from accel_llm.errors import ConfigError
from accel_llm.system.importing import show_imports
from accel_llm.system.launcher import process_rank

NAMES_OF_A_RUN = ("--config", "--model_name_or_path", "--train_files", "--help", "-h")


def answer_early(name: str, words: list[str]) -> None:
    """Print the help of the script `name`, or the problems of its options, and end the program; else return.

    Without options a training script takes those of its demo, which are right, but need more modules to be read.
    """
    found = options_of_script(name, words)
    if found is None or (name in (*TRAINING_SCRIPTS, "show_data") and not {*words} & {*NAMES_OF_A_RUN}):
        return
    options_class, words = found
    wants_help = {*words} & {"--help", "-h"}
    if not wants_help and _recipe_is_read_once(words):
        return
    if wants_help and process_rank():
        raise SystemExit(0)
    # The script reads them again; what is said of right options is said then.
    with contextlib.nullcontext() if wants_help else _silence():
        try:
            parse_options(options_class, words, options_class.script_defaults)
            return
        except ConfigError as error:
            problem = error
    from accel_llm.system.exit import run_script  # imports torch

    run_script(partial(_raise, problem))


def _recipe_is_read_once(words: list[str]) -> bool:
    """Return whether the recipe is a pipe, as of `--config <(command)`: the script would find nothing left in it."""
    places = [after for word, after in itertools.pairwise([*words, ""]) if word == "--config"]
    places += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return any(Path(place).exists() and not Path(place).is_file() for place in places)


def _raise(error: ConfigError) -> None:
    raise error


@contextlib.contextmanager
def _silence():
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


if (script := Path(sys.argv[0]).resolve()).parent.name == "launch":
    answer_early(script.stem, sys.argv[1:])
    show_imports()
