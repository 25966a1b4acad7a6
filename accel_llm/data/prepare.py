"""Encode all sources into rows and a ledger. One process does this once; after that the rows come from the cache."""

import itertools
import multiprocessing
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.template import Template
from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.config.text_options import with_text_column
from accel_llm.data.answers import as_units, count_labels
from accel_llm.data.corpus import check_corpora, map_corpora
from accel_llm.data.encode import A_CHAT, Chunk, Encoder, SourceRow
from accel_llm.data.encode_labelled import LABELLED_CUTS
from accel_llm.data.encoders import encode_rows, goes_to_evaluation, make_encoder, with_labels
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.labels import LabelKind, Labels, describe_targets
from accel_llm.data.ledger import Ledger
from accel_llm.data.limits import check_left_out, check_lost_share, check_lost_turns, describe_losses
from accel_llm.data.notes import note_common_rows, note_cuts, note_lost_evaluation_rows, note_shares
from accel_llm.data.pairs import PreferenceKind
from accel_llm.data.row_counts import expected_rows
from accel_llm.data.rows import Rows, RowWriter, cache_folder, cached_rows, load_rows
from accel_llm.data.source_notes import source_notes
from accel_llm.data.sources import as_source, read_source, source_identity
from accel_llm.errors import ConfigError, DataError
from accel_llm.system.progress import Bar

CACHE_VERSION = 10  # raise it with every change of the encoding, so that no old cache is used
ROWS_PER_CHUNK = 256  # rows that are encoded together, and sent to a worker together
HELD_OUT = "held out"  # the bin of rows that `eval_share` takes for evaluation
# The options that change the encoding, beside the rows themselves, the tokenizer and the template.
CACHE_OPTIONS = ("max_length", "overlong", "train_on", "train_on_eos", "split_turns", "limit_rows", "eval_share")
CACHE_OPTIONS += ("on_bad_row", "data_format", "columns", "allow_special_in_text", "open_thought", "virtual_tokens")
NO_TURN_END_NOTE = (
    "The template does not close turns, so no end token is trained, and the model does not learn to stop."
)
DATE_NOTE = "The template writes the date: rows keep the date of the day on which they were encoded."


@dataclass(frozen=True)
class EncodedData:
    """Rows to train and to evaluate on, and the ledger of the training sources."""

    train: Rows
    eval: Rows | None  # None without evaluation sources and `eval_share`
    ledger: Ledger
    fingerprint: str  # name of the cache entry
    labels: Labels | None = None  # of texts with labels

    @property
    def token_ids(self) -> list[np.ndarray]:
        """The token ids of all rows, int32 [tokens]: an array to train on and, if there is one, to evaluate on."""
        return [part.input_ids for part in (self.train, self.eval) if part is not None]


def encode_conversations(
    options: DataOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | None,
    no_template: tuple[str, str] = A_CHAT,
    preferences: PreferenceKind | None = None,
) -> EncodedData:
    """Encode chats with `template`; the sources may also hold plain text and token ids. See `encode_sources`.

    `template` may be None for sources without chats; `no_template` is message and reason for a chat among them.
    With `preferences` the rows are pairs of answers, or answers with a label.
    """
    encoded = encode_sources(options, seed, tokenizer, template, no_template, preferences)
    if template and template.turn_end is None:
        encoded.ledger.note(NO_TURN_END_NOTE)
    if template and "strftime_now" in template.source:
        encoded.ledger.note(DATE_NOTE)
    return encoded


def encode_texts(options: DataOptions, seed: int, tokenizer: PreTrainedTokenizerFast, column: str) -> EncodedData:
    """Encode the plain text in `column`. See `encode_sources`."""
    if corpora := map_corpora(options.train_files, options):
        return _mapped_data(*corpora, options, seed, tokenizer, column)
    columns = with_text_column(options.columns, column)
    update = {"columns": columns, "data_format": options.data_format or "text"}
    return encode_sources(options.model_copy(update=update), seed, tokenizer, None)


