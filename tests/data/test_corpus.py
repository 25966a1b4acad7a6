"""Prepared corpora: the same rows as the direct way, the same shards whatever the parts, after a kill, in any language."""

import csv
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import LENGTH, contents, corpus_options, make_texts, prepare, write_texts
from support import ROOT, character_tokenizer

from accel_llm.config.command_line import parse_options
from accel_llm.config.corpus_options import CorpusOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.corpus_build import prepare_part
from accel_llm.data.corpus_seal import seal_corpus
from accel_llm.data.corpus_shards import open_corpus, read_manifest
from accel_llm.data.prepare import encode_texts
from accel_llm.data.stream import Position, Stream
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError, DataError
from accel_llm.model.tokenizer import load_tokenizer

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def demo():
    return build_demo_tokenizer()


def run_options(files: list[Path], cache: Path, **more: object) -> PretrainOptions:
    values = {"config_name": "demo", "max_length": LENGTH, "overlong": "split", "packing": "static", "max_lost": 1.0}
    values |= {"train_files": list(map(str, files)), "cache_dir": str(cache), "num_train_epochs": 3.0}
    return PretrainOptions(**(values | more))  # type: ignore[arg-type]


def stream_rows(options: PretrainOptions, tokenizer) -> list[list[tuple]]:
    """Every packed row of a run, epoch after epoch: of each document its name, ids and labels."""
    data = encode_texts(options, options.seed, tokenizer, "text")
    stream = Stream(data.train, options, Position(), 0)
    rows = data.train
    return [
        [(rows.name(k), rows[k][0].tolist(), rows[k][1].tolist()) for k in stream.documents(position)]
        for position in range(stream.plan.total_rows or 0)
    ]


@pytest.mark.parametrize("packing", ["static", "per_epoch", None])
@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_a_prepared_corpus_trains_on_the_rows_of_the_direct_way(tmp_path, demo, packing, overlong):
    files = [write_texts(tmp_path / "a.jsonl", make_texts(150)), write_texts(tmp_path / "b.jsonl", make_texts(40, 1))]
    more = {"overlong": overlong}
    prepare(files, tmp_path / "corpus", demo, deduplicate="none", **more)
    direct, prepared = (
        stream_rows(run_options(names, tmp_path / "cache", packing=packing, **more), demo)
        for names in (files, [tmp_path / "corpus"])
    )
    assert len(direct) > 15 and direct == prepared
    assert any(len(row) > 1 for row in direct) == bool(packing)


def test_the_ledger_and_the_facts_of_the_rows_are_those_of_the_direct_way(tmp_path, demo):
    texts = [*make_texts(80), "", "  ", "ab"]
    file = write_texts(tmp_path / "a.jsonl", texts)
    more = {"on_bad_row": "drop"}
    prepare([file], tmp_path / "corpus", demo, deduplicate="none", **more)
    direct = encode_texts(run_options([file], tmp_path / "cache", **more), 42, demo, "text")
    prepared = encode_texts(run_options([tmp_path / "corpus"], tmp_path / "cache", **more), 42, demo, "text")
    assert prepared.ledger.to_dict() == direct.ledger.to_dict()
    assert prepared.train.trained_tokens == direct.train.trained_tokens > 0
    assert prepared.train.stored is not None
    order = prepared.train.stored.order
    for name in ("number", "digest", "lengths"):
        assert np.array_equal(getattr(prepared.train, name)[order], getattr(direct.train, name)), name
    assert int(prepared.train.input_ids.max()) == int(direct.train.input_ids.max())


@pytest.mark.parametrize("parts", [2, 8])
def test_the_shards_are_the_same_whatever_the_parts(tmp_path, demo, parts):
    big = write_texts(tmp_path / "a.jsonl", make_texts(4000))
    plain = tmp_path / "b.txt"
    plain.write_text("\n".join(text.replace("\n", " ") for text in make_texts(1500, 1)), encoding="utf-8")
    assert big.stat().st_size > 3 << 18  # more stretches than one
    one, many = prepare([big, plain], tmp_path / "one", demo), prepare([big, plain], tmp_path / "many", demo, parts)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert one.documents == many.documents < 5500  # duplicates went, also those of other parts


