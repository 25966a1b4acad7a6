"""Rows of files -> encoded rows, with the ledger of what became of each; done once, then read from the cache."""

import itertools
import multiprocessing
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from accel_llm.chat import Template
from accel_llm.data import Rows, build_rows, cache_folder, cached, fingerprint, read_rows
from accel_llm.errors import ConfigError, DataError
from accel_llm.formats import conversation_of
from accel_llm.ledger import TRAINED, Ledger
from accel_llm.options import DataOptions
from accel_llm.packing import IGNORED

VERSION = 2  # of the encoding: a change of what a row becomes must not meet an old cache
CHUNK = 256
HELD_OUT = "held out"
OPENING = "it opens the conversation, before any question"
NOTHING_TRAINED = "dropped: nothing to train"

SourceRow = tuple[str, int, dict[str, Any]]  # file, row number from 1, row
EncodedRow = tuple[int, list[int], list[int]]  # row number, input ids, labels


@dataclass(frozen=True)
class Encoded:
    """What `encode` returns: rows to train and to evaluate on (None without any), and the ledger of the training files."""

    train: Rows
    eval: Rows | None
    ledger: Ledger
    fingerprint: str

    @property
    def token_ids(self) -> list[np.ndarray]:
        """The ids of all rows, flat: one array to train on, one to evaluate on."""
        return [part.input_ids for part in (self.train, self.eval) if part is not None]


@dataclass
class Chunk:
    """Encoded rows of some source rows, and what became of those."""

    rows: list[EncodedRow] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    lengths: list[int] = field(default_factory=list)
    turns: int = 0


def encode_conversations(rows: list[SourceRow], template: Template, options: DataOptions) -> Chunk:
    """Chat rows of any known shape, masked by the template.

    Raises:
        DataError: a row that is no conversation, naming file and row.
    """
    chunk = Chunk()
    for file, number, row in rows:
        try:
            conversation = conversation_of(row)
            encoding = template.encode(conversation.messages, options.train_on, conversation.tools, options.split_turns)
        except DataError as error:
            raise DataError(f"{file}, row {number}: {error}") from None
        if conversation.skipped_turns:
            chunk.ledger.skip_turns(OPENING)
        for reason, turns in encoding.lost.items():
            chunk.ledger.skip_turns(reason, turns)
        if len(encoding.rows) > 1:
            chunk.ledger.note(
                "The template rewrites history: turns that it shows differently later train in rows of their own."
            )
        if encoding.shown_as_history:
            chunk.ledger.note(
                "The template writes something before an answer only while it is the last (an empty think block, say): "
                "earlier turns are trained without it, as history shows them; split_turns trains each as the last."
            )
        chunk.turns += sum(message["role"] == "assistant" for message in conversation.messages)
        for encoded in encoding.rows:
            _fit(chunk, file, number, encoded.input_ids, encoded.labels, options)
        if not encoding.rows:
            chunk.ledger.read(file)
            chunk.ledger.count(file, NOTHING_TRAINED)
    return chunk


def encode_texts(rows: list[SourceRow], tokenizer: PreTrainedTokenizerFast, column: str, options: DataOptions) -> Chunk:
    """Documents of plain text, trained whole, each ended by the end-of-text token.

    Raises:
        DataError: a row without text in `column`, naming file and row.
    """
    chunk = Chunk()
    for file, number, row in rows:
        if not isinstance(row.get(column), str):
            keys = ", ".join(row)
            raise DataError(f"{file}, row {number}: {column} holds no text; its fields are {keys}; set text_column.")
    for (file, number, _), ids in zip(rows, tokenizer([row[column] for _, _, row in rows])["input_ids"], strict=True):
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        _fit(chunk, file, number, ids, ids, options)
    return chunk


