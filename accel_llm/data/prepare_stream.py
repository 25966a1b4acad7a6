"""Open texts as streams: only the first rows are read before the run, to show them and to know their sources."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from accel_llm.config.options import TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.config.text_options import with_text_column
from accel_llm.data.encode import A_CHAT, Encoder
from accel_llm.data.encoders import encode_rows, make_encoder
from accel_llm.data.file_lines import SourceFile
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.ledger import Ledger
from accel_llm.data.mixture import Turns
from accel_llm.data.prepare import CACHE_OPTIONS, EncodedData, encode_texts
from accel_llm.data.rows import ARRAYS, Origin, RowPart, Rows, as_rows
from accel_llm.data.source_notes import source_notes
from accel_llm.data.sources import DATASET_FILE, source_identity
from accel_llm.data.text_reader import StreamedFile, TextPlace, TextReader, streamed_files
from accel_llm.data.text_stream import BlockStart, StreamedRows, TextStream, append_rows
from accel_llm.errors import ConfigError, DataError

SAMPLE_PARTS = 4  # parts of each source that are read before the run
IDENTITY_BYTES = 1 << 16  # of the start and of the end of a file that is streamed


@dataclass(frozen=True)
class TextSources:
    """The sources of a run that are streamed, and what encodes their rows."""

    encoder: Encoder
    files: list[StreamedFile]
    weights: list[float | None]
    identity: str  # hash of what their rows are: the files, the tokenizer, and the options of the encoding
    largest_id: int  # of a token that the model knows

    def open_streams(
        self, options: TrainOptions, states: Sequence[dict[str, Any]]
    ) -> tuple[list[TextStream], Turns, StreamedRows]:
        """Open the streams, at the `states` of a checkpoint if there are some; return whose turn it is at each row, too.

        Sources with weights are a stream each, and take turns; otherwise all of them are one.

        Raises:
            ConfigError: the states are those of other files.
        """
        if any(state["identity"] != self.identity for state in states):
            raise ConfigError(
                "train_files: a stream goes on at a place in its files, but these are other files than those of the "
                "checkpoint, or they are encoded in another way; give the same, or resume_from_checkpoint: none."
            )
        mixed = len(self.weights) > 1 and None not in self.weights
        numbers: list[int | None] = [*range(len(self.weights))] if mixed else [None]
        starts = [BlockStart.from_dict(state) for state in states] or [BlockStart() for _ in numbers]
        streamed, serials = StreamedRows(), itertools.count()
        shared = self.encoder, options, self.files
        streams = [
            TextStream(*shared, number, streamed, serials, start, self.largest_id)
            for number, start in zip(numbers, starts, strict=True)
        ]
        return streams, Turns([weight or 1.0 for weight in self.weights] if mixed else [1.0]), streamed


def encode_stream(options: PretrainOptions, tokenizer: PreTrainedTokenizerFast, largest_id: int) -> EncodedData:
    """Open the training sources as streams of plain text; rows to evaluate on are encoded as a whole.

    A token id above `largest_id` that comes later is an error of the run.

    The training rows are the first ones of each source, with all `streamed` sources beside them; so is the ledger.

    Raises:
        DataError, ConfigError: as `encode_texts` does for these rows.
    """
    columns = with_text_column(options.columns, options.text_column)
    update = {"columns": columns, "data_format": options.data_format or "text"}
    encoder, sources, _ = make_encoder(options.model_copy(update=update), tokenizer, None, A_CHAT, None, None)
    files = streamed_files(sources)
    sample, ledger = _read_sample(encoder, files, len(sources))
    identity = _identity(encoder, files)
    weights = [source.weight for source in sources]
    rows = replace(sample, streamed=TextSources(encoder, files, weights, identity, largest_id))
    ledger.note(
        f"Streamed: the rows above are the first {sum(each['rows'] for each in ledger.inputs.values()):,}; the others are "
        "read, checked and counted while the run trains."
    )
    for note in itertools.chain.from_iterable(map(source_notes, sources)):
        ledger.note(note)
    return EncodedData(rows, _evaluation_rows(options, tokenizer), ledger, identity)


def _read_sample(encoder: Encoder, files: list[StreamedFile], sources: int) -> tuple[Rows, Ledger]:
    part, ledger = RowPart(), Ledger()
    for number in range(sources):
        own = [k for k, each in enumerate(files) if each.number == number]
        reader = TextReader([files[k] for k in own], own, None, TextPlace())
        for _ in range(SAMPLE_PARTS):
            rows, ended = reader.read_part()
            if rows:
                chunk = encode_rows(rows, encoder)
                append_rows(part, chunk.part)
                ledger.merge(chunk.ledger)
            if ended:
                break
    if not part.lengths:
        raise DataError("train_files: none of the first rows of the streamed sources is left to train on.")
    arrays = {name: np.array(getattr(part, name), kind) for name, kind in ARRAYS.items()}
    ledger.balance()
    return as_rows(arrays, [Origin(each.number, each.file.label) for each in files]), ledger


def _evaluation_rows(options: PretrainOptions, tokenizer: PreTrainedTokenizerFast) -> Rows | None:
    """Return the rows of `eval_files`, with the numbers that sources to evaluate on have."""
    if not options.eval_files:
        return None
    alone = options.model_copy(update={"train_files": options.eval_files, "eval_files": [], "limit_rows": None})
    rows = encode_texts(alone, options.seed, tokenizer, options.text_column).train
    return replace(rows, origins=tuple(Origin(-1 - origin.source, origin.file) for origin in rows.origins))


def _identity(encoder: Encoder, files: list[StreamedFile]) -> str:
    """Return a hash of what the rows are. Of a file its name, its size, and its start and end count, not all of it."""
    backend: Any = encoder.tokenizer.backend_tokenizer
    tokenization = backend.to_str(), sorted(encoder.tokenizer.special_tokens_map.items())
    values = [getattr(encoder.options, name) for name in CACHE_OPTIONS]
    parts = [(each.number, each.file.sample_by, _file_identity(each)) for each in files]
    return data_fingerprint(tokenization, values, encoder.formats, parts)


def _file_identity(each: StreamedFile) -> object:
    file: SourceFile = each.file
    if file.kind == DATASET_FILE:
        return source_identity(each.source)
    size = file.path.stat().st_size
    with file.path.open("rb") as stream:
        start = stream.read(IDENTITY_BYTES)
        stream.seek(max(0, size - IDENTITY_BYTES))
        return file.path.name, size, start, stream.read()
