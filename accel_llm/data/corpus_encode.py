"""Encodes the documents of one piece of a corpus: token ids in rows, hashes to find duplicates by, and the ledger."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.guard import check_encodable
from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import DataFormat
from accel_llm.data.chunk_tokenizer import ChunkTokenizer
from accel_llm.data.contamination import EvaluationNgrams
from accel_llm.data.encode import A_CHAT, NOTHING_TRAINED, hash_tokens, note_unused
from accel_llm.data.fill_in_the_middle import FillInTheMiddle
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.formats import Document, parse_row
from accel_llm.data.ledger import TRAINED, Ledger
from accel_llm.data.near_duplicates import HASHES, sign_documents
from accel_llm.data.sources import RawRow
from accel_llm.errors import DataError

DOCUMENTS_AT_ONCE = 1000  # that the tokenizer gets in one call


@dataclass(frozen=True)
class CorpusEncoder:
    """What encodes the documents of a corpus; a worker process gets a copy."""

    options: DataOptions
    tokenizer: PreTrainedTokenizerFast
    labels: list[str]  # for each source: its name in the ledger
    formats: list[tuple[DataFormat | None, dict[str, str]]]  # for each source: data_format and columns
    chunks: ChunkTokenizer
    middle: FillInTheMiddle | None = None
    evaluation: EvaluationNgrams | None = None  # documents that have one of these n-grams are removed
    signs: bool = False  # whether documents get signatures, to find near duplicates by


@dataclass
class EncodedPiece:
    """The documents of one piece that are trained, and the ledger of all of its documents."""

    input_ids: np.ndarray  # int32 [tokens], of all rows
    row_lengths: np.ndarray  # int32 [rows]
    document_rows: np.ndarray  # int32 [documents], the rows that each document became
    document_tokens: np.ndarray  # int32 [documents], before any cut
    number: np.ndarray  # int64 [documents], as in `RawRow`
    digest: np.ndarray  # uint64 [documents], `hash_tokens` of the ids before any cut
    text_digest: np.ndarray  # uint64 [documents, 2], a hash of the text
    signatures: np.ndarray | None = None  # uint32 [documents, HASHES]
    rows_read: int = 0  # of the source, the bad ones too
    rearranged: int = 0  # documents for fill-in-the-middle
    ledger: Ledger = field(default_factory=Ledger)


def encode_piece(rows: Iterable[RawRow], source: int, encoder: CorpusEncoder) -> EncodedPiece:
    """Encode the rows of one piece of a source. With `on_bad_row: drop` a bad row is left out and counted.

    Raises:
        DataError: a bad row, or with `overlong: error` a document that is too long; the message names file and row.
    """
    ledger, read, rearranged = Ledger(), 0, 0
    ids, lengths, numbers, digests, text_digests = array("i"), array("i"), array("q"), array("Q"), bytearray()
    contaminated, signatures = bytearray(), []
    iterator = iter(rows)
    while chunk := list(islice(iterator, DOCUMENTS_AT_ONCE)):
        read += len(chunk)
        documents = list(_parse_documents(chunk, source, encoder, ledger))
        encoded = list(tokenize_texts([text for _, text, _ in documents], encoder))
        if encoder.signs:
            signatures.append(_sign(encoded))
        if encoder.middle:
            rearranged += _rearrange(documents, encoded, encoder)
        for (row, text, text_digest), id_array in zip(documents, encoded, strict=True):
            ids += id_array
            lengths.append(len(id_array))
            numbers.append(row.number)
            digests.append(hash_tokens(id_array))
            text_digests += text_digest
            contaminated.append(encoder.evaluation is not None and encoder.evaluation.appear_in(text))
            if len(id_array) > encoder.options.max_length and encoder.options.overlong == "error":
                _refuse_length(row, len(id_array), encoder.options)
    piece = EncodedPiece(
        np.frombuffer(ids, np.int32),
        *_one_row_each(np.frombuffer(lengths, np.int32)),
        np.frombuffer(numbers, np.int64),
        np.frombuffer(digests, np.uint64),
        np.frombuffer(bytes(text_digests), np.uint64).reshape(-1, 2),
        np.concatenate([np.zeros((0, HASHES), np.uint32), *signatures]) if encoder.signs else None,
        read,
        rearranged,
        ledger,
    )
    return _cut_documents(piece, np.frombuffer(bytes(contaminated), bool), encoder, encoder.labels[source])


def _sign(documents: list[array]) -> np.ndarray:
    """Return the signatures of documents, uint32 [documents, HASHES]."""
    ids = np.concatenate([np.zeros(0, np.int32), *(np.frombuffer(ids, np.int32) for ids in documents)])
    return sign_documents(ids, np.array(list(map(len, documents)), np.int64))


def _rearrange(documents: list[tuple[RawRow, str, bytes]], encoded: list[array], encoder: CorpusEncoder) -> int:
    """Replace the ids of documents that are rearranged for fill-in-the-middle; return how many are.

    One that would not fit in a row stays as it is: its parts would be torn from their tokens.
    """
    assert encoder.middle is not None
    texts = [encoder.middle.rearrange(text, digest) for _, text, digest in documents]
    chosen = [k for k, text in enumerate(texts) if text is not None]
    new = tokenize_texts([str(texts[k]) for k in chosen], encoder)
    fitting = [(k, ids) for k, ids in zip(chosen, new, strict=True) if len(ids) <= encoder.options.max_length]
    for k, ids in fitting:
        encoded[k] = ids
    return len(fitting)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identify everything of a tokenizer that changes the ids of a text."""
    # The backend does not say which tokens are bos and eos, so the special tokens are added.
    return data_fingerprint(tokenizer.backend_tokenizer.to_str(), sorted(tokenizer.special_tokens_map.items()))