def _fit(chunk: Chunk, file: str, number: int, ids: list[int], labels: list[int], options: DataOptions) -> None:
    """Put one encoded row in the chunk as `overlong` says, and count where each of its tokens went."""
    # Nothing stands before a first token that could predict it: it is context, whatever it was.
    labels = [IGNORED, *labels[1:]]
    ledger, length, supervised = chunk.ledger, len(ids), _labelled(labels)
    chunk.lengths.append(length)
    ledger.read(file, 1, supervised, length - supervised)
    if not supervised:
        ledger.count(file, NOTHING_TRAINED, 1, 0, length)
        return
    too_long = f"longer than max_length={options.max_length}"
    if length > options.max_length and options.overlong == "error":
        raise DataError(
            f"{file}, row {number}: {length} tokens are {too_long}; raise it, or set overlong: drop, truncate or split."
        )
    spans = _spans(labels, options)
    if not spans:
        ledger.count(file, f"dropped: {too_long}", 1, supervised, length - supervised)
        return
    pieces = [(ids[start:end], [IGNORED, *labels[start + 1 : end]]) for start, end in spans]
    chunk.rows += [(number, *piece) for piece in pieces]
    # Likewise the first token of a piece: a label that it had is cut off.
    trained = sum(_labelled(piece_labels) for _, piece_labels in pieces)
    context = sum(end - start - _labelled(labels[start:end]) for start, end in spans)
    ledger.count(file, TRAINED, 1, trained, context)
    if length > options.max_length:
        ledger.count(file, f"cut: {too_long}", 0, supervised - trained, length - supervised - context)