def test_every_character_comes_back(tmp_path, demo):
    """Decoded, the documents are the texts, at the borders of stretches and of rows, too."""
    texts = make_texts(3000)
    file = write_texts(tmp_path / "a.jsonl", texts)
    prepare([file], tmp_path / "corpus", demo, parts=3, deduplicate="none")
    rows = open_corpus(tmp_path / "corpus")
    assert rows.stored is not None
    documents: dict[int, list[int]] = {}
    for k in rows.stored.order.tolist():
        documents.setdefault(int(rows.number[k]), []).extend(rows[k][0].tolist())
    assert list(documents) == list(range(1, len(texts) + 1))
    lost = [n for n, ids in documents.items() if demo.decode(ids, skip_special_tokens=True) != texts[n - 1]]
    # A document of n whole rows and one token loses that token, its end, which would be a row that trains nothing.
    assert lost == []


def test_a_byte_order_mark_within_a_file_is_text(tmp_path, demo):
    lines = ["\ufeff" + f"line {k} " + "x" * 200 for k in range(3000)]
    file = tmp_path / "a.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    prepare([file], tmp_path / "corpus", demo, deduplicate="none", max_length=1024)
    rows = open_corpus(tmp_path / "corpus")
    assert rows.stored is not None
    decoded = [demo.decode(rows[k][0], skip_special_tokens=True) for k in rows.stored.order.tolist()]
    assert decoded == [lines[0].removeprefix("\ufeff"), *lines[1:]]  # the mark of the file, and no other


def test_a_second_run_encodes_nothing(tmp_path, demo, monkeypatch):
    file = write_texts(tmp_path / "a.jsonl", make_texts(100))
    options = corpus_options([file], tmp_path / "corpus")
    assert prepare_part(options, demo)[1] == 1
    before = seal_corpus([tmp_path / "corpus"], tmp_path / "corpus")
    first = contents(tmp_path / "corpus")
    monkeypatch.setattr("accel_llm.data.corpus_build.encode_piece", None)
    assert prepare_part(options, demo) == (1, 0)
    again = seal_corpus([tmp_path / "corpus"], tmp_path / "corpus")
    assert (before.new_shards, again.new_shards) == (1, 0) and contents(tmp_path / "corpus") == first


def test_what_is_left_out_is_in_the_ledger(tmp_path, demo):
    texts = [f"text {k}" for k in range(50)] + ["text 3", "text 3", "text 7"]
    prepare([write_texts(tmp_path / "a.jsonl", texts)], tmp_path / "corpus", demo)
    manifest = read_manifest(tmp_path / "corpus")
    (bins,) = manifest["ledger"]["bins"].values()
    assert {name: amount["rows"] for name, amount in bins.items()} == {"trained": 50, "removed: exact duplicate": 3}
    (total,) = manifest["ledger"]["inputs"].values()
    assert sum((Counter(amount) for amount in bins.values()), Counter()) == Counter(total)
    path = tmp_path / "a.jsonl"
    pairs = "; ".join(f"{path}, row {later} = {path}, row {first}" for later, first in ((51, 4), (52, 4), (53, 8)))
    assert manifest["ledger"]["notes"] == [f"Removed: exact duplicates, 3 in all: {pairs}"]


