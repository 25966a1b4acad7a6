"""Streamed texts: the rows of materialised ones bit for bit, full rows, and the same rows on from any checkpoint."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import character_tokenizer

import accel_llm.data.text_reader as text_reader
import accel_llm.data.text_stream as text_stream
from accel_llm.config.fields import Source
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.encode import SourceRow
from accel_llm.data.file_lines import ReadingPlace
from accel_llm.data.prepare import encode_texts
from accel_llm.data.prepare_stream import encode_stream
from accel_llm.data.rows import Rows
from accel_llm.data.sources import files_to_read, read_file
from accel_llm.data.stream import Position, Stream
from accel_llm.errors import DataError

TOKENIZER = character_tokenizer()
DATA = Path(__file__).parents[3] / "shared" / "data"
LARGEST = 10**6
WORDS = ["one", 'quoted "word"', "two, three", "a\ttab", "x" * 30]


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of all lengths, most of them short; the first words say which text it is."""
    lengths = np.minimum(np.random.default_rng(seed).lognormal(2.5, 1, count).astype(int) + 1, 300)
    return [
        f"{seed}.{k} " + "".join(WORDS[k % 5][i % len(WORDS[k % 5])] for i in range(n)) for k, n in enumerate(lengths)
    ]


def write(folder: Path, kind: str, rows: list[str]) -> Path:
    """Write rows as a source of some kind."""
    folder.mkdir(exist_ok=True)
    path = folder / f"texts{kind}"
    objects = [{"text": row} for row in rows]
    if kind == ".txt":
        path.write_text("\ufeff" + "\n\n".join(rows) + "\n", encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in objects), encoding="utf-8")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in objects).encode()))
    elif kind == ".json":
        path.write_text(json.dumps(objects), encoding="utf-8")
    elif kind == ".csv":
        cells = "".join('"' + row.replace('"', '""').replace(".", ".\n", 1) + '"\n' for row in rows)
        path.write_text("text\n" + cells, encoding="utf-8")
    elif kind == ".tsv":
        path.write_text("text\tother\n" + "".join(row.replace("\t", " ").replace('"', "") + "\tz\n" for row in rows))
    elif kind == ".parquet":
        pq.write_table(pa.table({"text": rows}), path, row_group_size=70)
    elif kind == "":
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(path))
    return path