def _mapped_data(
    rows: Rows,
    ledger: Ledger,
    fingerprints: list[str],
    options: DataOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    column: str,
) -> EncodedData:
    """Return prepared corpora to train on, as they are, with the evaluation sources of the options."""
    sources = [as_source(place) for place in options.train_files]
    check_corpora(sources, tokenizer)
    evaluation = None
    if options.eval_files:
        update = {"train_files": options.eval_files, "eval_files": []}
        encoded = encode_texts(options.model_copy(update=update), seed, tokenizer, column)
        origins = tuple(origin._replace(source=-1 - origin.source) for origin in encoded.train.origins)
        evaluation = replace(encoded.train, origins=origins)
        fingerprints = [*fingerprints, "evaluation", encoded.fingerprint]
        note_lost_evaluation_rows(ledger, encoded.ledger)
        note_common_rows(ledger, rows, evaluation)
    note_shares(ledger, rows, sources, options, seed)
    fingerprint = fingerprints[0] if len(fingerprints) == 1 else data_fingerprint(fingerprints)
    return EncodedData(rows, evaluation, ledger, fingerprint)


def encode_labelled(
    options: DataOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    problem_type: str | None = None,
    names: tuple[str, ...] | None = None,
) -> EncodedData:
    """Encode texts, or pairs of texts, with labels; the data has `labels`. See `encode_sources`.

    `problem_type` is one of `labels.PROBLEM_TYPES`, or None: found by the labels of all training rows. `names` are
    those of a trained model, in the order of its class numbers, which the data must fit.

    Raises:
        DataError: all training rows have the same label, or the labels are of no problem type.
    """
    return encode_sources(options, seed, tokenizer, None, labelled=LabelKind(problem_type, names))


def encode_sources(
    options: DataOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | None,
    no_template: tuple[str, str] = A_CHAT,
    preferences: PreferenceKind | None = None,
    labelled: LabelKind | None = None,
) -> EncodedData:
    """Encode the training and evaluation sources, or load them from the cache.

    Raises:
        DataError: a source or row cannot be used, or no row is left to train or to evaluate on.
        ConfigError: more than `max_lost` of the rows, supervised tokens or turns would be lost, `columns` names an
            unknown field, or an option has no meaning for `preferences` or for texts with labels.
    """
    encoder, train, evaluation = make_encoder(options, tokenizer, template, no_template, preferences, labelled)
    check_corpora([*train, *evaluation], tokenizer)
    key = _cache_key(encoder, seed, train, evaluation)
    parts, facts = cached_rows(cache_folder(options) / key, partial(_encode_into, encoder, seed, train, evaluation))
    names_of_labels = Labels(facts["labels"][0], tuple(facts["labels"][1])) if labelled else None
    if names_of_labels:
        parts = {name: replace(part, problem_type=names_of_labels.problem_type) for name, part in parts.items()}

    # Check that enough is left.
    ledger = Ledger.from_dict(facts["ledger"])
    ledger.balance()
    for note in itertools.chain.from_iterable(map(source_notes, (*train, *evaluation))):
        ledger.note(note)
    note_cuts(ledger, options, encoder.labelled is not None)
    _check_losses(encoder, ledger, facts)
    if not len(parts["train"]):
        labels = ", ".join(source.label for source in train)
        raise DataError(f"train_files: no row is left to train on ({labels}): {describe_losses(ledger)}.")
    if "eval" in parts and not len(parts["eval"]):
        labels = ", ".join(source.label for source in evaluation)
        share = f"eval_share: {options.eval_share} (the chance of each row to be held out)"
        option = share if options.eval_share else f"eval_files: {labels}"
        raise DataError(f"{option} leaves no row to evaluate on; give more rows, or leave the option out.")
    if (answer_labels := parts["train"].label) is not None:
        ledger.note(count_labels(answer_labels))
    if names_of_labels and (targets := parts["train"].targets) is not None:
        ledger.note(describe_targets(targets, names_of_labels, options.limit_rows))
    note_shares(ledger, as_units(parts["train"]), train, options, seed)
    return EncodedData(parts["train"], parts.get("eval"), ledger, key, names_of_labels)


