"""Prepares one part of a corpus: encodes its pieces, in several processes, and lists them.

Every piece is a file that is named by its content and appears whole. So a part that was killed goes on where it was, two
parts never wait for each other, and what was encoded once is found again.
"""

import itertools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from accel_llm.config.corpus_options import CorpusOptions
from accel_llm.config.fields import DataFormat, Source
from accel_llm.config.text_options import with_text_column
from accel_llm.data.chunk_tokenizer import ChunkTokenizer
from accel_llm.data.contamination import EvaluationNgrams
from accel_llm.data.corpus_encode import CorpusEncoder, encode_piece, tokenizer_fingerprint
from accel_llm.data.corpus_parts import PieceEntry, piece_path, write_part_list, write_piece
from accel_llm.data.corpus_stretches import Stretch, count_before, list_stretches, read_pieces, stretches_of_part
from accel_llm.data.fill_in_the_middle import FillInTheMiddle, find_fim_tokens
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.near_duplicates import import_rensa
from accel_llm.data.source_notes import source_notes
from accel_llm.data.sources import as_source, problems_of_sources
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.system.progress import Bar

PIECE_VERSION = 1  # raise it with every change of the encoding, so that no old piece is used
# Options that change what is in a piece, beside tokenizer and text; and those that sealing needs.
PIECE_OPTIONS = ("max_length", "overlong", "on_bad_row")
SEAL_OPTIONS = ("max_length", "overlong", "deduplicate", "near_duplicate_threshold", "seed", "max_lost")


@dataclass(frozen=True)
class _Job:
    """What every worker process knows."""

    folder: Path
    sources: list[Source]
    encoder: CorpusEncoder
    key: str  # of everything that changes a piece, but for its text


def check_sources(options: CorpusOptions) -> None:
    """Check that the sources exist and are of a known kind. Nothing is read or downloaded.

    Raises:
        ConfigError: some are not. It lists all problems.
    """
    compared = problems_of_sources("decontaminate_files", options.decontaminate_files)
    raise_problems(problems_of_sources("train_files", options.train_files) + compared)


