"""Encode some hundred rows at a time: parse, tokenize, mask, cut to length, and count everything in the ledger."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from accel_llm.chat.encoded import EncodedConversation, EncodedRow
from accel_llm.chat.guard import check_encodable
from accel_llm.chat.reads import TemplateReads
from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import THINKING_VARIABLES, Template
from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import DataFormat
from accel_llm.data.formats import Conversation, Document, TokenizedRow, parse_row
from accel_llm.data.label_task import LabelTask
from accel_llm.data.labelled_rows import LabelledRow
from accel_llm.data.labels import LabelKind
from accel_llm.data.ledger import TRAINED, Ledger
from accel_llm.data.pairs import PreferenceKind, PreferenceRow
from accel_llm.data.rows import RowPart
from accel_llm.data.sources import RawRow
from accel_llm.errors import DataError

NOTHING_TRAINED = "dropped: nothing to train"
SPLIT_NOTE = "The template shows some answers differently once others follow: these also train in rows of their own."
HISTORY_NOTE = (
    "The template writes something around an answer only while it is the last (for example an empty think block, or "
    "another end token): earlier answers are trained without it, as the template shows them; split_turns trains each "
    "as the last one."
)
REASONING_NOTE = "Some answers have reasoning that the template does not write: they are trained without it."
THOUGHT_NOTE = (
    "The prompt begins a thought that some answers lack: it is closed before them, and what the prompt does not write "
    "of it is trained."
)
THINKING_REMARK = "the row has reasoning, which the template writes only with {}: true; it is set for such rows"
RENDERED_REMARK = (
    "a message holds the template's own control tokens, as if it were rendered already: they stay text; give messages "
    "without them, or set allow_special_in_text"
)
TRIED_PER_CHUNK = 4  # conversations with lost turns that are tried with other settings, for the advice
A_CHAT = "found a conversation, but pretraining takes plain text; train it with launch/sft.py", "a chat"


class SourceRow(NamedTuple):
    """A row and where it came from: `source` is an index into `Encoder.formats`, `origin` the number of its origin."""

    source: int
    origin: int
    row: RawRow


@dataclass(frozen=True)
class Encoder:
    """Everything needed to encode rows; it can be sent to a worker process.

    Without a template the rows are documents or token ids, and a conversation is an error: `no_template` is its
    message and reason.
    """

    options: DataOptions
    tokenizer: PreTrainedTokenizerFast
    template: Template | None
    labels: list[str]  # for each source: its name in the ledger
    formats: list[tuple[DataFormat | None, dict[str, str]]]  # for each source: data_format and columns
    no_template: tuple[str, str] = A_CHAT
    preferences: PreferenceKind | None = None  # the rows are preferences; see data/encode_answers.py
    labelled: LabelKind | None = None  # the rows are texts with labels; see data/encode_labelled.py
    task: LabelTask | None = None  # of such rows, once the labels of all of them are known


@dataclass
class Chunk:
    """The encoded rows of some source rows, and the ledger of these source rows."""

    part: RowPart = field(default_factory=RowPart)
    ledger: Ledger = field(default_factory=Ledger)
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of a row before it is cut -> rows
    turns: int = 0  # assistant turns


def encode_chunk(rows: list[SourceRow], encoder: Encoder) -> Chunk:
    """Encode `rows`. With `on_bad_row: drop` a bad row is left out and counted.

    Raises:
        DataError: a bad row, or with `overlong: error` a row that is too long; the message names file and row.
    """
    chunk, parsed_rows = Chunk(), []
    for row in rows:
        try:
            parsed_rows.append((row, _encode(row, encoder, chunk)))
        except DataError as error:
            drop_or_raise(row, error, encoder, chunk)

    # All documents are tokenized in one call, which is faster. The rows keep their order.
    texts = [parsed.text for _, parsed in parsed_rows if isinstance(parsed, Document)]
    documents = iter(_encode_documents(texts, encoder.tokenizer))
    for row, parsed in parsed_rows:
        for encoded in [next(documents)] if isinstance(parsed, Document) else parsed:
            _add_row(chunk, row, encoded, encoder)
    return chunk


def _encode(row: SourceRow, encoder: Encoder, chunk: Chunk) -> list[EncodedRow] | Document:
    """Return the encoded rows of one row. A document is returned as text; `encode_chunk` tokenizes it."""
    template, ledger = encoder.template, chunk.ledger
    data_format, columns = encoder.formats[row.source]
    parsed = parse_row(row.row.fields, data_format, columns, template.reads if template else TemplateReads())
    if isinstance(parsed, TokenizedRow):
        rows = [EncodedRow(parsed.input_ids, parsed.labels, parsed.weights)]
    elif isinstance(parsed, Document):
        check_encodable(parsed.text)
        rows = parsed
    elif template is None:
        raise DataError(*encoder.no_template)
    else:
        rows = _encode_conversation(parsed, template, encoder.options, encoder.labels[row.source], chunk)

    note_unused(ledger, parsed)
    return rows


def note_unused(ledger: Ledger, parsed: Conversation | Document | TokenizedRow | PreferenceRow | LabelledRow) -> None:
    """Count what a row says and nothing reads, and the remarks on it."""
    ledger.characters += parsed.characters
    for name, values in parsed.unused:
        ledger.leave_unused(name, values)
    for sentence in parsed.remarks:
        ledger.remark(sentence)


def _encode_conversation(
    conversation: Conversation, template: Template, options: DataOptions, label: str, chunk: Chunk
) -> list[EncodedRow]:
    """Encode one conversation, and note in the ledger whatever the template did not write as the row has it."""
    encoding = apply_template(conversation, template, options)
    note_encoding(encoding, conversation, template, options, chunk)
    if not encoding.rows:
        chunk.ledger.read(label)
        chunk.ledger.count(label, NOTHING_TRAINED)
    return encoding.rows


def note_encoding(
    encoding: EncodedConversation,
    conversation: Conversation,
    template: Template,
    options: DataOptions,
    chunk: Chunk,
    may_split: bool = True,
) -> None:
    """Note in the ledger whatever the template did not write as the row has it, and count the turns.

    Without `may_split` no advice is given to split the conversation.
    """
    ledger = chunk.ledger
    for reason, turns in encoding.lost.items():
        ledger.skip_turns(reason, turns)
    if encoding.lost:
        _try_remedies(conversation, template, options, ledger, may_split)
    for kind in encoding.left_out:
        ledger.left_out[kind] += 1
    if len(encoding.rows) > 1:
        ledger.note(SPLIT_NOTE)
    if encoding.shown_as_history:
        ledger.note(HISTORY_NOTE)
    if encoding.variable:
        ledger.remark(THINKING_REMARK.format(encoding.variable))
    if encoding.without_reasoning:
        ledger.note(REASONING_NOTE)
    if encoding.closed_thoughts:
        ledger.note(THOUGHT_NOTE)
    if encoding.rendered_before:
        ledger.remark(RENDERED_REMARK)

    chunk.turns += sum([message["role"] == "assistant" for message in conversation.messages])


def apply_template(
    conversation: Conversation, template: Template, options: DataOptions, variables: dict[str, Any] | None = None
) -> EncodedConversation:
    """Encode a conversation as the options say; `variables` are further variables for the template."""
    return template.encode(
        conversation.messages,
        options.train_on,
        conversation.tools,
        options.split_turns,
        options.train_on_eos,
        {**conversation.variables, **(variables or {})} or None,
        options.open_thought,
    )


def _try_remedies(
    conversation: Conversation, template: Template, options: DataOptions, ledger: Ledger, may_split: bool
) -> None:
    """Count the settings that would train every turn of a conversation of which some turns are lost."""
    if ledger.tried >= TRIED_PER_CHUNK:
        return
    ledger.tried += 1
    settings: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # name, options, variables
        *([("split_turns: auto", {"split_turns": "auto"}, {})] if may_split else []),
        ("open_thought: close", {"open_thought": "close"}, {}),
        ("open_thought: history", {"open_thought": "history"}, {}),
    ]
    for name in sorted(THINKING_VARIABLES & template.reads.variables):
        for value in (False, True):
            settings.append((f"chat_template_kwargs: {name}={str(value).lower()}", {}, {name: value}))
    for sentence, changes, variables in settings:
        try:
            encoding = apply_template(conversation, template, options.model_copy(update=changes), variables)
        except DataError:
            continue
        ledger.remedies[sentence] += not encoding.lost


def drop_or_raise(row: SourceRow, error: DataError, encoder: Encoder, chunk: Chunk) -> None:
    """Treat a bad row as `on_bad_row` says.

    Raises:
        DataError: with `on_bad_row: error`, naming file and row.
    """
    location = f"{row.row.file}, row {row.row.number}"
    if encoder.options.on_bad_row == "error":
        raise DataError(f"{location}: {error}; on_bad_row: drop leaves such rows out.", error.reason) from None
    label = encoder.labels[row.source]
    chunk.ledger.read(label)
    chunk.ledger.count(label, f"dropped: {error.reason}")
    chunk.ledger.example(error.reason, f"{location}: {error}")


def _encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[EncodedRow]:
    """Tokenize plain texts; all tokens are trained, and each text ends with the end-of-text token."""
    if not texts:
        return []
    # A text may begin with the token that the tokenizer puts before each text; one is enough.
    begin = tokenizer.bos_token
    if isinstance(begin, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        texts = [text.removeprefix(begin) if text.startswith(begin) else text for text in texts]
    end = tokenizer.eos_token_id
    # Some tokenizers have no end-of-text token, others add it themselves.
    documents = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in tokenizer(texts)["input_ids"]]
    return [EncodedRow(ids, ids) for ids in documents]


def _add_row(chunk: Chunk, row: SourceRow, encoded: EncodedRow, encoder: Encoder) -> None:
    """Add one encoded row to the chunk, shortened as `overlong` says, and count each of its tokens in the ledger."""
    options, label = encoder.options, encoder.labels[row.source]

    # The first token is always context: no token comes before it that could predict it.
    ids, labels, weights = encoded.input_ids, encoded.labels, encoded.weights
    labels = labels if labels[:1] == [IGNORED] else [IGNORED, *labels[1:]]
    ledger, length, supervised = chunk.ledger, len(ids), _count_labels(labels)
    chunk.lengths[length] += 1
    ledger.read(label, 1, supervised, length - supervised)
    if not supervised:
        ledger.count(label, NOTHING_TRAINED, 1, 0, length)
        return

    # A row that fits is added whole.
    id_array = array("i", ids)
    digest = hash_tokens(id_array)
    if length <= options.max_length - options.virtual_tokens:
        chunk.part.add(id_array, array("i", labels), weights, row.row.number, row.origin, digest)
        ledger.count(label, TRAINED, 1, supervised, length - supervised)
        return

    virtual = f" less {options.virtual_tokens} virtual tokens" if options.virtual_tokens else ""
    too_long = f"longer than max_length={options.max_length}{virtual}"
    if options.overlong == "error":
        raise DataError(
            f"{row.row.file}, row {row.row.number}: {length} tokens are {too_long}; raise it, or set overlong: drop, "
            "truncate or split."
        )
    spans = _spans_to_train(labels, options)
    if not spans:
        ledger.count(label, f"dropped: {too_long}", 1, supervised, length - supervised)
        return

    # Add the pieces; the tokens that are in no piece were cut.
    trained = context = 0
    for start, end in spans:
        # The first token of a piece is context, too: its label counts as cut.
        piece_labels = [IGNORED, *labels[start + 1 : end]]
        piece_weights = weights if weights is None else weights[start:end]
        chunk.part.add(id_array[start:end], array("i", piece_labels), piece_weights, row.row.number, row.origin, digest)
        trained += _count_labels(piece_labels)
        context += end - start - _count_labels(labels[start:end])
    ledger.count(label, TRAINED, 1, trained, context)
    ledger.count(label, f"cut: {too_long}", 0, supervised - trained, length - supervised - context)


def hash_tokens(ids: array) -> int:
    """Return a 64-bit hash of token ids, by which equal rows are found."""
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little")


def _count_labels(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def _spans_to_train(labels: list[int], options: DataOptions) -> list[tuple[int, int]]:
    """Return the parts [start, end) of a row longer than `max_length` allows that are trained, as `overlong` says."""
    size, length = options.max_length - options.virtual_tokens, len(labels)
    if options.overlong == "split":
        # Pieces of equal size; a piece without a label is left out.
        pieces = [(start, min(start + size, length)) for start in range(0, length, size)]
        return [(start, end) for start, end in pieces if _count_labels(labels[start + 1 : end])]
    if options.overlong == "truncate":
        if IGNORED not in labels[1 : size + 1]:
            return [(0, size)]
        # The longest start of the row that ends with a complete trained turn, so that no answer loses its end token.
        ends = [k + 1 for k in range(size) if labels[k] != IGNORED and labels[k + 1] == IGNORED]
        return [(0, ends[-1])] if ends else []
    return []
