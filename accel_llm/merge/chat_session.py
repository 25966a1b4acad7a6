"""The chat at the terminal: questions, and the commands beside them."""

import difflib
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from accel_llm.chat.template import Template
from accel_llm.errors import ConfigError, DataError
from accel_llm.merge.dialogues import BARE, describe_sampling
from accel_llm.merge.load import describe_placement
from accel_llm.model.answers import Dialogue, count_questions, print_remark
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.system.places import expand_home

WIDE = 100  # columns of a terminal from which on two answers stand side by side
COMMANDS = {
    "/help": "says this",
    "/reset": "forgets all questions and answers; the system message stays",
    "/system TEXT": "sets the system message from now on; /system none removes it, /system alone shows it",
    "/save FILE": "adds the conversation to a .jsonl file, as a row that launch/sft.py can train on",
    "/retry": "answers the last question again",
    "/base": "shows what the bare model answers to the last question, beside the answer of the adapter",
    "/adapter WHICH": "lets another adapter answer from now on, by its number or name; 0 is the bare model",
    "/adapters": "lists the adapters",
    "/exit": "ends, as Ctrl-D does",
}
HELP = (
    'A text that begins with """ goes on over several lines, up to the next """. A pasted text is one question, with all '
    "its lines, where the terminal tells what is pasted. Ctrl-C stops an answer: the part that is there is kept, and the "
    "chat goes on. At an empty line Ctrl-C twice, or Ctrl-D, ends it."
)


class ChatSession:
    """Obeys the lines that a person types: each is a command, or a question to the current one of the dialogues."""

    def __init__(self, dialogues: dict[str, Dialogue]):
        self.dialogues, self.current = dialogues, next(iter(dialogues))
        self.adapters = [name for name in dialogues if name != BARE]
        self._forgotten: str | None = None  # the last question, if it has no answer

    @property
    def dialogue(self) -> Dialogue:
        """The dialogue that answers."""
        return self.dialogues[self.current]

    def obey(self, line: str) -> bool:
        """Obey a command, or ask a question; return whether the chat goes on. What goes wrong is said, and forgotten."""
        command, argument = [*line.split(maxsplit=1), ""][:2]
        turns = self.dialogue.turns
        try:
            # A path such as /etc/hosts is no command.
            if re.fullmatch(r"/\w*", command):
                return self._obey_command(command, argument)
            self._ask(line)
        except KeyboardInterrupt:
            kept = self.dialogue.turns is not turns
            print_remark(f"Stopped; {'this part of the answer is kept' if kept else 'the question is forgotten'}.")
            self._forgotten = None if kept else self._forgotten
        except (ConfigError, DataError) as error:
            print_remark(str(error).removeprefix("prompt: ").rstrip("."))
        return True

    def _ask(self, question: str) -> None:
        self._forgotten = question
        self.dialogue.ask(question)
        self._forgotten = None

    def _obey_command(self, command: str, argument: str) -> bool:
        if command == "/exit":
            return False
        match command:
            case "/help":
                self._help()
            case "/reset":
                self.dialogue.start_anew()
                print_remark("The conversation starts anew.")
            case "/system":
                self._set_system(argument)
            case "/save":
                self._save(argument)
            case "/retry":
                self._retry()
            case "/base":
                self._compare()
            case "/adapter":
                self._switch(argument)
            case "/adapters":
                self.list_adapters()
            case _:
                print_remark(_unknown_command(command))
        return True

    def _help(self) -> None:
        width = min(shutil.get_terminal_size().columns, 110)
        settings = self.dialogue.settings
        state = f"{describe_sampling(settings)}; an answer has at most {settings.max_new_tokens:,} tokens"
        lines = [f"Now: {describe_dialogue(self.dialogues, self.current)}, {state}."]
        for name, what in COMMANDS.items():
            lines += textwrap.wrap(f"{name:16}{what}", width, subsequent_indent=" " * 16)
        lines += textwrap.wrap(HELP, width)
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _set_system(self, text: str) -> None:
        if not text:
            system = self.dialogue.system
            print_remark(f"The system message is: {system}" if system else "There is no system message.")
            return
        system = None if text == "none" else text
        if system and (problem := system_problem(self.dialogue.template, system)):
            print_remark(f"/system: {problem}")
            return
        for dialogue in self.dialogues.values():
            dialogue.system = system
        print_remark(
            f"The system message is {'set' if system else 'removed'}; /retry answers the last question with it."
        )

    def _save(self, name: str) -> None:
        """Add the conversation to a file; what the file holds stays."""
        if not self.dialogue.turns:
            print_remark("There is nothing to save yet.")
        elif not name.endswith(".jsonl"):
            print_remark("/save needs the name of a .jsonl file, such as /save chats.jsonl; a row is added to it.")
        else:
            path = Path(expand_home(name))
            try:
                with path.open("a+b") as file:
                    end = file.seek(0, 2)
                    file.seek(max(end - 1, 0))
                    newline = b"" if file.read(1) in (b"", b"\n") else b"\n"
                    row = json.dumps({"messages": self.dialogue.messages}, ensure_ascii=False)
                    file.write(newline + f"{row}\n".encode())
                count = count_questions(self.dialogue.turns)
                print_remark(f"Added to {path}: a row with {count:,} question{'s' if count > 1 else ''}.")
            except OSError as error:
                print_remark(f"/save: {path} cannot be written ({error.strerror}).")

    def _retry(self) -> None:
        turns = self.dialogue.turns
        if self._forgotten is not None:
            self._ask(self._forgotten)
        elif not turns:
            print_remark("There is no question yet.")
        else:
            answer = self.dialogue.answer(turns[:-1])
            if answer == turns[-1]["content"] and not self.dialogue.settings.do_sample:
                print_remark("The same answer: it is greedy. Start with --temperature 0.8 for others.")

    def _compare(self) -> None:
        """Show the answer of the bare model to the last question; the conversation goes on without it."""
        turns = self.dialogue.turns
        if self.current == BARE:
            print_remark("The bare model is the one that answers.")
        elif BARE not in self.dialogues:
            print_remark(NO_BARE)
        elif not turns:
            print_remark("There is no question yet.")
        else:
            bare, console = self.dialogues[BARE], Console(highlight=False)
            beside = console.is_terminal and console.width >= WIDE
            bare.start_anew()
            bare.system = self.dialogue.system
            if console.is_terminal and not beside:
                console.print(Text(f"{self.current}:", style="bold"))
                console.print(Text(str(turns[-1]["content"])), soft_wrap=True)
                console.print(Text("bare model:", style="bold"))
            try:
                bare.answer(turns[:-1], shown=not beside)
            except KeyboardInterrupt:
                print_remark("Stopped.")
            if beside and bare.turns:
                table = Table(expand=True)
                for name in (self.current, "bare model"):
                    table.add_column(Text(name), ratio=1, overflow="fold")
                table.add_row(*(Text(str(answers[-1]["content"])) for answers in (turns, bare.turns)))
                console.print(table)
            bare.start_anew()

    def _switch(self, word: str) -> None:
        names = ", ".join(self.adapters)
        chosen = [BARE] if word == "0" else find_named(self.adapters, word)
        if not self.adapters:
            print_remark("There is no adapter; the model answers as it is.")
        elif not word:
            print_remark(f"/adapter needs a number or a name; there are {names}.")
        elif not chosen:
            print_remark(f"/adapter {word} names no adapter, or several; there are {names}.")
        elif chosen[0] not in self.dialogues:
            print_remark(NO_BARE)
        else:
            self.current, self._forgotten = chosen[0], None
            self.dialogue.start_anew()
            print_remark(
                f"From now on {describe_dialogue(self.dialogues, self.current)} answers; the conversation starts anew."
            )

    def list_adapters(self) -> None:
        """Say which adapters there are, by number, and which one answers."""
        if not self.adapters:
            print_remark("There is no adapter; the model answers as it is.")
            return
        names = dict(enumerate([*([BARE] if BARE in self.dialogues else [None]), *self.adapters]))
        shown = [
            f"{k} {'the bare model' if name == BARE else name}{' (now)' if name == self.current else ''}"
            for k, name in names.items()
            if name is not None
        ]
        print_remark(f"/adapter WHICH: {', '.join(shown)}.")