def _check_losses(encoder: Encoder, ledger: Ledger, facts: dict[str, Any]) -> None:
    """Check that no more than `max_lost` is lost; of texts with labels also of those to evaluate on, for each counts.

    Raises:
        ConfigError: more is lost.
    """
    options, lengths = encoder.options, facts["lengths"]
    cuts = LABELLED_CUTS if encoder.labelled else "" if encoder.preferences else "truncate or split"
    check_left_out(ledger, options)
    check_lost_share(ledger, lengths, options, cuts)
    if facts.get("evaluation"):
        check_lost_share(Ledger.from_dict(facts["evaluation"]), lengths, options, cuts, " to evaluate on")
    check_lost_turns(ledger, facts["turns"], options)


def _cache_key(encoder: Encoder, seed: int, train: list[Source], evaluation: list[Source]) -> str:
    """Return a name made from everything that changes the encoding. The weights of sources do not change it."""
    options, tokenizer, template = encoder.options, encoder.tokenizer, encoder.template
    places = [
        [(source.model_copy(update={"weight": None}), source_identity(source)) for source in sources]
        for sources in (train, evaluation)
    ]
    # The backend does not say which tokens are bos and eos, so the special tokens are added.
    backend: Any = tokenizer.backend_tokenizer
    backend_digest = template.tokenizer_digest if template else backend.to_str()
    tokenization = (backend_digest, sorted(tokenizer.special_tokens_map.items()))
    chat = template and (template.source, template.source_for_tools, sorted(options.chat_template_kwargs.items()))
    versions = CACHE_VERSION, transformers.__version__, tokenizers.__version__
    split_seed = seed if options.eval_share else None
    values = [getattr(options, name) for name in CACHE_OPTIONS]
    kinds = encoder.preferences, encoder.labelled
    call = (tokenizer.truncation_side, tokenizer.model_input_names) if encoder.labelled else None
    return data_fingerprint(versions, tokenization, chat, places, split_seed, values, kinds, call)


class _OriginNumbers(dict[tuple[int, str], int]):
    """Numbers from 0 for each (source, file), in the order in which they are first looked up."""

    def __missing__(self, origin: tuple[int, str]) -> int:
        self[origin] = len(self)
        return self[origin]


def _encode_into(
    encoder: Encoder, seed: int, train: list[Source], evaluation: list[Source], folder: Path
) -> dict[str, Any]:
    """Encode all sources into `folder`, and return facts for JSON. Only a few chunks are in memory at a time."""
    options, origins = encoder.options, _OriginNumbers()
    encoder = with_labels(encoder, train, evaluation)
    ledgers = {"train": Ledger()} | ({"eval": Ledger()} if evaluation or options.eval_share else {})
    lengths: Counter[int] = Counter()
    turns = 0

    # Write the chunks as they come.
    with ExitStack() as stack:
        bar = stack.enter_context(Bar("encode rows", _rows_to_read(options, train, evaluation)))
        done = 0
        writers = {name: stack.enter_context(RowWriter(folder / name)) for name in ledgers}
        tasks = _chunk_rows(encoder, seed, train, evaluation, origins, ledgers["train"])
        for name, chunk in _encode_chunks(tasks, encoder):
            writers[name].add(chunk.part)
            done += sum(amount["rows"] for amount in chunk.ledger.inputs.values())
            bar.update(done)
            ledgers[name].merge(chunk.ledger)
            if name == "train":
                lengths.update(chunk.lengths)
                turns += chunk.turns

    # Note what a reader of the ledger should know.
    ledger = ledgers["train"]
    if options.limit_rows:
        ledger.note(f"limit_rows: at most the first {options.limit_rows:,} rows were read.")
    for note in (note for reader in (encoder.task.readers if encoder.task else ()) for note in reader.notes()):
        ledger.note(note)
    if "eval" in ledgers:
        note_lost_evaluation_rows(ledger, ledgers["eval"])
        note_common_rows(ledger, *(as_units(load_rows(folder / name, origins)) for name in ledgers))

    # Percentiles of the lengths, for the message of `check_lost_share`.
    percents = (50, 95, 99, 100)
    all_lengths = np.repeat(list(lengths.keys()) or [0], list(lengths.values()) or [1])
    percentiles = dict(zip(map(str, percents), np.percentile(all_lengths, percents).astype(int).tolist(), strict=True))
    labels = encoder.task and encoder.task.vocabulary.labels
    facts = {"ledger": ledger.to_dict(), "lengths": percentiles, "turns": turns, "labels": labels}
    facts["evaluation"] = ledgers["eval"].to_dict() if encoder.labelled and "eval" in ledgers else None
    return facts | {"origins": list(origins)}