KINDS = [".txt", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_on_from_behind_any_row(tmp_path, kind):
    source = Source(path=str(write(tmp_path, kind, texts(150))))
    (file,) = files_to_read(source)
    place = ReadingPlace()
    rows, places = [], []
    for row in read_file(source, file, place):
        rows.append(row)
        places.append(ReadingPlace(**vars(place)))
    assert len(rows) == 150 and [row.number for row in rows] == list(range(1, 151))
    for k in (0, 1, 63, 69, 70, 71, 148, 149):
        assert list(read_file(source, file, ReadingPlace(**vars(places[k])))) == rows[k + 1 :]


def test_a_bad_line_is_named_by_its_number_wherever_reading_began(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": \n', encoding="utf-8")
    source = Source(path=str(path))
    place = ReadingPlace()
    next(read_file(source, files_to_read(source)[0], place))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: not JSON"):
        list(read_file(source, files_to_read(source)[0], place))


def options(files: Iterable[Any], **more: Any) -> PretrainOptions:
    values = {"config_name": "x", "train_files": list(files), "max_length": 64, "overlong": "split", "max_steps": 1000}
    return PretrainOptions(**values | {"streaming": True} | more)


def open_stream(options: PretrainOptions, start: Position | None = None) -> Stream:
    rows = encode_stream(options, TOKENIZER, LARGEST).train
    return Stream(rows, options, start or Position(), 0)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(a, right[k]) if isinstance(a, torch.Tensor) else a == right[k] for k, a in left.items())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_batches_are_those_of_materialised_rows_bit_for_bit(tmp_path, monkeypatch, kind, packing):
    monkeypatch.setattr(text_stream, "BUFFER_ROWS", 7)
    files = [str(write(tmp_path / name, kind, texts(150, seed))) for seed, name in enumerate("ab")]
    chosen = options(
        files, order="source", packing=packing, per_device_train_batch_size=3, cache_dir=str(tmp_path / "c")
    )
    materialised = encode_texts(chosen, 0, TOKENIZER, "text").train
    expected = Stream(materialised, chosen.model_copy(update={"streaming": False}), Position(), 0)
    streamed = open_stream(chosen)
    steps = -(-2 * expected.plan.bins // 3) + 2  # two epochs and more
    pairs = zip(islice(streamed.batches(), steps), islice(expected.batches(), steps), strict=True)
    assert all(same(left, right) for left, right in pairs)


def test_a_shuffled_epoch_has_every_document_as_it_is_materialised(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "BUFFER_ROWS", 16)
    path = str(write(tmp_path, ".txt", texts(400)))
    chosen = options([path], cache_dir=str(tmp_path / "c"))
    materialised = encode_texts(chosen, 0, TOKENIZER, "text").train
    stream = open_stream(chosen)
    met: Counter[tuple[int, ...]] = Counter()
    position = 0
    while stream.sequences[0].epoch(position) < 3:
        assert isinstance(position, int)
        met.update(tuple(stream.rows[k][0].tolist()) for k in stream.documents(position))
        position += 1
    expected = Counter(tuple(materialised[k][0].tolist()) for k in range(len(materialised)))
    # Three epochs, but for the documents that wait in the buffer and those of the epoch that has begun.
    assert set(met) == set(expected)
    assert sum(3 * expected[k] - met[k] for k in expected) <= 16 * 8
    assert all(3 * expected[k] - 1 * expected[k] <= met[k] <= 4 * expected[k] for k in expected)


def fill(stream: Stream, rows: int) -> float:
    tokens = [int(stream._lengths_of(stream.documents(position)).sum()) for position in range(rows)]
    return sum(tokens) / (rows * stream.options.max_length)


@pytest.mark.parametrize("length", [256, 1024])
def test_rows_of_a_long_tailed_corpus_are_nearly_full(tmp_path, length):
    lengths = np.random.default_rng(0).lognormal(np.log(length) - 2, 1.5, 3000).astype(int) + 1
    path = tmp_path / "long.txt"
    path.write_text("\n".join("y" * n for n in lengths), encoding="utf-8")
    share = fill(open_stream(options([str(path)], max_length=length)), 1000)
    in_order = fill(open_stream(options([str(path)], max_length=length, order="source")), 1000)
    print(f"rows of {length}: {share:.2%} full through the buffer, {in_order:.2%} one after the other")
    assert share >= 0.995 > 0.95 > in_order


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_rows_of_real_text_are_nearly_full():
    for name, length in (("tinystories.txt", 2048), ("c4_demo.jsonl", 1024)):
        share = fill(open_stream(options([str(DATA / "pretrain" / name)], max_length=length)), 600)
        print(f"{name}, rows of {length}: {share:.2%} full")
        assert share >= 0.995


def step_rows(ranks: list[Stream], step: int) -> list[str]:
    """What a step trains, whichever process trains it: the ids of each document."""
    documents = [k for s in ranks for micro in range(s.accumulation) for k in s.row_indices(step, micro, s.rank)]
    by_rank = [s for s in ranks for micro in range(s.accumulation) for _ in s.row_indices(step, micro, s.rank)]
    return sorted(f"{s.rows.name(k)}: {s.rows[k][0].tolist()}" for s, k in zip(by_rank, documents, strict=True))


def go_on(streams: list[Stream], steps: int) -> None:
    """Make the batches of some steps on every process, as a run does."""
    for stream in streams:
        for _ in islice(stream.batches(stream.plan.first_step), steps * stream.accumulation):
            pass


@pytest.mark.parametrize(
    "order, weights", [("shuffle", (None, None)), ("source", (None, None)), ("shuffle", (0.75, 0.25))]
)
def test_a_run_goes_on_with_the_same_rows_on_any_processes(tmp_path, monkeypatch, weights, order):
    monkeypatch.setattr(text_stream, "BUFFER_ROWS", 9)
    files = [
        write(tmp_path / name, kind, texts(120, k)) for k, (name, kind) in enumerate([("a", ".csv"), ("b", ".txt")])
    ]
    sources = [Source(path=str(file), weight=weight) for file, weight in zip(files, weights, strict=True)]
    chosen = options(sources, order=order, total_batch_size=12)

    def ranks(world: int, **start: Any) -> list[Stream]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return [open_stream(chosen, Position(rank=rank, world=world, **start)) for rank in range(world)]

    whole = ranks(1)
    expected = []
    for step in range(30):
        expected.append(step_rows(whole, step))
    for stopped, (before, after) in ((7, (1, 3)), (18, (2, 1)), (23, (3, 2))):
        first = ranks(before)
        go_on(first, stopped)
        assert [first[0].states(stopped)] * before == [each.states(stopped) for each in first]
        kept = json.loads(json.dumps(first[0].states(stopped)))  # as in state.json
        second = ranks(after, step=stopped, rows=first[0].plan.rows_at(stopped), streams=kept)
        assert [step_rows(second, step) for step in range(stopped, stopped + 6)] == expected[stopped : stopped + 6]


def test_the_first_epoch_names_documents_of_every_stream(tmp_path):
    files = [write(tmp_path, kind, texts(300, seed)) for seed, kind in enumerate((".jsonl", ".txt"))]
    sources = [{"path": str(file), "weight": 0.5} for file in files]
    stream = open_stream(options(sources))
    bins, lengths = stream.first_epoch()  # numbers of the second stream are beyond 32 bits
    assert max(bins.order) >= 2**32
    assert [len(stream.rows[int(k)][0]) for k in bins.order] == lengths.tolist()


def test_a_restart_reads_one_block_however_far_the_run_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "BUFFER_ROWS", 16)
    path = str(write(tmp_path, ".txt", texts(20_000)))
    chosen = options([path])
    stream = open_stream(chosen)
    states = {}
    for step in range(2000):
        stream.documents(step)
        stream.sequences[0].forget_before(step - 4)
        if step in (20, 1900):
            states[step] = stream.states(step)
    assert len(stream.rows.blocks) <= 2  # type: ignore[union-attr]
    assert states[1900][0]["place"]["place"]["row"] > 16 * 100
    read: list[SourceRow] = []
    honest = text_reader.TextReader.read_part

    def counted(self: text_reader.TextReader) -> tuple[list[SourceRow], bool]:
        rows, ended = honest(self)
        read.extend(rows)
        return rows, ended

    rows = encode_stream(chosen, TOKENIZER, LARGEST).train
    monkeypatch.setattr(text_reader.TextReader, "read_part", counted)
    counts = []
    for step, state in states.items():
        read.clear()
        again = Stream(rows, chosen, Position(step=step, rows=step, streams=state), 0)
        documents = [again.rows[k][0].tolist() for k in again.documents(step)]
        again.sequences[0].first_round()
        counts.append(len(read))
        assert documents
    # A block, and the next one that is made meanwhile.
    assert max(counts) < 2.5 * 16 * 64 / np.mean([len(text) for text in texts(20_000)]) + 3 * 64


def test_the_ledger_counts_what_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "BUFFER_ROWS", 8)
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text} if k % 50 else {"text": ""}) for k, text in enumerate(texts(500))]
    path.write_text("\n".join(lines), encoding="utf-8")
    chosen = options([str(path)], on_bad_row="drop", max_lost=0.5)
    stream = open_stream(chosen)
    for position in range(100):
        stream.documents(position)
    ledger = stream.sequences[0].ledger(100)  # type: ignore[union-attr]
    ledger.balance()
    (bins,) = ledger.bins.values()
    (amount,) = ledger.inputs.values()
    assert amount["rows"] > 200 and sum(each["rows"] for name, each in bins.items() if "dropped" in name) >= 4