def _labelled(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def _spans(labels: list[int], options: DataOptions) -> list[tuple[int, int]]:
    """The parts [start, end) of a row that are kept: all of one that fits, else what `overlong` says."""
    size, length = options.max_length, len(labels)
    if length <= size:
        return [(0, length)]
    if options.overlong == "split":
        pieces = [(start, min(start + size, length)) for start in range(0, length, size)]
        return [(start, end) for start, end in pieces if _labelled(labels[start + 1 : end])]
    if options.overlong == "truncate":
        if IGNORED not in labels[1 : size + 1]:
            return [(0, size)]
        # The longest beginning that ends with a whole trained turn, so that no answer loses its end token.
        ends = [k + 1 for k in range(size) if labels[k] != IGNORED and labels[k + 1] == IGNORED]
        return [(0, ends[-1])] if ends else []
    return []


def encode(options: DataOptions, seed: int, encoder: Callable[[list[SourceRow]], Chunk], identity: str) -> Encoded:
    """Encode the training and evaluation files with `encoder`, or take them from the cache.

    `identity` names everything beside files and options that shapes the result: see `_identity`.

    Raises:
        DataError: a file or row that cannot be used, or nothing left to train or evaluate on.
        ConfigError: more than `max_lost` of the rows or of their supervised tokens would be lost.
    """
    shaping = ("max_length", "overlong", "train_on", "split_turns", "limit_rows", "eval_share")
    files = [[(name, fingerprint(Path(name))) for name in names] for names in (options.train_files, options.eval_files)]
    drawn = seed if options.eval_share else None
    key = fingerprint(VERSION, identity, files, drawn, *(getattr(options, name) for name in shaping))
    folder = cache_folder(options) / key
    parts, facts = cached(folder, partial(_build, options, seed, encoder))
    ledger = Ledger.from_dict(facts["ledger"])
    ledger.balance()
    check_lost(ledger, facts["lengths"], options)
    check_turns(ledger, facts["turns"], options)
    if not len(parts["train"]):
        raise DataError(f"train_files: no row is left to train on ({', '.join(options.train_files)}).")
    if "eval" in parts and not len(parts["eval"]):
        asked = f"eval_share: {options.eval_share}" if options.eval_share else f"eval_files: {options.eval_files}"
        raise DataError(f"{asked} leaves no row to evaluate on; give more rows, or none of the two options.")
    return Encoded(parts["train"], parts.get("eval"), ledger, key)


def _build(
    options: DataOptions, seed: int, encoder: Callable[[list[SourceRow]], Chunk]
) -> tuple[dict[str, Rows], dict[str, Any]]:
    ledger, lengths, held_out, turns = Ledger(), [], [], 0

    def kept(rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
        for row in rows:
            if options.eval_share and _draw(seed, row) < options.eval_share:
                ledger.read(row[0])
                ledger.count(row[0], HELD_OUT)
                held_out.append(row)
            else:
                yield row

    def trained() -> Iterator[EncodedRow]:
        nonlocal turns
        for chunk in _chunks(kept(read_rows(options.train_files, options.limit_rows)), encoder, options):
            ledger.merge(chunk.ledger)
            lengths.extend(chunk.lengths)
            turns += chunk.turns
            yield from chunk.rows

    parts = {"train": build_rows(trained())}
    if options.limit_rows:
        ledger.note(f"limit_rows: at most the first {options.limit_rows:,} rows were read.")
    if options.eval_share or options.eval_files:
        evaluated = iter(held_out) if options.eval_share else read_rows(options.eval_files)
        chunks = list(_chunks(evaluated, encoder, options))
        parts["eval"] = build_rows(row for chunk in chunks for row in chunk.rows)
        _note_lost(ledger, (chunk.ledger for chunk in chunks))
    shares = (50, 95, 99, 100)
    found = np.percentile(lengths, shares).astype(int).tolist() if lengths else [0] * len(shares)
    lengths_by_share = dict(zip(map(str, shares), found, strict=True))
    return parts, {"ledger": ledger.to_dict(), "lengths": lengths_by_share, "turns": turns}


def _note_lost(ledger: Ledger, evaluated: Iterable[Ledger]) -> None:
    """Rows to evaluate on are no part of the ledger of training; those that are lost are told all the same."""
    total = Ledger()
    for part in evaluated:
        total.merge(part)
    for file, bins in total.bins.items():
        for name, amount in bins.items():
            if name != TRAINED:
                ledger.note(f"Evaluation, {file}: {amount['rows']:,} rows and {amount['supervised']:,} tokens {name}.")


def _draw(seed: int, row: SourceRow) -> float:
    """A number in [0, 1) that depends on seed, file name and row number alone."""
    return zlib.crc32(f"{seed} {Path(row[0]).name} {row[1]}".encode()) / 2**32


def _chunks(
    rows: Iterator[SourceRow], encoder: Callable[[list[SourceRow]], Chunk], options: DataOptions
) -> Iterator[Chunk]:
    batches: Iterable[list[SourceRow]] = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    workers = options.preprocessing_num_workers or 1
    if workers > 1:
        batches = list(batches)
        workers = min(workers, len(batches))
    if workers <= 1:
        yield from map(encoder, batches)
        return
    # Not fork: by now this process has threads of torch and of a process group.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _install, (encoder,)) as pool:
        yield from pool.map(_encode_installed, batches)


def _install(encoder: Callable[[list[SourceRow]], Chunk]) -> None:
    """Once a worker and not once a chunk: a tokenizer takes longer to unpickle than a chunk to encode."""
    global _installed
    _installed = encoder


def _encode_installed(rows: list[SourceRow]) -> Chunk:
    return _installed(rows)


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
    lost = {reason: count for reason, count in ledger.turns.items() if reason != OPENING}
    share = sum(lost.values()) / max(turns, 1)
    if share > options.max_lost:
        reasons = ", ".join(f"{reason} ({count:,} turns)" for reason, count in lost.items())
        raise ConfigError(
            f"max_lost: {share:.1%} of the assistant turns would train nothing, allowed is {options.max_lost:.1%}: "
            f"{reasons}; set split_turns: true or another chat_template, or raise max_lost."
        )


def conversations(options: DataOptions, seed: int, tokenizer: PreTrainedTokenizerFast, template: Template) -> Encoded:
    """Encode chat files; see `encode`."""
    encoder = partial(encode_conversations, template=template, options=options)
    encoded = encode(options, seed, encoder, _identity(tokenizer, template.source))
    if template.turn_end is None:
        encoded.ledger.note("The template closes no turn, so no end token is trained and answers will not stop by it.")
    return encoded


def texts(options: DataOptions, seed: int, tokenizer: PreTrainedTokenizerFast, column: str) -> Encoded:
    """Encode text files; see `encode`."""
    encoder = partial(encode_texts, tokenizer=tokenizer, column=column, options=options)
    return encode(options, seed, encoder, _identity(tokenizer, column))


def _identity(tokenizer: PreTrainedTokenizerFast, rest: str) -> str:
    """What an encoding depends on beside rows and options; which token is the bos or eos is not in the backend."""
    return fingerprint(tokenizer.backend_tokenizer.to_str(), sorted(tokenizer.special_tokens_map.items()), rest)