def _rows_to_read(options: DataOptions, train: list[Source], evaluation: list[Source]) -> int | None:
    rows, to_evaluate_on = expected_rows(train), expected_rows(evaluation)
    if rows is None or to_evaluate_on is None:
        return None
    return min(rows, options.limit_rows or rows) + to_evaluate_on


def _chunk_rows(
    encoder: Encoder, seed: int, train: list[Source], evaluation: list[Source], origins: _OriginNumbers, ledger: Ledger
) -> Iterator[tuple[str, list[SourceRow]]]:
    """Yield (part, rows): the rows to encode, up to ROWS_PER_CHUNK at a time, for the part "train" or "eval"."""
    options = encoder.options
    waiting: dict[str, list[SourceRow]] = {"train": [], "eval": []}

    def read_sources(sources: list[Source], first: int) -> Iterator[SourceRow]:
        is_evaluation = first > 0
        for number, source in enumerate(sources, first):
            # In the origin of a row the evaluation sources are numbered -1, -2 and so on.
            origin_number = len(train) - 1 - number if is_evaluation else number
            for row in encoder.task.readers[number].read() if encoder.task else read_source(source):
                yield SourceRow(number, origins[origin_number, row.file], row)

    rows = itertools.islice(read_sources(train, 0), options.limit_rows)
    for row in itertools.chain(rows, read_sources(evaluation, len(train)) if evaluation else ()):
        name = "train" if row.source < len(train) else "eval"

        # Hold out a share of the training rows.
        if name == "train" and goes_to_evaluation(row.row, options, seed):
            name = "eval"
            ledger.read(encoder.labels[row.source])
            ledger.count(encoder.labels[row.source], HELD_OUT)

        waiting[name].append(row)
        if len(waiting[name]) == ROWS_PER_CHUNK:
            yield name, waiting[name]
            waiting[name] = []
    yield from ((name, chunk_rows) for name, chunk_rows in waiting.items() if chunk_rows)


def _encode_chunks(tasks: Iterator[tuple[str, list[SourceRow]]], encoder: Encoder) -> Iterator[tuple[str, Chunk]]:
    """Encode `tasks` in this process or in `preprocessing_num_workers` workers; the order stays the same."""
    workers = encoder.options.preprocessing_num_workers or 1

    # With one worker or one task the rows are encoded here, because starting workers takes longer.
    first = list(itertools.islice(tasks, workers))
    tasks = itertools.chain(first, tasks)
    if len(first) <= 1:
        yield from ((name, encode_rows(rows, encoder)) for name, rows in tasks)
        return

    # Not fork: this process already has threads of torch and of a process group.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_worker_encoder, (encoder,)) as pool, _explain_broken_pool():
        # Only a few tasks are submitted ahead, so that a million rows do not wait in memory.
        running: deque[tuple[str, Future[Chunk]]] = deque()
        for name, rows in tasks:
            running.append((name, pool.submit(_encode_in_worker, rows)))
            if len(running) > 2 * workers:
                name, chunk = running.popleft()
                yield name, chunk.result()
        yield from ((name, chunk.result()) for name, chunk in running)


@contextmanager
def _explain_broken_pool() -> Iterator[None]:
    """Turn the death of a worker into a ConfigError with a remedy."""
    try:
        yield
    except BrokenProcessPool:
        raise ConfigError(
            "preprocessing_num_workers: a worker was killed, because memory ran out (give fewer workers) or the chat "
            "template did not come to an end (the traceback above then shows `<template>`)."
        ) from None


def _set_worker_encoder(encoder: Encoder) -> None:
    """Keep the encoder in this worker: unpickling a tokenizer takes longer than encoding a chunk."""
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(rows: list[SourceRow]) -> Chunk:
    return encode_rows(rows, _worker_encoder)