def test_parts_that_are_missing_or_do_not_belong_together_are_named(tmp_path, demo):
    file = write_texts(tmp_path / "a.jsonl", make_texts(60))
    out = tmp_path / "corpus"
    with pytest.raises(ConfigError, match=r"^folders: .*corpus holds no part; run `prepare.py corpus`"):
        seal_corpus([out], out)
    for number in (1, 3):
        prepare_part(corpus_options([file], out, part=f"{number}/{4}"), demo)
    with pytest.raises(ConfigError, match=r"lacks part 2/4, 4/4; prepare it"):
        seal_corpus([out], out)
    assert not (out / "corpus.json").exists() and not (out / "shards").exists()
    with pytest.raises(DataError, match=r"corpus holds parts of a corpus that is not sealed yet; run python launch/"):
        encode_texts(run_options([out], tmp_path / "cache"), 42, demo, "text")
    for number in (2, 4):
        prepare_part(corpus_options([file], out, part=f"{number}/{4}"), demo)
    seal_corpus([out], out)
    prepare_part(corpus_options([file], out, max_length=32), demo)
    with pytest.raises(ConfigError, match=r"holds parts of several corpora"):
        seal_corpus([out], out)


def test_parts_in_folders_of_their_own_are_sealed_into_another(tmp_path, demo):
    file = write_texts(tmp_path / "a.jsonl", make_texts(4000))
    folders = [tmp_path / f"part{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        prepare_part(corpus_options([file], folder, part=f"{number}/{3}"), demo)
    seal_corpus(folders, tmp_path / "sealed")
    prepare([file], tmp_path / "one", demo)
    assert contents(tmp_path / "sealed") == contents(tmp_path / "one")


def test_another_tokenizer_is_refused(tmp_path, demo):
    prepare([write_texts(tmp_path / "a.jsonl", make_texts(20))], tmp_path / "corpus", demo)
    with pytest.raises(ConfigError, match=r"^tokenizer_name: .* is not the tokenizer with which .*corpus was prepared"):
        encode_texts(run_options([tmp_path / "corpus"], tmp_path / "cache"), 42, character_tokenizer(), "text")


def test_a_bad_row_is_named_with_its_number_in_the_file(tmp_path, demo):
    texts = make_texts(4000)
    texts[3900] = "  "
    file = write_texts(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=rf"^{file}, row 3901: text: the text is empty"):
        prepare_part(corpus_options([file], tmp_path / "corpus"), demo)
    file.write_text(file.read_text(encoding="utf-8").replace('"text": "  "', '"text": '), encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{file}, line 3901: not JSON"):
        prepare_part(corpus_options([file], tmp_path / "corpus"), demo)


def test_shards_that_are_cut_off_or_gone_are_refused(tmp_path, demo):
    prepare([write_texts(tmp_path / "a.jsonl", make_texts(20))], tmp_path / "corpus", demo)
    shard = next((tmp_path / "corpus" / "shards").glob("tokens-*"))
    shutil.copy(shard, tmp_path / "whole")
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"tokens-\w+.bin: has [\d,]+ bytes, must have"):
        open_corpus(tmp_path / "corpus")
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_corpus(tmp_path / "corpus")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_part_that_was_killed_goes_on_and_makes_the_same_shards(tmp_path, demo, workers):
    """SIGKILL after the first pieces, again and again; what is on the disk then is whole and used."""
    file = write_texts(tmp_path / "a.jsonl", make_texts(8000))
    expected = prepare([file], tmp_path / "one", demo)
    out, counts = tmp_path / "killed", []
    for wanted in (1, 3):
        child = os.fork()
        if not child:
            try:
                prepare_part(corpus_options([file], out, preprocessing_num_workers=workers), demo)
            finally:
                os._exit(0)
        while len(pieces := list(out.glob("pieces/*/*.safetensors"))) < wanted:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts.append(len(pieces))
    total, new = prepare_part(corpus_options([file], out), demo)
    assert 1 <= counts[0] <= total - new and not (out / "corpus.json").exists()
    assert seal_corpus([out], out).documents == expected.documents
    assert contents(out) == contents(tmp_path / "one")


@pytest.mark.skipif(os.name == "nt", reason="needs process groups")
def test_ctrl_c_ends_all_workers_in_one_word(tmp_path, demo):
    file = write_texts(tmp_path / "a.jsonl", make_texts(60_000))
    demo.save_pretrained(tmp_path / "tokenizer")
    words = ["--tokenizer_name", tmp_path / "tokenizer", "--train_files", file, "--output_dir", tmp_path / "out"]
    words += ["--preprocessing_num_workers", 2, "--max_lost", 1]
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "corpus", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    while started.poll() is None and not list((tmp_path / "out").glob("pieces/*/*.safetensors")):
        time.sleep(0.005)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal sends it
    output = started.communicate()[0]
    assert started.returncode == 130, output
    assert "Traceback" not in output and output.rstrip().endswith("interrupted")
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_workers_make_the_same_pieces(tmp_path, demo):
    file = write_texts(tmp_path / "a.jsonl", make_texts(4000))
    prepare([file], tmp_path / "one", demo)
    prepare([file], tmp_path / "two", demo, preprocessing_num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_bad_row_in_a_worker_process_stops_the_part(tmp_path, demo):
    texts = make_texts(4000)
    texts[3900] = "  "
    file = write_texts(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=rf"^{file}, row 3901: text: the text is empty"):
        prepare_part(corpus_options([file], tmp_path / "corpus", preprocessing_num_workers=2), demo)
    assert multiprocessing.active_children() == []


def test_every_kind_of_file_is_prepared_as_the_direct_way_reads_it(tmp_path, demo):
    texts = make_texts(60)
    rows = [{"text": text} for text in texts]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with (tmp_path / "c.csv").open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([["text"], *([text] for text in texts)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    files = [tmp_path / name for name in ("a.json", "b.jsonl.gz", "c.csv", "d.parquet", "saved")]
    prepare(files, tmp_path / "corpus", demo, parts=2, deduplicate="none")
    direct, prepared = (
        stream_rows(run_options(names, tmp_path / "cache"), demo) for names in (files, [tmp_path / "corpus"])
    )
    assert len(direct) > 30 and direct == prepared


def test_several_corpora_are_mixed_by_weight_and_evaluated(tmp_path, demo):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        prepare([write_texts(tmp_path / f"{name}.jsonl", make_texts(60, seed))], tmp_path / name, demo)
    weighted = [{"path": str(tmp_path / "a"), "weight": 3}, {"path": str(tmp_path / "b"), "weight": 1}]
    for train in (weighted, [str(tmp_path / "a"), str(tmp_path / "b")]):
        options = run_options([], tmp_path / "cache", train_files=train, eval_files=[str(tmp_path / "c")])
        data = encode_texts(options, 42, demo, "text")
        assert data.eval is not None and set(data.eval.source) == {-1}
        separate = [open_corpus(tmp_path / name) for name in ("a", "b")]
        assert [data.train[k][0].tolist() for k in range(len(data.train))] == [
            rows[k][0].tolist() for rows in separate for k in range(len(rows))
        ]
        stream = Stream(data.train, options, Position(), 0)
        seen = [k for position in range(stream.plan.bins) for k in stream.documents(position)]
        assert set(seen) == set(range(len(data.train)))
        share = np.mean(data.train.source[seen] == 0)
        assert share == pytest.approx(0.75, abs=0.01) if train is weighted else len(seen) == len(data.train)


def test_other_scripts_read_a_corpus_as_rows_of_token_ids(tmp_path, demo, script, tiny, capsys):
    prepare([write_texts(tmp_path / "a.jsonl", ["one two", "three"])], tmp_path / "corpus", demo)
    script("show_data", "--tokenizer_name", tiny, "--train_files", tmp_path / "corpus", "--json", "--max_length", 64)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"].split("<")[0] for row in shown] == ["one two", "three"]


def test_pretraining_on_a_corpus_has_the_losses_of_the_direct_way(tmp_path, script, capsys):
    file = write_texts(tmp_path / "a.jsonl", make_texts(60))
    words = ("prepare", "corpus", "--tokenizer_name", ROOT / "accel_llm" / "demo_base", "--train_files", file)
    script(*words, "--max_length", 64, "--output_dir", tmp_path / "corpus", "--deduplicate", "none", "--max_lost", 1)
    assert "packed rows that are" in capsys.readouterr().out
    losses = []
    for name, source in (("direct", file), ("prepared", tmp_path / "corpus")):
        more = ("--max_length", 64, "--packing", "static", "--max_lost", 1) if name == "direct" else ()
        model = ("--config_name", "demo", "--max_steps", 4, "--logging_steps", 1, "--output_dir", tmp_path / name)
        script("pretrain", *model, "--train_files", source, *more)
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert len(losses[0]) == 4 and losses[0] == losses[1]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_chinese_documents_lose_no_character(tmp_path):
    """alpaca_zh and BELLE as texts, cut into short rows by 8 parts; decoded they are what they were."""
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "qwen3"))
    rows = json.loads((SHARED / "instruct" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
    belle = (SHARED / "instruct" / "belle_format_from_sharegpt_zh_100.jsonl").read_text(encoding="utf-8").splitlines()
    texts += ["\n".join(turn["value"] for turn in json.loads(line)["conversations"]) for line in belle]
    texts = [unicodedata.normalize("NFC", text) for text in texts]  # as the tokenizer does
    file = write_texts(tmp_path / "a.jsonl", texts)
    prepare([file], tmp_path / "corpus", tokenizer, parts=8, deduplicate="none", max_length=128)
    prepare([file], tmp_path / "one", tokenizer, deduplicate="none", max_length=128)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "one")
    rows = open_corpus(tmp_path / "corpus")
    assert rows.stored is not None
    documents: dict[int, list[int]] = {}
    for k in rows.stored.order.tolist():
        documents.setdefault(int(rows.number[k]), []).extend(rows[k][0].tolist())
    decoded = {number: tokenizer.decode(ids).removesuffix(tokenizer.eos_token) for number, ids in documents.items()}
    assert len(texts) > 1000 and decoded == dict(enumerate(texts, 1))


def test_a_corpus_is_mixed_with_files_and_limited_like_other_rows_of_token_ids(tmp_path, demo):
    texts = make_texts(40)
    prepare([write_texts(tmp_path / "a.jsonl", texts)], tmp_path / "corpus", demo, deduplicate="none", max_length=2048)
    other = write_texts(tmp_path / "b.jsonl", make_texts(20, 1))
    for more in ({}, {"limit_rows": 30}, {"max_length": 32}, {"eval_share": 0.3}):
        direct, prepared = (
            encode_texts(run_options([first, other], tmp_path / "cache", max_length=512, **more), 42, demo, "text")
            if "max_length" not in more
            else encode_texts(run_options([first], tmp_path / "cache", **more), 42, demo, "text")
            for first in (tmp_path / "a.jsonl", tmp_path / "corpus")
        )
        assert np.array_equal(direct.train.input_ids, prepared.train.input_ids)
        assert np.array_equal(direct.train.offsets, prepared.train.offsets)


def test_what_has_no_meaning_for_a_corpus_is_refused(tmp_path):
    words = ["--tokenizer_name", "t", "--output_dir", "o", "--train_files", "a.txt", "{path: b.txt, weight: 2}"]
    words += ["--packing", "static", "--part", "9/8", "--fim_spm_rate", "0.1"]
    with pytest.raises(ConfigError) as error:
        parse_options(CorpusOptions, words, CorpusOptions.script_defaults)
    told = str(error.value)
    for sentence in (
        "part: '9/8' is no part; give number/count, such as 3/64, with a number from 1 to the count.",
        "packing: it has no meaning for a prepared corpus;",
        "fim_spm_rate: it is a share of the documents of fim_rate, which is 0;",
        "train_files: a source has a weight,",
    ):
        assert sentence in told


def test_sealing_anew_leaves_no_old_shards(tmp_path, demo):
    file = write_texts(tmp_path / "a.jsonl", make_texts(30))
    prepare([file], tmp_path / "corpus", demo)
    first = contents(tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "parts")
    prepare([file], tmp_path / "corpus", demo, seed=7)
    names = {path.name for path in (tmp_path / "corpus" / "shards").iterdir()}
    assert len(names) == len(first) - 1 and names != first.keys() - {"corpus.json"}