NO_BARE = "The bare model cannot be asked: it has no chat template, and no rows for the tokens of the adapter."


def describe_dialogue(dialogues: dict[str, Dialogue], name: str) -> str:
    """Return which model or adapter a dialogue asks, and on which base."""
    base = str(unwrap_causal_lm(dialogues[name].model).config.name_or_path)
    base = Path(base).name if Path(base).is_dir() else base
    if name == BARE:
        return base if len(dialogues) == 1 else f"the bare model {base}"
    return f"{name} on {base}"


def describe_start(dialogues: dict[str, Dialogue]) -> str:
    """Return the line above a chat: the model, its device and format, and how tokens are chosen."""
    name, dialogue = next(iter(dialogues.items()))
    sampling = describe_sampling(dialogue.settings)
    return f"{describe_dialogue(dialogues, name)}. {describe_placement(dialogue.model)} {sampling.capitalize()}."


def system_problem(template: Template, system: str) -> str | None:
    """Return why a system message does not reach the model, as a sentence; None if it does."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    try:
        text = template.render(messages, add_generation_prompt=True)
    except DataError as error:
        return f"the chat template takes no system message ({error})."
    return None if system.strip() in text else "the chat template does not write a system message."


def find_named(names: list[str], word: str) -> list[str]:
    """Return the one of `names` that has this number (from 1), this name, or this folder as its last part; else []."""
    if word in names:
        return [word]
    found = [name for k, name in enumerate(names, 1) if word in (str(k), Path(name).name)]
    return found if len(found) == 1 else []


def _unknown_command(command: str) -> str:
    names = [name.split()[0] for name in COMMANDS]
    # Words with which other programs end.
    meant = ["/exit"] if command in ("/quit", "/bye", "/q") else difflib.get_close_matches(command, names, n=1)
    return f"{command} is no command; " + (f"did you mean {meant[0]}?" if meant else f"there are {', '.join(names)}.")
