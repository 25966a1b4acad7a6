"""What encodes rows, as the options say, and which rows are held out for evaluation."""

import zlib
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from accel_llm.chat.template import Template
from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import DataFormat, Source
from accel_llm.data.columns import column_problems
from accel_llm.data.corpus_shards import is_prepared_corpus
from accel_llm.data.encode import Chunk, Encoder, SourceRow, encode_chunk
from accel_llm.data.encode_answers import encode_answer_chunk, preference_problems
from accel_llm.data.encode_labelled import encode_labelled_chunk, labelled_problems
from accel_llm.data.label_task import find_task
from accel_llm.data.labels import LabelKind
from accel_llm.data.pairs import PreferenceKind
from accel_llm.data.sources import RawRow, as_source
from accel_llm.errors import raise_problems


def make_encoder(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | None,
    no_template: tuple[str, str],
    preferences: PreferenceKind | None,
    labelled: LabelKind | None,
) -> tuple[Encoder, list[Source], list[Source]]:
    """Return what encodes the rows, the training sources and the evaluation sources; see `encode_sources`.

    Raises:
        ConfigError: an option has no meaning for the rows.
    """
    # Check the options that need no data.
    train, evaluation = ([as_source(place) for place in places] for places in (options.train_files, options.eval_files))
    formats: list[tuple[DataFormat | None, dict[str, str]]] = [
        ("tokenized", {})
        if is_prepared_corpus(Path(source.path))
        else (source.data_format or options.data_format, {**options.columns, **source.columns})
        for source in (*train, *evaluation)
    ]
    problems = preference_problems(options) if preferences else []
    if labelled:
        problems += labelled_problems(options, [columns for _, columns in formats])
    for data_format, columns in formats if not labelled else ():
        problems += column_problems(columns, data_format, bool(preferences))
    raise_problems(list(dict.fromkeys(problems)))

    labels = [source.label for source in (*train, *evaluation)]
    encoder = Encoder(options, tokenizer, template, labels, formats, no_template, preferences, labelled)
    return encoder, train, evaluation


def with_labels(encoder: Encoder, train: list[Source], evaluation: list[Source]) -> Encoder:
    """Return the encoder with what the labels of all training rows mean; rows without labels need nothing.

    Raises:
        DataError: as `find_task`.
    """
    if not encoder.labelled:
        return encoder
    columns, limit = [names for _, names in encoder.formats], encoder.options.limit_rows
    return replace(encoder, task=find_task(encoder.labelled, [*train, *evaluation], columns, len(train), limit))


def encode_rows(rows: list[SourceRow], encoder: Encoder) -> Chunk:
    """Encode some rows of whatever kind; raises as `encode_chunk` does."""
    if encoder.labelled:
        return encode_labelled_chunk(rows, encoder)
    return encode_answer_chunk(rows, encoder) if encoder.preferences else encode_chunk(rows, encoder)


def goes_to_evaluation(row: RawRow, options: DataOptions, seed: int) -> bool:
    """Tell whether `eval_share` takes a training row for evaluation."""
    return options.eval_share > 0 and _uniform_number(seed, row) < options.eval_share


def _uniform_number(seed: int, row: RawRow) -> float:
    """Return a number in [0, 1) that depends only on the seed, the name of the file and the number of the row."""
    name = f"{seed} {Path(row.file).name} {row.number}"
    return zlib.crc32(name.encode(errors="surrogatepass")) / 2**32  # a file name need not be UTF-8