def tokenize_texts(texts: list[str], encoder: CorpusEncoder) -> Iterator[array]:
    """Return the token ids of each text as pretraining has them: with what the tokenizer adds, and the end token."""
    tokenizer = encoder.tokenizer
    # A text may begin with the token that the tokenizer puts before each text; one is enough.
    begin = tokenizer.bos_token
    if isinstance(begin, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        texts = [text.removeprefix(begin) if text.startswith(begin) else text for text in texts]
    end: Any = tokenizer.eos_token_id
    for ids in encoder.chunks.encode(texts):
        # Some tokenizers have no end-of-text token, others add it themselves.
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        yield ids


def _parse_documents(
    rows: list[RawRow], source: int, encoder: CorpusEncoder, ledger: Ledger
) -> Iterator[tuple[RawRow, str, bytes]]:
    """Yield (row, text, 16 bytes of its hash) of each row that is good."""
    data_format, columns = encoder.formats[source]
    is_plain = not columns and data_format in (None, "text")
    for row in rows:
        text = row.fields.get("text") if is_plain and len(row.fields) == 1 else None
        try:
            if type(text) is str and not text.isspace() and text:
                ledger.characters += len(text)
            else:
                text = _parse_text(row, data_format, columns, ledger)
            yield row, text, hashlib.blake2b(text.encode(), digest_size=16).digest()
        except (DataError, UnicodeEncodeError) as error:
            if isinstance(error, UnicodeEncodeError):
                error = _half_character(str(text))
            _drop_or_raise(row, error, encoder, encoder.labels[source], ledger)


def _half_character(text: str) -> DataError:
    try:
        check_encodable(text)
    except DataError as error:
        return error
    raise AssertionError("a text that cannot be encoded has half a surrogate pair")


def _parse_text(row: RawRow, data_format: DataFormat | None, columns: dict[str, str], ledger: Ledger) -> str:
    parsed = parse_row(row.fields, data_format, columns)
    if not isinstance(parsed, Document):
        raise (
            DataError(*A_CHAT)
            if not hasattr(parsed, "input_ids")
            else DataError(
                "found token ids, but a corpus is prepared from text; train on token ids as they are", "token ids"
            )
        )
    note_unused(ledger, parsed)
    return parsed.text


def _drop_or_raise(row: RawRow, error: DataError, encoder: CorpusEncoder, label: str, ledger: Ledger) -> None:
    location = f"{row.file}, row {row.number}"
    if encoder.options.on_bad_row == "error":
        raise DataError(f"{location}: {error}; on_bad_row: drop leaves such rows out.", error.reason) from None
    ledger.read(label)
    ledger.count(label, f"dropped: {error.reason}")
    ledger.example(error.reason, f"{location}: {error}")


def _refuse_length(row: RawRow, length: int, options: DataOptions) -> None:
    raise DataError(
        f"{row.file}, row {row.number}: {length} tokens are longer than max_length={options.max_length}; raise it, or "
        "set overlong: drop, truncate or split."
    )


def _one_row_each(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `row_lengths`, `document_rows` and `document_tokens` of documents before any cut."""
    return lengths, np.ones(len(lengths), np.int32), lengths


def _cut_documents(piece: EncodedPiece, contaminated: np.ndarray, encoder: CorpusEncoder, label: str) -> EncodedPiece:
    """Cut the documents that are longer than `max_length`, as `overlong` says, and count all in the ledger.

    All tokens but the first of a document are trained. A row that is the next part of a document loses the label of its
    first token, too; what would be a row of one token is left out, for it would train nothing.
    """
    options = encoder.options
    lengths, limit, ledger = piece.document_tokens.astype(np.int64), options.max_length, piece.ledger
    nothing = lengths < 2
    contaminated = contaminated & ~nothing
    too_long = (lengths > limit) & ~contaminated
    ledger.read(label, len(lengths), int((lengths - 1).clip(0).sum()), int(np.count_nonzero(lengths)))
    if nothing.any():
        ledger.count(label, NOTHING_TRAINED, int(nothing.sum()), 0, int(lengths[nothing].sum()))
    if encoder.evaluation and contaminated.any():
        name = f"removed: {encoder.evaluation.ngram} words in a row are in decontaminate_files"
        removed = int(contaminated.sum())
        ledger.count(label, name, removed, int((lengths[contaminated] - 1).sum()), removed)
    if options.overlong == "drop" and too_long.any():
        dropped = int(too_long.sum())
        ledger.count(label, f"dropped: {too_long_words(options)}", dropped, int((lengths[too_long] - 1).sum()), dropped)
    keep = ~nothing & ~contaminated & ~(too_long & (options.overlong == "drop"))

    # How many rows each document becomes, and how many of its tokens are in them.
    rows, used = np.ones_like(lengths), np.minimum(lengths, limit)
    if options.overlong == "split":
        left_over = too_long & (lengths % limit == 1)
        rows, used = -(-lengths // limit) - left_over, lengths - left_over
    rows, used = rows[keep], used[keep]
    row_lengths = np.full(int(rows.sum()), limit, np.int32)
    row_lengths[np.cumsum(rows) - 1] = used - (rows - 1) * limit
    count_documents(ledger, label, TRAINED, lengths[keep], rows, used, options)

    ids = piece.input_ids
    if int(used.sum()) < len(ids):
        # Of each document the tokens that are used, then those that are not.
        in_rows = np.zeros_like(lengths)
        in_rows[keep] = used
        spans = np.stack([in_rows, lengths - in_rows], 1).ravel()
        ids = ids[np.repeat(np.tile([True, False], len(lengths)), spans)]
    return EncodedPiece(
        ids,
        row_lengths,
        rows.astype(np.int32),
        piece.document_tokens[keep],
        piece.number[keep],
        piece.digest[keep],
        piece.text_digest[keep],
        None if piece.signatures is None else piece.signatures[keep],
        piece.rows_read,
        piece.rearranged,
        ledger,
    )


def too_long_words(options: DataOptions) -> str:
    """Return how the ledger calls a document that is cut or dropped because of its length."""
    return f"longer than max_length={options.max_length}"


def count_documents(
    ledger: Ledger,
    label: str,
    name: str,
    tokens: np.ndarray,
    rows: np.ndarray,
    used: np.ndarray,
    options: DataOptions,
) -> None:
    """Count documents in the bin `name`: int64 [documents] `tokens` before any cut, `rows`, and `used` tokens in rows.

    The tokens that lost their label by a cut are counted as cut.
    """
    documents, trained = len(tokens), int((used - rows).sum())
    ledger.count(label, name, documents, trained, documents)
    if cut := int((tokens - 1).sum()) - trained:
        ledger.count(label, f"cut: {too_long_words(options)}", 0, cut, 0)
