"""Steps of launch/show_data.py, which encodes data and trains nothing: options, tokenizer, rows, what training refuses."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.defaults import fill_method_options
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.chat.template import Template, configured_template
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.fields import Source
from accel_llm.config.options import SftOptions, TrainOptions
from accel_llm.config.tool_options import ShowOptions
from accel_llm.data.encode import A_CHAT, Encoder, SourceRow
from accel_llm.data.encoders import make_encoder, with_labels
from accel_llm.data.labels import LabelKind
from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.data.pairs import PreferenceKind
from accel_llm.data.prepare import EncodedData, encode_conversations, encode_sources
from accel_llm.data.samples import (
    Sample,
    encode_sample,
    first_rows,
    named_rows,
    random_rows,
    read_training_rows,
    row_name,
    untrained_rows,
)
from accel_llm.data.sources import as_source, source_problems
from accel_llm.demo.files import TrainOptionsT, parse_options_or_demo
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.model.loading import load_model_config
from accel_llm.model.model_names import model_problems, tokenizer_problems
from accel_llm.model.positions import position_limit
from accel_llm.model.tokenizer import configured_tokenizer
from accel_llm.model.vocabulary import add_missing_tokens
from accel_llm.training.setup import preference_kind


def read_data_options(options_class: type[TrainOptionsT], demo: str) -> TrainOptionsT:
    """Read and check the options of a script that encodes data but trains nothing.

    Such a script reads only the tokenizer of a model, so with `tokenizer_name` no model is needed.

    Raises:
        ConfigError: an option, the model or a source of rows cannot be used. It lists all problems.
    """
    options = parse_options_or_demo(options_class, demo, sys.argv[1:])
    options = fill_method_options(adopt_adapter_options(options))  # virtual tokens count in a row
    raise_problems(
        source_problems(options) + (tokenizer_problems(options) if options.tokenizer_name else model_problems(options))
    )
    quiet_libraries()
    if isinstance(options, ClassifyOptions) and not options.tokenizer_name:  # as training does
        limit, default = position_limit(load_model_config(options)), type(options).model_fields["max_length"].default
        options = options.with_defaults({"max_length": min(limit or default, default)})  # type: ignore[assignment]
    source = getattr(options, "source", None)
    return options if source is None else _with_one_source(options, source)  # type: ignore[return-value]


def _with_one_source(options: TrainOptionsT, label: str) -> TrainOptionsT:
    """Return the options with only that source of the training data.

    Raises:
        ConfigError: there is none of this name.
    """
    labels = [as_source(place).label for place in options.train_files]
    if label not in labels:
        raise ConfigError(f"source: there is no {label}; the sources in train_files are {', '.join(labels)}.")
    kept = [place for place, name in zip(options.train_files, labels, strict=True) if name == label]
    return options.model_copy(update={"train_files": kept})


@dataclass(frozen=True)
class RowReader:
    """What encodes the rows of a script's options, all of them or some."""

    options: TrainOptions
    tokenizer: PreTrainedTokenizerFast
    template: Template | None
    no_template: tuple[str, str]
    preferences: PreferenceKind | None
    labelled: LabelKind | None

    def encode(self) -> tuple[EncodedData | None, ConfigError | DataError | None]:
        """Encode all rows. Return them, and the error with which training would stop; None if it would not.

        Bad rows are left out then, however many they are. The rows are None if they cannot be encoded even so.
        """
        try:
            return self._encode(self.options), None
        except (ConfigError, DataError) as error:
            refusal = error
        changes = {"on_bad_row": "drop", "max_lost": 1.0}
        changes |= {"overlong": "drop"} if self.options.overlong == "error" else {}
        try:
            return self._encode(self.options.model_copy(update=changes)), refusal
        except (ConfigError, DataError):
            return None, refusal

    def _encode(self, options: TrainOptions) -> EncodedData:
        if self.labelled:
            return encode_sources(options, options.seed, self.tokenizer, None, labelled=self.labelled)
        words = self.tokenizer, self.template, self.no_template, self.preferences
        return encode_conversations(options, options.seed, *words)

    def choose_samples(self, show: ShowOptions, data: EncodedData | None) -> list[Sample]:
        """Return the rows to show, and after them as many more that are bad or left out, if all rows, `data`, are known.

        Raises:
            ConfigError: there is no such row.
            DataError: a source cannot be read, or the labels of texts cannot.
        """
        encoder, train = self._encoder()
        seed = self.options.seed
        rows = read_training_rows(encoder, train, seed)
        if show.row is not None:
            chosen = named_rows(rows, show.row)
            if not chosen:
                raise ConfigError(
                    f"row: there is no row {show.row}; give its number in its file, from 1, or its file too, as in "
                    '"chats.jsonl, row 7".'
                )
        else:
            chosen = random_rows(rows, show.rows, seed) if show.random else first_rows(rows, show.rows)
            names = {row_name(row.row) for row in chosen}
            others = self._left_out(encoder, train, data) if data else iter(())
            chosen += itertools.islice((row for row in others if row_name(row.row) not in names), show.rows)
        return [encode_sample(row, encoder) for row in chosen]

    def left_out_samples(self, data: EncodedData) -> Iterator[Sample]:
        """Return an iterator over all rows that are bad or left out."""
        encoder, train = self._encoder()
        return (encode_sample(row, encoder) for row in self._left_out(encoder, train, data))

    def _left_out(self, encoder: Encoder, train: list[Source], data: EncodedData) -> Iterator[SourceRow]:
        if not any(
            is_lost(name) and amount["rows"] for bins in data.ledger.bins.values() for name, amount in bins.items()
        ):
            return iter(())
        return untrained_rows(read_training_rows(encoder, train, self.options.seed), data.train)

    def _encoder(self) -> tuple[Encoder, list[Source]]:
        """Return what encodes a row, and the training sources. Raises as `make_encoder` and `with_labels` do."""
        kinds = self.no_template, self.preferences, self.labelled
        encoder, train, evaluation = make_encoder(self.options, self.tokenizer, self.template, *kinds)
        return with_labels(encoder, train, evaluation), train

    def raise_refusal(
        self, refusal: ConfigError | DataError | None, data: EncodedData | None, samples: list[Sample]
    ) -> None:
        """Raise the error with which training would stop, and say so; of one row alone, if it is bad.

        Raises:
            ConfigError, DataError: training would stop.
        """
        if refusal is None and self.options.on_bad_row == "error":
            bad = [sample for sample in samples if sample.problems]
            refusal = (
                DataError(f"{bad[0].name}: {bad[0].problems[0]}; on_bad_row: drop leaves such rows out.")
                if bad
                else None
            )
        if refusal is None:
            return
        if data is None and not samples:  # nothing was shown
            raise refusal
        if isinstance(refusal, ConfigError):
            raise ConfigError(*(f"training would stop: {problem}" for problem in refusal.problems))
        count = _count_bad(data.ledger) if data else None
        which = f", because {count[0]:,} of {count[1]:,} rows are bad" if count else ""
        raise DataError(f"training would stop{which}: {refusal}", refusal.reason)


