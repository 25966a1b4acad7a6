"""The questions of a file, each of which launch/chat.py answers by itself."""

from typing import Any, NamedTuple

from accel_llm.chat.messages import Message
from accel_llm.config.tool_options import ChatOptions
from accel_llm.data.prompts import parse_prompt
from accel_llm.data.sources import RawRow, as_source, read_source
from accel_llm.data.tokenized import TokenizedRow
from accel_llm.errors import ConfigError, DataError
from accel_llm.model.answers import Dialogue, print_remark

_SHOWN = 60  # characters of a question in a remark


class AskedQuestion(NamedTuple):
    """A conversation that ends with a question, with the tools and the template variables of its row."""

    system: str | None
    turns: list[Message]
    tools: list[Any] | None = None
    variables: dict[str, Any] | None = None


def read_questions(options: ChatOptions) -> list[RawRow]:
    """Return the rows with the questions of the options: one with `prompt`, those of `file`, or none.

    Raises:
        ConfigError: the file cannot be read, or has no rows.
    """
    if options.prompt is not None:
        return [RawRow("", 1, {"messages": [{"role": "user", "content": options.prompt}]})]
    if options.file is None:
        return []
    try:
        return list(read_source(as_source(options.file)))
    except DataError as error:
        raise ConfigError(f"file: {error}") from None


def answer_questions(dialogues: dict[str, Dialogue], rows: list[RawRow]) -> None:
    """Print the answer of each dialogue to each question; none knows of the others.

    All questions are read before the first is answered.

    Raises:
        DataError: a row has no question, or the template refuses it.
        ConfigError: a question leaves no room for an answer.
    """
    asked = [(row.number, name, _read_question(row, dialogues[name])) for row in rows for name in dialogues]
    for number, name, question in asked:
        text = " ".join(str(question.turns[-1]["content"]).split())
        shown = f"{number} of {len(rows):,}: {text[:_SHOWN]}{'...' if text[_SHOWN:] else ''}" if rows[1:] else ""
        who = f"{name or 'the bare model'} answers" if len(dialogues) > 1 else ""
        if shown or who:
            print_remark("; ".join(filter(None, (shown, who))))
        dialogue = dialogues[name]
        dialogue.start_anew()
        dialogue.system = question.system
        dialogue.answer(question.turns, question.tools, question.variables)


def _read_question(row: RawRow, dialogue: Dialogue) -> AskedQuestion:
    """Return what a row asks, if the model can be asked it; a system message of the row replaces that of the options.

    Raises:
        DataError: the row has no question, or the template refuses it.
        ConfigError: it leaves no room for an answer.
    """
    where = f"{row.file}, row {row.number}: " if row.file else ""
    try:
        parsed = parse_prompt(row.fields, reads=dialogue.template.reads)
        if isinstance(parsed, TokenizedRow):
            raise DataError("input_ids: found token ids; needs a question in words")
        system, turns = dialogue.system, parsed.messages
        if turns[0]["role"] == "system":
            system, turns = str(turns[0]["content"]), turns[1:]
        question = AskedQuestion(system, turns, parsed.tools, parsed.variables or None)
        dialogue.fit(*question)
        return question
    except DataError as error:
        raise DataError(f"{where}{error}", error.reason) from None
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