def prepare_part(options: CorpusOptions, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Encode the pieces of the part that the options name, but for those that are there; return (pieces, new ones).

    Raises:
        DataError: a source cannot be read, or a row is bad.
        ConfigError: a worker process was killed.
    """
    sources = [as_source(place) for place in options.train_files]
    columns = with_text_column(options.columns, options.text_column)
    formats: list[tuple[DataFormat | None, dict[str, str]]]
    formats = [(source.data_format or options.data_format, {**columns, **source.columns}) for source in sources]
    encoder = CorpusEncoder(
        options,
        tokenizer,
        [source.label for source in sources],
        formats,
        ChunkTokenizer(tokenizer),
        _fill_in_the_middle(options, tokenizer),
        _evaluation_ngrams(options),
        options.deduplicate == "near",
    )
    signs = encoder.signs and import_rensa() and version("rensa")
    versions = PIECE_VERSION, transformers.__version__, tokenizers.__version__
    values = [getattr(options, name) for name in PIECE_OPTIONS]
    tokenizer_key = tokenizer_fingerprint(tokenizer)
    evaluation_key = encoder.evaluation and encoder.evaluation.fingerprint
    key = data_fingerprint(versions, tokenizer_key, values, encoder.middle, evaluation_key, signs)
    stretches = list_stretches(sources)
    job = _Job(Path(options.output_dir), sources, encoder, key)

    entries, new = [], 0
    mine = stretches_of_part(stretches, options.share)
    with Bar(f"bytes of part {options.part}", sum(stretch.size for stretch in mine)) as bar:
        for size, found, written in _encode_all(job, mine, options.preprocessing_num_workers or _count_cores()):
            entries += found
            new += written
            bar.update(bar.done + size)
    write_part_list(job.folder, options.part, _plan(options, encoder, tokenizer_key, key, stretches), entries)
    return len(entries), new


def _fill_in_the_middle(options: CorpusOptions, tokenizer: PreTrainedTokenizerFast) -> FillInTheMiddle | None:
    if not options.fim_rate:
        return None
    return FillInTheMiddle(find_fim_tokens(tokenizer), options.fim_rate, options.fim_spm_rate, options.seed)


def _evaluation_ngrams(options: CorpusOptions) -> EvaluationNgrams | None:
    if not options.decontaminate_files:
        return None
    return EvaluationNgrams([as_source(place) for place in options.decontaminate_files], options.decontaminate_ngram)


def _notes(encoder: CorpusEncoder, sources: list[Source]) -> list[str]:
    """Return what the ledger says beside its numbers."""
    notes = list(itertools.chain.from_iterable(map(source_notes, sources)))
    if encoder.evaluation and encoder.evaluation.short_texts:
        short, ngram = encoder.evaluation.short_texts, encoder.evaluation.ngram
        notes.append(f"decontaminate_files: {short:,} texts with fewer than {ngram} words are compared with nothing.")
    return notes


def _plan(
    options: CorpusOptions, encoder: CorpusEncoder, tokenizer_key: str, key: str, stretches: list[Stretch]
) -> dict[str, Any]:
    """Return what is the same for all parts of a corpus, and what sealing must know."""
    sources = [as_source(place) for place in options.train_files]
    settings = {name: getattr(options, name) for name in SEAL_OPTIONS}
    places = [(stretch.source, stretch.number, stretch.span, stretch.size) for stretch in stretches]
    names = {}
    for stretch in stretches:
        names[f"{stretch.source} {stretch.number}"] = (
            stretch.file.label if stretch.file else encoder.labels[stretch.source]
        )
    plan = {
        "settings": settings,
        "tokenizer": tokenizer_key,
        "tokenizer_name": options.tokenizer_name,
        "labels": encoder.labels,
        "notes": _notes(encoder, sources),
    }
    return {"key": data_fingerprint(key, repr(plan), places, sorted(names.items())), **plan}


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Encoded = tuple[int, list[PieceEntry], int]  # bytes of a stretch, its pieces, and how many of them are new


def _encode_stretch(job: _Job, stretch: Stretch) -> Encoded:
    entries, new = [], 0
    source = job.sources[stretch.source]
    key = data_fingerprint(job.key, job.encoder.formats[stretch.source])
    for piece in read_pieces(stretch, source, key):
        name = stretch.file.label if stretch.file else source.label
        start = stretch.span[0] if stretch.span else 0
        entries.append(PieceEntry(stretch.source, stretch.number, start, piece.index, piece.address, name))
        if not piece_path(job.folder, piece.address).is_file():
            try:
                encoded = encode_piece(piece.rows, stretch.source, job.encoder)
            except DataError as error:
                raise _with_row_of_file(error, stretch) from None
            write_piece(job.folder, piece.address, encoded)
            new += 1
    return stretch.size, entries, new


def _with_row_of_file(error: DataError, stretch: Stretch) -> DataError:
    """Return the error of a row with its number in the file: in a span rows are counted from where it begins."""
    if not stretch.file or not stretch.span or not stretch.span[0]:
        return error
    before, comma, rest = str(error).partition(f"{stretch.file.label}, row ")
    number, colon, message = rest.partition(":")
    if not number.isdigit():
        return error
    _, rows = count_before(stretch.file.path, stretch.span[0])
    return DataError(f"{before}{comma}{rows + int(number)}{colon}{message}", error.reason)


def _encode_all(job: _Job, stretches: list[Stretch], workers: int) -> Iterator[Encoded]:
    """Encode stretches in this process or in worker processes; the results come in any order."""
    if min(workers, len(stretches)) <= 1:
        yield from (_encode_stretch(job, stretch) for stretch in stretches)
        return
    # The threads of the tokenizer would be more than the cores, and do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # This process has no threads and no process group, so a fork is safe; it spares the imports.
    context: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    # The largest first, so that no process is left alone with one at the end.
    queue = sorted(stretches, key=lambda stretch: -stretch.size)
    taken = context.Value("q", 0)
    connections, processes = [], []
    for _ in range(min(workers, len(stretches))):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, queue, taken, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    try:
        yield from _collect(connections)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collect(connections: list[Connection]) -> Iterator[Encoded]:
    """Yield what the worker processes send until each has sent None."""
    while connections:
        for connection in wait(connections):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except EOFError:
                raise ConfigError(
                    "preprocessing_num_workers: a worker was killed, probably because memory ran out; give fewer workers."
                ) from None
            if isinstance(result, Exception):
                raise result
            if result is None:
                connections.remove(connection)
            else:
                yield result


def _work(job: _Job, stretches: list[Stretch], taken: Any, connection: Connection, parent: int) -> None:
    """Encode one stretch after the other, each time the next that no other worker has taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the workers
    try:
        while os.getppid() == parent:  # a worker whose parent was killed ends
            with taken.get_lock():
                index = taken.value
                taken.value += 1
            if index >= len(stretches):
                break
            connection.send(_encode_stretch(job, stretches[index]))
        connection.send(None)
    except (ConfigError, DataError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