def _count_bad(ledger: Ledger) -> tuple[int, int] | None:
    """Return how many rows are bad, and how many there are; None if there is no bad one."""
    bad = sum(
        bins[f"dropped: {reason}"]["rows"]
        for bins in ledger.bins.values()
        for reason in ledger.examples
        if f"dropped: {reason}" in bins
    )
    return (bad, sum(amount["rows"] for amount in ledger.inputs.values())) if bad else None


def open_reader(options: TrainOptions) -> RowReader:
    """Return what encodes the rows as the script of these options reads them.

    Raises:
        ConfigError: the tokenizer or its template cannot be loaded, or they do not fit each other.
    """
    if isinstance(options, ClassifyOptions):
        return RowReader(options, configured_tokenizer(options), None, A_CHAT, None, LabelKind(options.problem_type))
    assert isinstance(options, SftOptions)
    return RowReader(options, *_tokenizer_and_template(options), preference_kind(options), None)


def _tokenizer_and_template(
    options: SftOptions,
) -> tuple[PreTrainedTokenizerFast, Template | None, tuple[str, str]]:
    """Load the tokenizer and, if there is one, the chat template, for rows that may all be plain text.

    The third value is for `Encoder.no_template`: the message and reason of the error that a conversation is without it.

    Raises:
        ConfigError: one of them cannot be loaded, or they do not fit each other.
    """
    tokenizer = configured_tokenizer(options)
    try:
        add_missing_tokens(tokenizer, options)
        return tokenizer, configured_template(tokenizer, options), ("", "")
    except ConfigError as error:
        if options.chat_template or tokenizer.chat_template:
            raise
        return tokenizer, None, (str(error).rstrip("."), "no chat template")
