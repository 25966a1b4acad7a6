"""Sources -> encoded rows, with the ledger of what became of each; done once by one process, then read from the cache."""

import itertools
import multiprocessing
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.template import Template
from accel_llm.config.fields import DataFormat, Source
from accel_llm.config.options import DataOptions
from accel_llm.data.encode import NOTHING_TRAINED, Chunk, Encoder, SourceRow, encode_chunk
from accel_llm.data.formats import column_problems
from accel_llm.data.ledger import TRAINED, Ledger
from accel_llm.data.order import mix_sources
from accel_llm.data.rows import Rows, RowWriter, cache_folder, cached_rows, load_rows
from accel_llm.data.sources import as_source, data_fingerprint, read_source, source_identity
from accel_llm.errors import ConfigError, DataError

CACHE_VERSION = 3  # of the encoding: a change of what a row becomes must not meet an old cache
ROWS_AT_A_TIME = 256  # rows encoded, and sent to a worker, at once
HELD_OUT = "held out"
# What shapes an encoding, beside the rows themselves, the tokenizer and the template.
CACHE_OPTIONS = (
    "max_length",
    "overlong",
    "train_on",
    "train_on_eos",
    "split_turns",
    "limit_rows",
    "eval_share",
    "on_bad_row",
)
CACHE_OPTIONS += ("data_format", "columns", "allow_special_in_text")
NO_END_NOTE = "The template closes no turn, so no end token is trained and answers will not stop by it."
DATED_NOTE = "The template writes the date: rows keep that of the day on which they were encoded."


@dataclass(frozen=True)
class EncodedData:
    """What `encode` returns: rows to train and to evaluate on (None without any), the ledger of the training sources."""

    train: Rows
    eval: Rows | None
    ledger: Ledger
    fingerprint: str

    @property
    def token_ids(self) -> list[np.ndarray]:
        """The ids of all rows, flat: one array to train on, one to evaluate on."""
        return [part.input_ids for part in (self.train, self.eval) if part is not None]


def encode_conversations(
    options: DataOptions, seed: int, tokenizer: PreTrainedTokenizerFast, template: Template
) -> EncodedData:
    """Encode chats (and whatever else the sources hold) with `template`; see `encode`."""
    encoded = encode_sources(options, seed, tokenizer, template)
    if template.turn_end is None:
        encoded.ledger.note(NO_END_NOTE)
    if "strftime_now" in template.source:
        encoded.ledger.note(DATED_NOTE)
    return encoded


def encode_texts(options: DataOptions, seed: int, tokenizer: PreTrainedTokenizerFast, column: str) -> EncodedData:
    """Encode plain text that stands in `column`; see `encode`."""
    columns = options.columns if column == "text" else {**options.columns, "text": column}
    update = {"columns": columns, "data_format": options.data_format or "text"}
    return encode_sources(options.model_copy(update=update), seed, tokenizer, None)


def encode_sources(
    options: DataOptions, seed: int, tokenizer: PreTrainedTokenizerFast, template: Template | None
) -> EncodedData:
    """Encode the training and evaluation sources, or take them from the cache.

    Raises:
        DataError: a source or row that cannot be used, or nothing left to train or evaluate on.
        ConfigError: more than `max_lost` of the rows or of their supervised tokens would be lost, or columns that no
            shape has.
    """
    train, evaluated = ([as_source(place) for place in places] for places in (options.train_files, options.eval_files))
    formats: list[tuple[DataFormat | None, dict[str, str]]] = [
        (source.data_format or options.data_format, {**options.columns, **source.columns})
        for source in (*train, *evaluated)
    ]
    if wrong := [problem for data_format, columns in formats for problem in column_problems(columns, data_format)]:
        raise ConfigError(*dict.fromkeys(wrong))
    encoder = Encoder(options, tokenizer, template, [source.label for source in (*train, *evaluated)], formats)
    key = _key(options, seed, tokenizer, template, train, evaluated)
    parts, facts = cached_rows(cache_folder(options) / key, partial(_build, encoder, seed, train, evaluated))
    ledger = Ledger.from_dict(facts["ledger"])
    ledger.balance()
    check_lost(ledger, facts["lengths"], options)
    check_turns(ledger, facts["turns"], options)
    if not len(parts["train"]):
        raise DataError(f"train_files: no row is left to train on ({', '.join(source.label for source in train)}).")
    if "eval" in parts and not len(parts["eval"]):
        named = ", ".join(source.label for source in evaluated)
        asked = f"eval_share: {options.eval_share}" if options.eval_share else f"eval_files: {named}"
        raise DataError(f"{asked} leaves no row to evaluate on; give more rows, or none of the two options.")
    _note_shares(ledger, parts["train"], train, seed)
    return EncodedData(parts["train"], parts.get("eval"), ledger, key)


