"""Answers to all rows of some files, in a file that grows batch by batch and is complete at the end.

Beside `output_file` grows a file of the same name with .part, which holds the answers, each with the number of its row.
A job that ends early goes on from there. At the end the rows are read once more, and written with their answers.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accel_llm.config.fields import Source
from accel_llm.config.tool_options import PredictOptions
from accel_llm.data.columns import column_problems
from accel_llm.data.prompts import parse_prompt
from accel_llm.data.sources import RawRow, as_source, data_fingerprint, read_source, source_identity
from accel_llm.data.tokenized import TokenizedRow
from accel_llm.data.writers import WRITERS, write_rows
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.merge.dialogues import identify_model
from accel_llm.model.answers import Dialogue
from accel_llm.model.batch_answers import BatchAnswer, PromptRow, QuestionBatches
from accel_llm.system.folders import hidden_sibling, write_problem
from accel_llm.system.part_file import PartFile
from accel_llm.system.run_lock import locked

ROWS_AHEAD = 512  # rows that are read and sorted by length together
# The options that change answers, beside the model and the rows. The size of the batches is none of them.
DECIDING = (
    "max_new_tokens",
    "temperature",
    "seed",
    "max_length",
    "precision",
    "load_in_4bit",
    "data_format",
    "columns",
)
TOO_LONG = "too long"
UNKNOWN_TOKENS = "unknown tokens"


class InputRow(NamedTuple):
    """A row of the input: its number, from 0 over all sources, and where it stands."""

    number: int
    source: Source
    row: RawRow


class _Numbers:
    """A set of numbers that are added nearly in their order: little is kept of millions."""

    def __init__(self) -> None:
        self.first, self.ahead = 0, set[int]()  # all below `first` are in the set

    def add(self, number: int) -> None:
        self.ahead.add(number)
        while self.first in self.ahead:
            self.ahead.remove(self.first)
            self.first += 1

    def is_empty(self) -> bool:
        return not (self.first or self.ahead)

    def __contains__(self, number: int) -> bool:
        return number < self.first or number in self.ahead


def check_files(options: PredictOptions) -> str:
    """Check what can be checked before a model is loaded, and return a hash of the content of the input.

    Raises:
        ConfigError: `output_file` cannot be written, or `columns` has an unknown field.
        DataError: a source cannot be read.
    """
    output, sources = Path(options.output_file), list(map(as_source, options.input_files))
    if output.suffix.lower() not in WRITERS:
        known = ", ".join(WRITERS)
        raise ConfigError(f"output_file: {output} ends with {output.suffix!r}; allowed: a name that ends with {known}.")
    if output.is_dir():
        raise ConfigError(f"output_file: {output} is a folder; name a file in it.")
    if problem := write_problem(output.parent):
        raise ConfigError(f"output_file: {output.parent} {problem}; name another folder.")
    for source in sources:
        if source.path and output.resolve().is_relative_to(Path(source.path).resolve()):
            raise ConfigError(f"output_file: {output} belongs to {source.path}, which is read; name another file.")
    if output.exists() and not options.overwrite_output_file:
        raise ConfigError(f"output_file: {output} exists already; name another file, or set overwrite_output_file.")
    for source in sources:
        data_format, columns = _format(source, options)
        raise_problems(column_problems(columns, data_format))
    try:
        return data_fingerprint([(source.model_dump(), source_identity(source)) for source in sources])
    except DataError as error:
        raise DataError(f"input_files: {error}", error.reason) from None


def _format(source: Source, options: PredictOptions) -> tuple[Any, dict[str, str]]:
    return source.data_format or options.data_format, {**options.columns, **source.columns}


@contextmanager
def open_predictions(options: PredictOptions, dialogue: Dialogue, input_hash: str) -> Iterator["Predictions"]:
    """Begin to answer the input, or go on where an earlier process ended; `input_hash` is that of `check_files`.

    Raises:
        ConfigError: another process writes `output_file`, or what was begun there had another model, input or settings.
    """
    output = Path(options.output_file)
    with locked(hidden_sibling(output.absolute(), "lock"), output, "output_file"):
        part = PartFile(output.with_name(f"{output.name}.part"))
        predictions = Predictions(options, dialogue, part)
        _begin(part, {"model": identify_model(options), "input_files": input_hash} | _settings_of(options), options)
        try:
            for value in part.values():
                predictions.count(value)
            yield predictions
        finally:
            part.close()
            if predictions.done.is_empty():  # so that another setting can be tried at once
                part.path.unlink(missing_ok=True)


def _settings_of(options: PredictOptions) -> dict[str, Any]:
    template = options.chat_template
    if template and Path(template).is_file():
        template = data_fingerprint(Path(template))
    values = {name: getattr(options, name) for name in DECIDING if name != "seed" or options.temperature}
    return values | {"chat_template": template}


def _begin(part: PartFile, settings: dict[str, Any], options: PredictOptions) -> None:
    """Open the file of answers: one that was begun with the same settings goes on, else it is begun."""
    try:
        earlier = part.settings()
    except ValueError:
        raise ConfigError(f"output_file: {part.path} holds something else than answers; move it away.") from None
    if earlier is None or next(part.values(), None) is None:  # killed before its first answer
        part.begin(settings)
        return
    changed = [name for name in settings if earlier.get(name) != settings[name]]
    if changed and not options.overwrite_output_file:
        names = [f"another {name}" if name in ("model", "chat_template") else f"other {name}" for name in changed]
        shown = [f"{name} was {earlier.get(name)!r}, now {settings[name]!r}" for name in changed if name in DECIDING]
        details = f" ({'; '.join(shown)})" if shown else ""
        raise ConfigError(
            f"output_file: {part.path} was begun with {' and '.join(names)}{details}; give the same, "
            "name another file, or set overwrite_output_file to begin anew."
        )
    if changed:
        part.begin(settings)
    else:
        part.go_on()


class Predictions:
    """The rows of the input and their answers; made by `open_predictions`.

    First `survey`, then `answer` each of `batches_left`, then `finish`.
    """

    def __init__(self, options: PredictOptions, dialogue: Dialogue, part: PartFile):
        self.options, self.dialogue, self.part = options, dialogue, part
        limits = [limit for limit in (dialogue.limit, options.max_length) if limit]
        if len(limits) == 2 and limits[1] > limits[0]:
            raise ConfigError(f"max_length: {limits[1]:,}, but the model has {limits[0]:,} positions; give no more.")
        self.limit = min(limits, default=None)
        size = options.per_device_eval_batch_size
        self.questions = QuestionBatches(dialogue, self.limit, size, options.seed)
        self.vocabulary = dialogue.model.get_input_embeddings().weight.shape[0]
        self.new_columns = [f"{options.column_prefix}{name}" for name in ("generated", "stopped")]
        if options.on_bad_row == "drop":
            self.new_columns.append(f"{options.column_prefix}problem")
        # What is known of the input after `survey`, and of the answers so far.
        self.total, self.columns = 0, dict.fromkeys(())
        self.done, self.answered, self.stopped, self.tokens = _Numbers(), 0, 0, 0
        self.problems: Counter[str] = Counter()  # reason -> rows without an answer
        self.examples: list[str] = []

    def survey(self) -> None:
        """Read all rows once: nothing is generated if one cannot be answered, or has a column of the new names.

        Raises:
            ConfigError: a row has such a column.
            DataError: a row is bad and `on_bad_row` is `error`, or a file cannot be read.
        """
        for place in self._places():
            self.total += 1
            self.columns |= dict.fromkeys(place.row.fields)
            if taken := next((name for name in self.new_columns if name in place.row.fields), None):
                raise ConfigError(
                    f"column_prefix: {self.options.column_prefix!r} makes a new column {taken!r}, but {_where(place)} has "
                    "one; give another, such as new_."
                )
            if place.number in self.done:
                continue
            try:
                self._question(place)
            except DataError as error:
                sentence = f"{_where(place)}: {error}"
                if self.options.on_bad_row == "error":
                    advice = "on_bad_row: drop keeps such rows, without an answer"
                    raise DataError(f"{sentence}; {advice}.", error.reason) from None
                if len(self.examples) < 3:
                    self.examples.append(sentence)

    def batches_left(self) -> Iterator[list[PromptRow]]:
        """Yield batches of the questions that have no answer yet, of similar length.

        Which rows share a batch depends on the rows that have no answer alone, so a job that was killed goes on with
        the batches that it would have had.
        """
        places = self._places()
        while window := list(itertools.islice(places, max(ROWS_AHEAD, 8 * self.questions.size))):
            questions, problems = [], []
            for place in window:
                if place.number in self.done:
                    continue
                try:
                    questions.append(self._question(place))
                except DataError as error:
                    problems.append({"row": place.number, "problem": str(error), "reason": error.reason})
            if problems:
                self._write(problems)
            yield from self.questions.cut(questions)

    def answer(self, batch: list[PromptRow]) -> list[BatchAnswer]:
        """Answer one of `batches_left`. When this returns, a kill cannot lose the answers."""
        answers = self.questions.answer(batch)
        lines = [
            {"row": question.number, "generated": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
            for question, answer in zip(batch, answers, strict=True)
        ]
        self._write(lines)
        return answers

    def finish(self) -> None:
        """Write `output_file`: all rows in their order, with all their columns, and their answers."""
        output = Path(self.options.output_file)
        write_rows(output, self._answered_rows, [*self.columns, *self.new_columns])
        self.part.close()
        self.part.path.unlink()

    def count(self, values: list[dict[str, Any]]) -> None:
        """Count the values of one line of the file of answers: those of one batch."""
        for value in values:
            self.done.add(value["row"])
            if "problem" in value:
                self.problems[value["reason"]] += 1
            else:
                self.answered, self.tokens = self.answered + 1, self.tokens + value["tokens"]
                self.stopped += value["stopped"]

    def _write(self, values: list[dict[str, Any]]) -> None:
        self.part.append(values)
        self.count(values)

    def _places(self) -> Iterator[InputRow]:
        sources = map(as_source, self.options.input_files)
        rows = ((source, row) for source in sources for row in read_source(source))
        return (InputRow(number, *place) for number, place in enumerate(rows))

    def _question(self, place: InputRow) -> PromptRow:
        """Return the tokens of a row's prompt.

        Raises:
            DataError: the row is bad, or its prompt leaves no room for an answer.
        """
        template = self.dialogue.template
        parsed = parse_prompt(place.row.fields, *_format(place.source, self.options), template.reads)
        if isinstance(parsed, TokenizedRow):
            ids = parsed.input_ids
            if max(ids) >= self.vocabulary:
                problem = f"input_ids: found {max(ids)}, but the model has rows for {self.vocabulary:,} tokens"
                raise DataError(problem, UNKNOWN_TOKENS)
        else:
            ids = template.prompt_ids(parsed.messages, parsed.tools, parsed.variables or None)
        if self.limit is not None and len(ids) >= self.limit:
            reason = "max_length" if self.limit == self.options.max_length else "positions of the model"
            problem = f"the prompt has {len(ids):,} tokens, and with an answer at most {self.limit:,} are allowed"
            raise DataError(f"{problem} ({reason})", TOO_LONG)
        return PromptRow(place.number, ids)

    def _answered_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the output; the answers stand nearly in the order of the rows."""
        values, waiting = itertools.chain.from_iterable(self.part.values()), dict[int, dict[str, Any]]()
        for place in self._places():
            while place.number not in waiting:
                value = next(values, None)
                if value is None:
                    raise DataError(
                        f"input_files: {_where(place)} has come in meanwhile; begin anew with unchanged files."
                    )
                waiting[value["row"]] = value
            value = waiting.pop(place.number)
            new = (value.get("generated"), value.get("stopped"), value.get("problem"))
            yield place.row.fields | dict(zip(self.new_columns, new, strict=False))


def _where(place: InputRow) -> str:
    return f"{place.row.file}, row {place.row.number}"
