"""What a row of a .txt file is: as `datasets` divides texts, with no character lost, from any place on, in every script."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_llm.config.command_line import parse_options
from accel_llm.config.corpus_options import CorpusOptions, CorpusPart
from accel_llm.config.fields import Source
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.corpus_stretches import list_stretches, stretches_of_part
from accel_llm.data.file_lines import ReadingPlace
from accel_llm.data.prepare import encode_texts
from accel_llm.data.readers import read_rows
from accel_llm.data.source_notes import source_notes
from accel_llm.data.sources import read_source, source_files, source_identity

SHARED = ROOT.parent / "shared" / "data" / "pretrain"
TEXT = "\nOne\ntwo\n\n\n\n中文 three\nfour\n \nfive\n\nsix"
KINDS = ["line", "paragraph", "document"]


def texts_of(path: Path, sample_by: str | None) -> list[str]:
    return [row.fields["text"] for row in read_source(Source(path=str(path), sample_by=sample_by))]


def texts_of_datasets(path: Path, sample_by: str, cache: Path) -> list[str]:
    """Return the texts that `datasets` has, but for those without a letter, and without line breaks at their end."""
    rows = datasets.load_dataset("text", data_files=str(path), sample_by=sample_by, split="train", cache_dir=str(cache))
    texts = [row["text"] for row in rows]
    return [text if sample_by == "document" else text.strip("\n") for text in texts if text.strip()]


@pytest.mark.parametrize("sample_by", KINDS)
def test_texts_are_those_of_datasets(tmp_path, sample_by):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    files = [path, *([SHARED / "tinystories.txt", SHARED / "wiki_demo.txt"] if SHARED.is_dir() else [])]
    for file in files:
        assert texts_of(file, sample_by) == texts_of_datasets(file, sample_by, tmp_path / "cache")


def test_a_line_is_the_default_and_the_ledger_says_so(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert texts_of(path, None) == texts_of(path, "line")
    (note,) = source_notes(Source(path=str(path)))
    assert note.startswith(f"{path}: each line of a .txt file is a document;")
    assert source_notes(Source(path=str(path), sample_by="line")) == []
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert source_notes(Source(path=str(tmp_path / "a.jsonl"))) == []


@pytest.mark.parametrize("sample_by", KINDS)
def test_reading_goes_on_from_any_place(tmp_path, sample_by):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    (file,) = source_files(Source(path=str(path), sample_by=sample_by))
    every = list(read_rows(file))
    place, places = ReadingPlace(), []
    for _ in read_rows(file, place=place):
        places.append(ReadingPlace(place.offset, place.line, place.row))
    for k, later in enumerate(places):
        assert list(read_rows(file, place=later)) == every[k + 1 :]


def test_another_division_is_another_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    identities = [source_identity(Source(path=str(path), sample_by=sample_by)) for sample_by in (None, *KINDS)]
    assert identities[0] == identities[1]
    assert len({str(identity) for identity in identities}) == 3


def test_the_option_holds_for_sources_that_have_none_of_their_own():
    own = '{"path": "b.txt", "sample_by": "line"}'
    words = ["--config_name", "llama", "--train_files", "a.txt", own, "--sample_by", "paragraph"]
    options = parse_options(PretrainOptions, [*words, "--eval_files", "c.txt"])
    assert [source.sample_by for source in options.train_files] == ["paragraph", "line"]
    assert [source.sample_by for source in options.eval_files] == ["paragraph"]
    words = ["--tokenizer_name", "x", "--train_files", "a.txt", "--output_dir", "y", "--sample_by", "document"]
    assert parse_options(CorpusOptions, words).train_files == [Source(path="a.txt", sample_by="document")]


def test_a_text_of_paragraphs_is_not_cut_by_parts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n" * 100_000, encoding="utf-8")
    by_lines = list_stretches([Source(path=str(path))])
    assert len(by_lines) > 1  # several parts share the lines of a file
    whole = list_stretches([Source(path=str(path), sample_by="paragraph")])
    assert len(whole) == 1 and whole[0].span is None
    assert sum(len(stretches_of_part(whole, CorpusPart(k, 4))) for k in range(1, 5)) == 1


def test_a_whole_file_is_encoded_without_a_lost_character(tmp_path, tiny):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    options = PretrainOptions(
        config_name="llama",
        train_files=[str(path)],
        sample_by="document",
        max_length=8,
        overlong="split",
        max_lost=1,  # the first token of each row has nothing before it
        cache_dir=str(tmp_path / "cache"),
    )
    rows = encode_texts(options, 0, tokenizer, "text").train
    ids = [int(k) for row in range(len(rows)) for k in rows[row][0]]
    assert len(rows) > 3
    assert tokenizer.decode([k for k in ids if k != tokenizer.eos_token_id]) == TEXT


def test_a_model_of_stories_starts_where_plain_transformers_has_it_and_does_not_rise(script, tmp_path):
    if not SHARED.is_dir():
        pytest.skip("no ../shared")
    file, folder = SHARED / "tinystories.txt", SHARED.parent / "weights" / "stories260K_hf"
    words = ("--model_name_or_path", folder, "--train_files", file, "--eval_files", file, "--sample_by", "document")
    words += ("--max_length", 512, "--max_lost", 1, "--total_batch_size", 8, "--max_steps", 6, "--eval_steps", 2)
    script("pretrain", *words, "--learning_rate", 1e-4, "--eval_on_start", "--output_dir", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]

    # Rows of 512 tokens, of which the first has nothing before it.
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = [*tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"], tokenizer.eos_token_id]
    total, count = 0.0, 0
    for start in range(0, len(ids), 512):
        piece = torch.tensor([ids[start : start + 512]])
        with torch.no_grad():
            logits = model(piece).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), piece[0, 1:], reduction="sum"))
        count += piece.shape[1] - 1
    assert losses[0] == pytest.approx(total / count, rel=1e-5)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.03