def _note_shares(ledger: Ledger, rows: Rows, sources: list[Source], seed: int) -> None:
    """What the weights come to, row by row and token by token."""
    weights, counts = [source.weight for source in sources], np.bincount(rows.source, minlength=len(sources))
    if None in weights:
        return
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise DataError(
                f"train_files: {source.label} has a weight of {source.weight}, but no row to train on is left."
            )
    drawn = mix_sources(rows.source, weights, seed)
    of_source, lengths = rows.source[drawn], rows.lengths[drawn]
    told = [
        f"{source.label} {(of_source == k).mean():.1%} of the rows ({(of_source == k).sum():,} drawn from {counts[k]:,}) "
        f"and {lengths[of_source == k].sum() / lengths.sum():.1%} of the tokens"
        for k, source in enumerate(sources)
    ]
    ledger.note(f"Mixed by weight: an epoch is {'; '.join(told)}.")


def _key(
    options: DataOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    template: Template | None,
    train: list[Source],
    evaluated: list[Source],
) -> str:
    """A name for all that shapes the encoding. Weights do not: they say how often a row is drawn."""
    places = [
        [(source.model_copy(update={"weight": None}), source_identity(source)) for source in sources]
        for sources in (train, evaluated)
    ]
    # Which token is the bos or eos is not in the backend.
    backend: Any = tokenizer.backend_tokenizer
    written = template.tokenizer_digest if template else backend.to_str()
    writing = (written, sorted(tokenizer.special_tokens_map.items()))
    chat = template and (template.source, sorted(options.chat_template_kwargs.items()))
    versions = CACHE_VERSION, transformers.__version__, tokenizers.__version__
    drawn = seed if options.eval_share else None
    return data_fingerprint(versions, writing, chat, places, drawn, [getattr(options, name) for name in CACHE_OPTIONS])


class _Origins(dict[tuple[int, str], int]):
    """(source, file) -> number, given when first asked for."""

    def __missing__(self, origin: tuple[int, str]) -> int:
        self[origin] = len(self)
        return self[origin]


def _build(encoder: Encoder, seed: int, train: list[Source], evaluated: list[Source], folder: Path) -> dict[str, Any]:
    """Encode everything into `folder`; at no time more than some chunks of rows are in memory."""
    options, origins = encoder.options, _Origins()
    ledgers = {"train": Ledger()} | ({"eval": Ledger()} if evaluated or options.eval_share else {})
    lengths: Counter[int] = Counter()
    turns = 0
    with ExitStack() as stack:
        writers = {name: stack.enter_context(RowWriter(folder / name)) for name in ledgers}
        tasks = _tasks(encoder, seed, train, evaluated, origins, ledgers["train"])
        for name, chunk in _encoded(tasks, encoder):
            writers[name].add(chunk.part)
            ledgers[name].merge(chunk.ledger)
            if name == "train":
                lengths.update(chunk.lengths)
                turns += chunk.turns
    ledger = ledgers["train"]
    if options.limit_rows:
        ledger.note(f"limit_rows: at most the first {options.limit_rows:,} rows were read.")
    if "eval" in ledgers:
        _note_lost(ledger, ledgers["eval"])
        _note_shared(ledger, *(load_rows(folder / name, origins) for name in ledgers))
    shares = (50, 95, 99, 100)
    every = np.repeat(list(lengths.keys()) or [0], list(lengths.values()) or [1])
    by_share = dict(zip(map(str, shares), np.percentile(every, shares).astype(int).tolist(), strict=True))
    return {"ledger": ledger.to_dict(), "lengths": by_share, "turns": turns, "origins": list(origins)}


def _tasks(
    encoder: Encoder, seed: int, train: list[Source], evaluated: list[Source], origins: _Origins, ledger: Ledger
) -> Iterator[tuple[str, list[SourceRow]]]:
    """Rows to encode, some at a time, with the name of the part that they belong to."""
    options = encoder.options
    waiting: dict[str, list[SourceRow]] = {"train": [], "eval": []}

    def numbered(sources: list[Source], first: int) -> Iterator[SourceRow]:
        for number, source in enumerate(sources, first):
            for row in read_source(source):
                # An evaluation source is no source of the run: it has no weight and no share.
                yield SourceRow(number, origins[number if not first else -1, row.file], row)

    rows = itertools.islice(numbered(train, 0), options.limit_rows)
    for row in itertools.chain(rows, numbered(evaluated, len(train)) if evaluated else ()):
        name = "train" if row.source < len(train) else "eval"
        if name == "train" and options.eval_share and _draw(seed, row) < options.eval_share:
            name = "eval"
            ledger.read(encoder.labels[row.source])
            ledger.count(encoder.labels[row.source], HELD_OUT)
        waiting[name].append(row)
        if len(waiting[name]) == ROWS_AT_A_TIME:
            yield name, waiting[name]
            waiting[name] = []
    yield from ((name, some) for name, some in waiting.items() if some)


