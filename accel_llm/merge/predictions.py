"""Answers to all rows of some files, in a file that grows batch by batch and is complete at the end.

What an answer is says an `Answerer`: a text of a language model, or the scores of a classifier. Beside `output_file` grows a file of the same name with .part, which holds the answers, each with the number of its row.
A job that ends early goes on from there. At the end the rows are read once more, and written with their answers.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel_llm.config.tool_options import PredictOptions
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.sources import as_source, source_identity
from accel_llm.data.writers import WRITERS, write_rows
from accel_llm.errors import ConfigError, DataError
from accel_llm.merge.dialogues import identify_model
from accel_llm.merge.input_rows import InputRow, RowNumbers
from accel_llm.merge.prompt_predictions import PromptAnswers
from accel_llm.merge.text_predictions import TextAnswers
from accel_llm.system.folders import hidden_sibling, write_problem
from accel_llm.system.part_file import PartFile
from accel_llm.system.run_lock import locked

ROWS_AHEAD = 512  # rows that are read and sorted by length together
_CONTENTS = ("model", "input_files", "chat_template")  # of these only hashes are compared

Answerer = PromptAnswers | TextAnswers


def check_files(options: PredictOptions) -> str:
    """Check what can be checked before a model is loaded, and return a hash of the content of the input.

    Raises:
        ConfigError: `output_file` cannot be written.
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
    try:
        return data_fingerprint([(source.model_dump(), source_identity(source)) for source in sources])
    except DataError as error:
        raise DataError(f"input_files: {error}", error.reason) from None


@contextmanager
def open_predictions(options: PredictOptions, answerer: Answerer, input_hash: str) -> Iterator["Predictions"]:
    """Begin to answer the input, or go on where an earlier process ended; `input_hash` is that of `check_files`.

    Raises:
        ConfigError: another process writes `output_file`, or what was begun there had another model, input or settings.
    """
    output = Path(options.output_file)
    with locked(hidden_sibling(output.absolute(), "lock"), output, "output_file"):
        part = PartFile(output.with_name(f"{output.name}.part"))
        predictions = Predictions(options, answerer, part)
        _begin(part, {"model": identify_model(options), "input_files": input_hash} | answerer.settings(), options)
        try:
            for value in part.values():
                predictions.count(value)
            yield predictions
        finally:
            part.close()
            if predictions.done.is_empty():  # so that another setting can be tried at once
                part.path.unlink(missing_ok=True)


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
        shown = [
            f"{name} was {earlier.get(name)!r}, now {settings[name]!r}" for name in changed if name not in _CONTENTS
        ]
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

    def __init__(self, options: PredictOptions, answerer: Answerer, part: PartFile):
        self.options, self.answerer, self.part = options, answerer, part
        self.new_columns = [f"{options.column_prefix}{name}" for name in answerer.names]
        if options.on_bad_row == "drop":
            self.new_columns.append(f"{options.column_prefix}problem")
        # What is known of the input after `survey`, and of the answers so far.
        self.total, self.columns = 0, dict.fromkeys(())
        self.done, self.answered = RowNumbers(), 0
        self.problems: Counter[str] = Counter()  # reason -> rows without an answer
        self.examples: list[str] = []

    def survey(self) -> None:
        """Read all rows once: nothing is generated if one cannot be answered, or has a column of the new names.

        Raises:
            ConfigError: a row has such a column.
            DataError: a row is bad and `on_bad_row` is `error`, or a file cannot be read.
        """
        for window in self._windows():
            for place in window:
                self.total += 1
                self.columns |= dict.fromkeys(place.row.fields)
                if taken := next((name for name in self.new_columns if name in place.row.fields), None):
                    raise ConfigError(
                        f"column_prefix: {self.options.column_prefix!r} makes a new column {taken!r}, but {place.where} "
                        "has one; give another, such as new_."
                    )
            left = self._left(window)
            for place, question in zip(left, self.answerer.encode(left), strict=True):
                if isinstance(question, DataError):
                    self._note_problem(f"{place.where}: {question}", question.reason)

    def _note_problem(self, sentence: str, reason: str) -> None:
        if self.options.on_bad_row == "error":
            raise DataError(f"{sentence}; on_bad_row: drop keeps such rows, without an answer.", reason)
        if len(self.examples) < 3:
            self.examples.append(sentence)

    def batches_left(self) -> Iterator[list[Any]]:
        """Yield batches of the questions that have no answer yet, of similar length.

        Which rows share a batch depends on the rows that have no answer alone, so a job that was killed goes on with
        the batches that it would have had.
        """
        for window in self._windows():
            left, questions, problems = self._left(window), [], []
            for place, question in zip(left, self.answerer.encode(left), strict=True):
                if isinstance(question, DataError):
                    problems.append({"row": place.number, "problem": str(question), "reason": question.reason})
                else:
                    questions.append(question)
            if problems:
                self._write(problems)
            yield from self.answerer.cut(questions)

    def answer(self, batch: list[Any]) -> list[dict[str, Any]]:
        """Answer one of `batches_left`. When this returns, a kill cannot lose the answers."""
        answers = self.answerer.answer(batch)
        self._write(answers)
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
                self.answered += 1
                self.answerer.count(value)

    def _write(self, values: list[dict[str, Any]]) -> None:
        self.part.append(values)
        self.count(values)

    def _places(self) -> Iterator[InputRow]:
        sources = map(as_source, self.options.input_files)
        rows = ((source, row) for source in sources for row in self.answerer.read(source))
        return (InputRow(number, *place) for number, place in enumerate(rows))

    def _windows(self) -> Iterator[list[InputRow]]:
        places = self._places()
        while window := list(itertools.islice(places, max(ROWS_AHEAD, 8 * self.answerer.size))):
            yield window

    def _left(self, window: list[InputRow]) -> list[InputRow]:
        return [place for place in window if place.number not in self.done]

    def _answered_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the output; the answers stand nearly in the order of the rows."""
        values, waiting = itertools.chain.from_iterable(self.part.values()), dict[int, dict[str, Any]]()
        for place in self._places():
            while place.number not in waiting:
                value = next(values, None)
                if value is None:
                    raise DataError(
                        f"input_files: {place.where} has come in meanwhile; begin anew with unchanged files."
                    )
                waiting[value["row"]] = value
            value = waiting.pop(place.number)
            problem = value.get("problem")
            cells = (None,) * len(self.answerer.names) if problem else self.answerer.cells(value)
            yield place.row.fields | dict(zip(self.new_columns, (*cells, problem), strict=False))
