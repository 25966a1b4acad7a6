"""Encode texts with labels, as the tokenizer's own call encodes one text or two."""

from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from accel_llm.chat.targets import IGNORED
from accel_llm.chat.values import EMPTY_TEXT
from accel_llm.config.data_options import DataOptions
from accel_llm.data.encode import Chunk, Encoder, SourceRow, drop_or_raise, hash_tokens, note_unused
from accel_llm.data.labelled_rows import LabelledRow, labelled_column_problems
from accel_llm.data.labels import find_targets
from accel_llm.data.ledger import TRAINED
from accel_llm.errors import ConfigError, DataError

LABELLED_CUTS = "truncate"  # the values of `overlong` that shorten a text with a label


class EncodedTexts(NamedTuple):
    """Token ids of one text, or of two in one row, with special tokens.

    `second_start` is where token types turn from 0 to 1, the length if they never do; None if the tokenizer has none.
    `contents` are the tokens of each text without special tokens.
    """

    input_ids: list[int]
    second_start: int | None
    contents: tuple[int, ...]


def labelled_problems(options: DataOptions, columns: list[dict[str, str]]) -> list[str]:
    """Return a sentence for each option that has no meaning for texts with labels."""
    problems = [problem for names in (options.columns, *columns) for problem in labelled_column_problems(names)]
    if options.overlong == "split":
        problem = "would give each piece the label of the whole text; allowed are drop, truncate and error"
        problems.append(f"overlong: split {problem}.")
    if options.data_format not in (None, "text"):
        problems.append(f"data_format: {options.data_format} has no label; allowed is text, whose columns are found.")
    return problems


def encode_labelled_chunk(rows: list[SourceRow], encoder: Encoder) -> Chunk:
    """Encode texts with labels, as `encode_chunk` encodes rows of fine-tuning. All tokens are context.

    Raises:
        DataError: a bad row, or with `overlong: error` a text that is too long; the message names file and row.
        ConfigError: the tokenizer has token types that are not 0 for the first text and 1 for the second.
    """
    chunk, parsed_rows, task = Chunk(), [], encoder.task
    assert task is not None
    for row in rows:
        try:
            parsed = task.readers[row.source].parse(row.row)
            targets = find_targets(parsed.label, task.vocabulary, parsed.label_column)
        except DataError as error:
            drop_or_raise(row, error, encoder, chunk)
            continue
        parsed_rows.append((row, parsed, targets))

    encodings = encode_text_pairs([(parsed.text, parsed.text_pair) for _, parsed, _ in parsed_rows], encoder.tokenizer)
    for (row, parsed, targets), encoding in zip(parsed_rows, encodings, strict=True):
        try:
            check_contents(encoding)
        except DataError as error:
            drop_or_raise(row, error, encoder, chunk)
            continue
        note_unused(chunk.ledger, parsed)
        _add_texts(chunk, row, parsed, targets, encoding, encoder)
    return chunk


def encode_text_pairs(
    texts: list[tuple[str, str | None]], tokenizer: PreTrainedTokenizerFast, max_length: int | None = None
) -> list[EncodedTexts]:
    """Encode each text, or both texts of a pair, by the tokenizer's own call; with `max_length` cut as it cuts.

    The longer text of a pair is cut first (`longest_first`). `max_length` must have room for the special tokens.

    Raises:
        ConfigError: the tokenizer has token types that are not 0 for the first text and 1 for the second.
    """
    cut: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded: dict[int, EncodedTexts] = {}
    for is_pair in (False, True):
        places = [k for k, (_, text_pair) in enumerate(texts) if (text_pair is not None) == is_pair]
        if not places:
            continue
        both: list[Any] = [[texts[k][part] for k in places] for part in range(1 + is_pair)]
        # Without `verbose=False` transformers logs that a text is longer than the model allows; `max_length` says that.
        output = tokenizer(*both, verbose=False, **cut)
        special = tokenizer.backend_tokenizer.num_special_tokens_to_add(is_pair)
        for j, k in enumerate(places):
            encoded[k] = _read_output(output, j, is_pair, special)
    # The tokenizer keeps the last truncation, which would be in the names of caches.
    tokenizer.backend_tokenizer.no_truncation()
    return [encoded[k] for k in range(len(texts))]


def _read_output(output: Mapping[str, Any], j: int, is_pair: bool, special: int) -> EncodedTexts:
    """Return the encoding of text j of a batch; `special` is the number of special tokens."""
    ids, types, second_start = output["input_ids"][j], None, None
    if "token_type_ids" in output:
        types = output["token_type_ids"][j]
        second_start = types.index(1) if 1 in types else len(types)
        if types != [0] * second_start + [1] * (len(types) - second_start):
            raise ConfigError(
                f"tokenizer_name: the token types of its texts are {types[:8]}...; needs a tokenizer with 0 for the "
                "first text and 1 for the second."
            )
    if not is_pair:
        return EncodedTexts(ids, second_start, (len(ids) - special,))
    sequences = output.encodings[j].sequence_ids  # type: ignore
    return EncodedTexts(ids, second_start, (sequences.count(0), sequences.count(1)))


def check_contents(encoding: EncodedTexts) -> None:
    """Check that something is left of each text.

    Raises:
        DataError: a text has no token of its own.
    """
    if min(encoding.contents) < 1:
        raise DataError("text: the tokenizer leaves nothing of it; needs text with letters or signs", EMPTY_TEXT)


def _add_texts(
    chunk: Chunk,
    row: SourceRow,
    parsed: LabelledRow,
    targets: list[float],
    encoding: EncodedTexts,
    encoder: Encoder,
) -> None:
    """Add one encoded row to the chunk, shortened as `overlong` says, and count each of its tokens in the ledger."""
    options, label, ledger = encoder.options, encoder.labels[row.source], chunk.ledger
    length, room = len(encoding.input_ids), options.max_length - options.virtual_tokens
    chunk.lengths[length] += 1
    ledger.read(label, 1, 0, length)
    digest = hash_tokens(array("i", encoding.input_ids))
    if length > room:
        virtual = f" less {options.virtual_tokens} virtual tokens" if options.virtual_tokens else ""
        too_long = f"longer than max_length={options.max_length}{virtual}"
        if options.overlong == "error":
            raise DataError(
                f"{row.row.file}, row {row.row.number}: {length} tokens are {too_long}; raise it, or set overlong: "
                "drop or truncate."
            )
        # A text of which nothing would be left is dropped.
        special = length - sum(encoding.contents)
        if options.overlong != "truncate" or room < special + len(encoding.contents):
            ledger.count(label, f"dropped: {too_long}", 1, 0, length)
            return
        (encoding,) = encode_text_pairs([(parsed.text, parsed.text_pair)], encoder.tokenizer, room)
        ledger.count(label, f"cut: {too_long}", 0, 0, length - len(encoding.input_ids))

    ids = array("i", encoding.input_ids)
    chunk.part.add(ids, array("i", [IGNORED]) * len(ids), None, row.row.number, row.origin, digest)
    chunk.part.targets.extend(targets)
    if encoding.second_start is not None:
        chunk.part.second_start.append(encoding.second_start)
    ledger.count(label, TRAINED, 1, 0, len(ids))