def test_bad_streams_are_refused(tmp_path):
    path = str(write(tmp_path, ".txt", texts(5)))
    values = {"config_name": "x", "train_files": [path], "streaming": True}
    found = PretrainOptions(**values, eval_share=0.1, limit_rows=3, order="length", packing="static").problems()
    names = {problem.split(":")[0] for problem in found}
    assert {"max_steps", "eval_share", "limit_rows", "order", "packing"} <= names
    assert not PretrainOptions(**values, max_steps=3).problems()
    with pytest.raises(DataError, match=r"holds token id .*, but the model's vocabulary ends with 10"):
        Stream(encode_stream(options([path]), TOKENIZER, 10).train, options([path]), Position(), 0).documents(0)
    empty = tmp_path / "short.jsonl"
    empty.write_text('{"text": "abc"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="standard input, and a run could not go on reading it"):
        open_stream(options(["-"]))
    chosen = options([str(empty)], max_length=2, overlong="drop", max_lost=1)
    with pytest.raises(DataError, match="none of the first rows"):
        open_stream(chosen)


def test_limit_rows_of_a_source_holds_in_each_epoch(tmp_path):
    paths = [str(write(tmp_path / name, ".txt", texts(100, k))) for k, name in enumerate("ab")]
    sources = [Source(path=paths[0], limit_rows=10), Source(path=paths[1])]
    stream = open_stream(options(sources, order="source", packing=False))
    names = [stream.rows.name(stream.documents(position)[0]) for position in range(250)]
    assert {name for name in names if name.startswith(paths[0])} == {f"{paths[0]}, row {k}" for k in range(1, 11)}
    assert len({name for name in names if name.startswith(paths[1])}) == 100


def test_rows_are_a_sample_of_each_source(tmp_path):
    paths = [str(write(tmp_path / name, ".txt", texts(1000, k))) for k, name in enumerate("ab")]
    data = encode_stream(options(paths), TOKENIZER, LARGEST)
    assert isinstance(data.train, Rows) and set(data.train.source.tolist()) == {0, 1}
    assert sum(amount["rows"] for amount in data.ledger.inputs.values()) == 512
    other = encode_stream(options(paths[::-1]), TOKENIZER, LARGEST)
    assert data.fingerprint == encode_stream(options(paths), TOKENIZER, LARGEST).fingerprint != other.fingerprint
