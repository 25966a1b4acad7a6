"""Rows as they were read -> encoded rows, some hundreds at a time: parsed, masked, cut to length, each one counted."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import check_encodable
from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import EncodedRow, Template
from accel_llm.config.fields import DataFormat
from accel_llm.config.options import DataOptions
from accel_llm.data.formats import Conversation, Document, Tokenized, parse_row
from accel_llm.data.ledger import TRAINED, Ledger
from accel_llm.data.rows import RowPart
from accel_llm.data.sources import RawRow
from accel_llm.errors import DataError

NOTHING_TRAINED = "dropped: nothing to train"
SPLIT_NOTE = "The template rewrites history: turns that it shows differently later train in rows of their own."
HISTORY_NOTE = (
    "The template writes something before an answer only while it is the last (an empty think block, say): earlier turns "
    "are trained without it, as history shows them; split_turns trains each as the last."
)
REASONING_NOTE = "Some answers have reasoning that the template does not write: they are trained without it."


class SourceRow(NamedTuple):
    """A row with where it came from: `source` is an index of `Encoder.formats`, `origin` one of the run's origins."""

    source: int
    origin: int
    row: RawRow


@dataclass(frozen=True)
class Encoder:
    """What turns rows into tokens; it can be sent to a worker. Without a template rows are documents or tokens."""

    options: DataOptions
    tokenizer: PreTrainedTokenizerFast
    template: Template | None
    labels: list[str]  # of each source, as the ledger names it
    formats: list[tuple[DataFormat | None, dict[str, str]]]  # of each source: data_format and columns


@dataclass
class Chunk:
    """Encoded rows of some source rows, and what became of those."""

    part: RowPart = field(default_factory=RowPart)
    ledger: Ledger = field(default_factory=Ledger)
    lengths: Counter[int] = field(default_factory=Counter)
    turns: int = 0


def encode_chunk(rows: list[SourceRow], encoder: Encoder) -> Chunk:
    """Encode `rows`; those that are not right are dropped and counted where `on_bad_row` says so.

    Raises:
        DataError: a row that is not right, or one that is too long where `overlong` is error, naming file and row.
    """
    chunk, whole = Chunk(), []
    for row in rows:
        try:
            whole.append((row, _encode(row, encoder, chunk)))
        except DataError as error:
            _refuse(row, error, encoder, chunk)
    documents = [(row, found) for row, found in whole if isinstance(found, Document)]
    ids = iter(_documents([document.text for _, document in documents], encoder.tokenizer))
    for row, found in whole:
        for encoded in [next(ids)] if isinstance(found, Document) else found:
            _fit(chunk, row, encoded, encoder)
    return chunk


def _encode(row: SourceRow, encoder: Encoder, chunk: Chunk) -> list[EncodedRow] | Document:
    """The encoded rows of one row; a document is left for all to be tokenised together."""
    options, template = encoder.options, encoder.template
    found = parse_row(row.row.fields, *encoder.formats[row.source])
    if isinstance(found, Tokenized):
        return [EncodedRow(found.input_ids, found.labels)]
    if isinstance(found, Document):
        check_encodable(found.text)
        return found
    if template is None:
        raise DataError("found a conversation, but pretraining takes plain text; train it with launch/sft.py", "a chat")
    return _conversation(row, found, template, options, encoder.labels[row.source], chunk)


def _conversation(
    row: SourceRow, found: Conversation, template: Template, options: DataOptions, label: str, chunk: Chunk
) -> list[EncodedRow]:
    encoding = template.encode(
        found.messages,
        options.train_on,
        found.tools,
        options.split_turns,
        options.train_on_eos,
        found.variables or None,
    )
    for reason, turns in encoding.lost.items():
        chunk.ledger.skip_turns(reason, turns)
    if len(encoding.rows) > 1:
        chunk.ledger.note(SPLIT_NOTE)
    if encoding.shown_as_history:
        chunk.ledger.note(HISTORY_NOTE)
    if encoding.without_reasoning:
        chunk.ledger.note(REASONING_NOTE)
    chunk.turns += sum([message["role"] == "assistant" for message in found.messages])
    if not encoding.rows:
        chunk.ledger.read(label)
        chunk.ledger.count(label, NOTHING_TRAINED)
    return encoding.rows


def _refuse(row: SourceRow, error: DataError, encoder: Encoder, chunk: Chunk) -> None:
    where = f"{row.row.file}, row {row.row.number}"
    if encoder.options.on_bad_row == "error":
        raise DataError(f"{where}: {error}; on_bad_row: drop leaves such rows out.", error.reason) from None
    label = encoder.labels[row.source]
    chunk.ledger.read(label)
    chunk.ledger.count(label, f"dropped: {error.reason}")
    chunk.ledger.example(error.reason, f"{where}: {error}")


def _documents(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[EncodedRow]:
    """Plain texts, trained whole, each ended by the end-of-text token."""
    if not texts:
        return []
    end = tokenizer.eos_token_id
    found = tokenizer(texts)["input_ids"]
    whole = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in found]
    return [EncodedRow(ids, ids) for ids in whole]


def _fit(chunk: Chunk, row: SourceRow, encoded: EncodedRow, encoder: Encoder) -> None:
    """Put one encoded row in the chunk as `overlong` says, and count where each of its tokens went."""
    options, label = encoder.options, encoder.labels[row.source]
    # Nothing stands before a first token that could predict it: it is context, whatever it was.
    ids, labels, weights = encoded.input_ids, encoded.labels, encoded.weights
    labels = labels if labels[:1] == [IGNORED] else [IGNORED, *labels[1:]]
    ledger, length, supervised = chunk.ledger, len(ids), _labelled(labels)
    chunk.lengths[length] += 1
    ledger.read(label, 1, supervised, length - supervised)
    if not supervised:
        ledger.count(label, NOTHING_TRAINED, 1, 0, length)
        return
    packed = array("i", ids)
    digest = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    if length <= options.max_length:
        chunk.part.add(packed, array("i", labels), weights, row.row.number, row.origin, digest)
        ledger.count(label, TRAINED, 1, supervised, length - supervised)
        return
    too_long = f"longer than max_length={options.max_length}"
    if options.overlong == "error":
        raise DataError(
            f"{row.row.file}, row {row.row.number}: {length} tokens are {too_long}; raise it, or set overlong: drop, "
            "truncate or split."
        )
    spans = _spans(labels, options)
    if not spans:
        ledger.count(label, f"dropped: {too_long}", 1, supervised, length - supervised)
        return
    trained = context = 0
    for start, end in spans:
        # Likewise the first token of a piece: a label that it had is cut off.
        kept = [IGNORED, *labels[start + 1 : end]]
        piece_weights = weights if weights is None else weights[start:end]
        chunk.part.add(packed[start:end], array("i", kept), piece_weights, row.row.number, row.origin, digest)
        trained += _labelled(kept)
        context += end - start - _labelled(labels[start:end])
    ledger.count(label, TRAINED, 1, trained, context)
    ledger.count(label, f"cut: {too_long}", 0, supervised - trained, length - supervised - context)


def _labelled(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def _spans(labels: list[int], options: DataOptions) -> list[tuple[int, int]]:
    """The parts [start, end) of a row that is too long that are kept."""
    size, length = options.max_length, len(labels)
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
