"""Answers of a language model to the prompts of rows, for `launch/predict.py`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accel_llm.config.fields import Source
from accel_llm.config.tool_options import PredictOptions
from accel_llm.data.columns import column_problems
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.prompts import parse_prompt
from accel_llm.data.sources import RawRow, as_source, read_source
from accel_llm.data.tokenized import TokenizedRow
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.merge.dialogues import open_dialogue
from accel_llm.merge.input_rows import TOO_LONG, UNKNOWN_TOKENS, InputRow, row_format
from accel_llm.model.answers import Dialogue
from accel_llm.model.batch_answers import PromptRow, QuestionBatches

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


def open_prompts(options: PredictOptions) -> "PromptAnswers":
    """Load the language model of the options.

    Raises:
        ConfigError: it cannot be loaded or asked, or an option does not fit it.
    """
    if "overlong" in options.model_fields_set:
        raise ConfigError(f"overlong: {options.model} is a language model, whose prompts are never cut; remove it.")
    for source in map(as_source, options.input_files):
        data_format, columns = row_format(source, options)
        raise_problems(column_problems(columns, data_format))
    return PromptAnswers(options, open_dialogue(options))


def smallest_limit(options: PredictOptions, positions: int | None, trained: int | None = None) -> int | None:
    """Return how many tokens a row may have: `max_length`, or else what the model was trained on; None if neither is known.

    `positions` are those of the model, `trained` is the max_length of its training.

    Raises:
        ConfigError: `max_length` is more than the positions.
    """
    limits = [limit for limit in (positions, options.max_length) if limit]
    if len(limits) == 2 and limits[1] > limits[0]:
        raise ConfigError(f"max_length: {limits[1]:,}, but the model has {limits[0]:,} positions; give no more.")
    if trained and not options.max_length and positions:
        limits.append(trained)
    return min(limits, default=None)


class PromptAnswers:
    """What `merge/predictions.py` needs to know of answers to prompts; `text_predictions.py` has the same for scores."""

    names = ("generated", "stopped")
    unit = "tokens"

    def __init__(self, options: PredictOptions, dialogue: Dialogue):
        self.options, self.dialogue, self.model = options, dialogue, dialogue.model
        self.limit, self.size = smallest_limit(options, dialogue.limit), options.per_device_eval_batch_size
        self.questions = QuestionBatches(dialogue, self.limit, self.size, options.seed)
        self.vocabulary = dialogue.model.get_input_embeddings().weight.shape[0]
        self.answered, self.tokens, self.stopped = 0, 0, 0

    def settings(self) -> dict[str, Any]:
        """Return what decides on the answers, beside the model and the rows."""
        names = [name for name in DECIDING if name != "seed" or self.options.temperature]
        return {name: getattr(self.options, name) for name in names} | {
            "chat_template": template_identity(self.options)
        }

    def remarks(self) -> list[str]:
        """Return a sentence on what makes batches smaller."""
        if self.questions.may_pad:
            return []
        return ["Only prompts of the same length are answered together: padding would change answers of this model."]

    def read(self, source: Source) -> Iterator[RawRow]:
        """Return an iterator over the rows of a source."""
        return read_source(source)

    def encode(self, places: list[InputRow]) -> list[PromptRow | DataError]:
        """Return the tokens of each row's prompt, or what is wrong with it."""
        return [self._encode_one(place) for place in places]

    def _encode_one(self, place: InputRow) -> PromptRow | DataError:
        try:
            return self._question(place)
        except DataError as error:
            return error

    def _question(self, place: InputRow) -> PromptRow:
        """Return the tokens of a row's prompt.

        Raises:
            DataError: the row is bad, or its prompt leaves no room for an answer.
        """
        template = self.dialogue.template
        parsed = parse_prompt(place.row.fields, *row_format(place.source, self.options), template.reads)
        if isinstance(parsed, TokenizedRow):
            ids = parsed.input_ids
            check_known(ids, self.vocabulary)
        else:
            ids = template.prompt_ids(parsed.messages, parsed.tools, parsed.variables or None)
        if self.limit is not None and len(ids) >= self.limit:
            reason = name_limit(self.limit, self.options, self.dialogue.limit)
            problem = f"the prompt has {len(ids):,} tokens, and with an answer at most {self.limit:,} are allowed"
            raise DataError(f"{problem} ({reason})", TOO_LONG)
        return PromptRow(place.number, ids)

    def cut(self, questions: list[PromptRow]) -> list[list[PromptRow]]:
        """Return batches of the questions, the longest first."""
        return self.questions.cut(questions)

    def answer(self, batch: list[PromptRow]) -> list[dict[str, Any]]:
        """Answer one batch: a value for each row, which JSON can hold."""
        answers = self.questions.answer(batch)
        return [
            {"row": question.number, "generated": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
            for question, answer in zip(batch, answers, strict=True)
        ]

    def work(self, value: dict[str, Any]) -> int:
        """Return how many of `unit` an answer took."""
        return value["tokens"]

    def cells(self, value: dict[str, Any]) -> tuple[Any, ...]:
        """Return the cells of the new columns for one answer."""
        return value["generated"], value["stopped"]

    def count(self, value: dict[str, Any]) -> None:
        """Count an answer for `summary`."""
        self.answered, self.tokens = self.answered + 1, self.tokens + value["tokens"]
        self.stopped += value["stopped"]

    def summary(self, total: int) -> str:
        """Return a line on all answers to the `total` rows."""
        mean, stopped = self.tokens / max(self.answered, 1), self.stopped / max(self.answered, 1)
        counts = f"answered: {self.answered:,} of {total:,} rows"
        return f"{counts}, {mean:,.1f} tokens on average, {stopped:.1%} ended by themselves"


def name_limit(limit: int, options: PredictOptions, positions: int | None) -> str:
    """Say where a limit of `smallest_limit` comes from."""
    if limit == options.max_length:
        return "max_length"
    return "positions of the model" if limit == positions else "max_length of its training"


def template_identity(options: PredictOptions) -> str | None:
    """Return the name of the chat template that the options give; of a file, the hash of its content."""
    template = options.chat_template
    return data_fingerprint(Path(template)) if template and Path(template).is_file() else template


def check_known(ids: list[int], vocabulary: int) -> None:
    """Check that the model has a row for each token.

    Raises:
        DataError: it has not.
    """
    if max(ids) >= vocabulary:
        problem = f"input_ids: found {max(ids)}, but the model has rows for {vocabulary:,} tokens"
        raise DataError(problem, UNKNOWN_TOKENS)
