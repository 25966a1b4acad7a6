"""Ask a model, an adapter, or several adapters of one base: at the terminal, one question, or all questions of a file.

    python launch/chat.py --model output
    python launch/chat.py --model merged --prompt "What is 3 + 4?"
    python launch/chat.py --model merged --file questions.txt --temperature 0.7 > answers.txt
    python launch/chat.py --model output --adapters other third

At the terminal /help lists the commands. Standard output gets the answers alone; all remarks go to standard error.
"""

import accel_llm.config.early
import accel_llm.system.chatter

from transformers import set_seed

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ChatOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.chat_session import ChatSession, describe_start, system_problem
from accel_llm.merge.dialogues import open_dialogues
from accel_llm.merge.questions import answer_questions, read_questions
from accel_llm.model.answers import print_remark
from accel_llm.system.exit import run_script
from accel_llm.system.line_input import LineInput, history_path


def main() -> None:
    options = parse_options(ChatOptions)
    quiet_libraries()
    questions = read_questions(options)  # a file that cannot be read shows before a model is loaded
    set_seed(options.seed)
    dialogues = open_dialogues(options)
    first = next(iter(dialogues))
    if options.system and (problem := system_problem(dialogues[first].template, options.system)):
        raise ConfigError(f"system: {problem}")
    start = describe_start(dialogues)
    print_remark(start if questions else f"{start} /help lists commands.")
    if questions:
        answer_questions({name: dialogues[name] for name in (first, *options.adapters)}, questions)
    else:
        chat(ChatSession(dialogues))


def chat(session: ChatSession) -> None:
    """Answer what a person types, until /exit, Ctrl-D, or Ctrl-C twice at an empty line."""
    lines = LineInput(history_path())
    if session.adapters:
        session.list_adapters()
    while (line := lines.read("you> ")) is not None:
        if line and not session.obey(line):
            break


if __name__ == "__main__":
    run_script(main)
