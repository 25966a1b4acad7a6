"""Ask a model, an adapter, or several adapters of one base, at the terminal or with one question.

python launch/chat.py --model output
python launch/chat.py --model merged --prompt "What is 3 + 4?"
python launch/chat.py --model output --adapters other third
"""

import re
from pathlib import Path

import accel_llm.config.early
import accel_llm.system.chatter

from transformers import set_seed

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ChatOptions
from accel_llm.merge.dialogues import BARE, open_dialogues
from accel_llm.merge.load import print_placement
from accel_llm.model.answers import Dialogue, print_remark
from accel_llm.system.exit import run_script


def main() -> None:
    options = parse_options(ChatOptions)
    quiet_libraries()
    set_seed(options.seed)
    dialogues = open_dialogues(options)
    first = next(iter(dialogues))
    print_placement(dialogues[first].model)
    if not options.prompt:
        chat(dialogues, first)
        return
    for name in (first, *options.adapters):
        if options.adapters:
            print_remark(f"{describe(name)} answers.")
        dialogues[name].ask(options.prompt)


def chat(dialogues: dict[str, Dialogue], current: str) -> None:
    """Answer questions from the terminal until an empty line, Ctrl-D or Ctrl-C; Ctrl-C also stops an answer."""
    if has_adapters := list(dialogues) != [BARE]:
        print_adapters(dialogues)
    while question := read_question():
        # A path such as /etc/hosts is no command.
        if has_adapters and re.fullmatch(r"/\w*", question.split()[0]):
            current = obey(question.split(maxsplit=1), dialogues, current)
            continue
        try:
            dialogues[current].ask(question)
        except KeyboardInterrupt:
            print()
            print_remark("Stopped; this question and its answer are forgotten. Ctrl-C at an empty line ends.")


def read_question() -> str:
    """Return the next line from the terminal; empty at its end."""
    try:
        return input("you> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def obey(words: list[str], dialogues: dict[str, Dialogue], current: str) -> str:
    """Obey a command, and return the name of the model that answers from now on."""
    names = [name for name in dialogues if name != BARE]
    command, argument = words[0], words[1] if len(words) > 1 else ""
    chosen = [BARE] if command == "/base" else find_named(names, argument)
    if command == "/adapters":
        print_adapters(dialogues)
    elif command == "/base" and BARE not in dialogues:
        print_remark(
            "The base alone cannot be asked: it has no chat template, and no rows for the tokens of the adapter."
        )
    elif command not in ("/adapter", "/base"):
        print_remark(f"{command} is no command; there are /adapter, /adapters and /base, and an empty line ends.")
    elif command == "/adapter" and not argument:
        print_remark(f"/adapter needs a number or a name; there are {', '.join(names)}.")
    elif not chosen:
        print_remark(f"/adapter {argument} names no adapter, or several; there are {', '.join(names)}.")
    else:
        dialogues[chosen[0]].start_anew()
        print_remark(f"From now on {describe(chosen[0])} answers; the conversation starts anew.")
        return chosen[0]
    return current


def find_named(names: list[str], word: str) -> list[str]:
    """Return the one of `names` that has this number (from 1), this name, or this folder as its last part; else []."""
    if word in names:
        return [word]
    found = [name for k, name in enumerate(names, 1) if word in (str(k), Path(name).name)]
    return found if len(found) == 1 else []


def print_adapters(dialogues: dict[str, Dialogue]) -> None:
    """Say how to switch."""
    names = [name for name in dialogues if name != BARE]
    switches = [f"/adapter {k} asks {name}" for k, name in enumerate(names, 1)]
    print_remark(f"{', '.join(switches)}, /base asks the base alone; /adapters says this again, an empty line ends.")


def describe(name: str) -> str:
    return "the base alone" if name == BARE else name


if __name__ == "__main__":
    run_script(main)