def _note_lost(ledger: Ledger, evaluated: Ledger) -> None:
    """Rows to evaluate on are no part of the ledger of training; those that are lost are told all the same."""
    for label, bins in evaluated.bins.items():
        for name, amount in bins.items():
            if name != TRAINED:
                ledger.note(f"Evaluation, {label}: {amount['rows']:,} rows and {amount['supervised']:,} tokens {name}.")


def _note_shared(ledger: Ledger, train: Rows, evaluated: Rows) -> None:
    """Rows that are trained on flatter an evaluation: they are counted and named."""
    shared = np.flatnonzero(np.isin(evaluated.digest, train.digest))
    if len(shared):
        named = []
        for k in shared[:3].tolist():
            twin = int(np.flatnonzero(train.digest == evaluated.digest[k])[0])
            named.append(f"{evaluated.name(k)} = {train.name(twin)}")
        ledger.note(
            f"{len(shared):,} of {len(evaluated):,} rows to evaluate on are trained on as well: {'; '.join(named)}"
            + ("; ..." if len(shared) > 3 else ".")
        )


def _draw(seed: int, row: SourceRow) -> float:
    """A number in [0, 1) that depends on seed, file name and row number alone."""
    return zlib.crc32(f"{seed} {Path(row.row.file).name} {row.row.number}".encode()) / 2**32


def _encoded(tasks: Iterator[tuple[str, list[SourceRow]]], encoder: Encoder) -> Iterator[tuple[str, Chunk]]:
    """The chunks of `tasks` in their order, made here or by `preprocessing_num_workers` processes."""
    workers = encoder.options.preprocessing_num_workers or 1
    first = list(itertools.islice(tasks, workers))
    tasks = itertools.chain(first, tasks)
    if len(first) <= 1:
        yield from ((name, encode_chunk(rows, encoder)) for name, rows in tasks)
        return
    # Not fork: by now this process has threads of torch and of a process group.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _install, (encoder,)) as pool, _workers_alive():
        # A few tasks ahead and no more: a million rows must not wait in memory.
        running: deque[tuple[str, Future[Chunk]]] = deque()
        for name, rows in tasks:
            running.append((name, pool.submit(_encode_installed, rows)))
            if len(running) > 2 * workers:
                name, chunk = running.popleft()
                yield name, chunk.result()
        yield from ((name, chunk.result()) for name, chunk in running)


@contextmanager
def _workers_alive() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ConfigError(
            "preprocessing_num_workers: a worker was ended from outside, which happens when memory is short (give fewer), or "
            "it was stuck in the chat template (lines above name <template> then)."
        ) from None


def _install(encoder: Encoder) -> None:
    """Once a worker and not once a chunk: a tokenizer takes longer to unpickle than a chunk to encode."""
    global _installed
    _installed = encoder


def _encode_installed(rows: list[SourceRow]) -> Chunk:
    return encode_chunk(rows, _installed)


def check_lost(ledger: Ledger, lengths: dict[str, int], options: DataOptions) -> None:
    """Raises ConfigError when more than `max_lost` of rows or supervised tokens would be lost."""
    rows, supervised = ledger.lost_share()
    if max(rows, supervised) <= options.max_lost:
        return
    lost: dict[str, int] = {}
    for bins in ledger.bins.values():
        for name, amount in bins.items():
            if name.startswith(("dropped", "cut")):
                lost[name] = lost.get(name, 0) + amount["rows"]
    reasons = [f"{name} ({count:,} rows)" if count else name for name, count in lost.items()]
    reasons += [f"{turns:,} turns without a label because {reason}" for reason, turns in ledger.turns.items()]
    if lost.keys() == {NOTHING_TRAINED}:
        remedy = "look at train_on, chat_template and the rows themselves"
    else:
        remedy = (
            f"half of the rows have at most {lengths['50']:,} tokens, 95% {lengths['95']:,}, 99% {lengths['99']:,}, "
            f"the longest {lengths['100']:,}; raise max_length, set overlong: truncate or split"
        )
    raise ConfigError(
        f"max_lost: {rows:.1%} of the rows and {supervised:.1%} of the supervised tokens would be lost, allowed is "
        f"{options.max_lost:.1%}: {', '.join(reasons)}; {remedy}, or raise max_lost."
    )


def check_turns(ledger: Ledger, turns: int, options: DataOptions) -> None:
    """Raises ConfigError when more than `max_lost` of the assistant turns would train nothing for the template's sake."""
    lost = ledger.turns
    share = sum(lost.values()) / max(turns, 1)
    if share > options.max_lost:
        reasons = ", ".join(f"{reason} ({count:,} turns)" for reason, count in lost.items())
        raise ConfigError(
            f"max_lost: {share:.1%} of the assistant turns would train nothing, allowed is {options.max_lost:.1%}: "
            f"{reasons}; set split_turns: true or another chat_template, or raise max_lost."
        )
