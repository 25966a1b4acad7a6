"""What is removed from a corpus, and what is rearranged: near duplicates, contaminated documents, fill-in-the-middle."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import contents, make_texts, prepare, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from transformers import AutoTokenizer

from accel_llm.data.contamination import EvaluationNgrams
from accel_llm.data.corpus_shards import open_corpus, read_manifest
from accel_llm.data.duplicates import find_equal
from accel_llm.data.fill_in_the_middle import KNOWN_FIM_TOKENS, FillInTheMiddle, find_fim_tokens
from accel_llm.data.near_duplicates import BANDS, HASHES, find_similar, hash_bands, sign_documents
from accel_llm.data.sources import as_source
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError

WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def demo():
    return build_demo_tokenizer()


def rows_of(folder: Path) -> dict[str, int]:
    (bins,) = read_manifest(folder)["ledger"]["bins"].values()
    return {name: amount["rows"] for name, amount in bins.items() if amount["rows"]}


@given(st.lists(st.integers(0, 5), max_size=40))
@settings(deadline=None)
def test_equal_hashes_are_found_and_the_first_of_them_stays(values):
    digests = np.array([[value % 2, value] for value in values], np.uint64).reshape(-1, 2)
    found, first = find_equal(digests)
    expected = [(k, values.index(value)) for k, value in enumerate(values) if value in values[:k]]
    assert list(zip(found.tolist(), first.tolist(), strict=True)) == expected


def shingles(ids: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(ids[k : k + 5].tolist()) for k in range(max(1, len(ids) - 4))}


def test_signatures_estimate_the_share_of_common_ngrams():
    """Compared with sets of n-grams; the standard error of 126 hashes is at most 0.045."""
    pytest.importorskip("rensa")
    rng, errors = np.random.default_rng(0), []
    for share in (0.2, 0.5, 0.8, 0.95):
        for _ in range(20):
            first = rng.integers(0, 1000, 400).astype(np.int32)
            second = first.copy()
            changed = round(400 * (1 - share) / (1 + share))
            second[:changed] = rng.integers(0, 1000, changed)
            a, b = sign_documents(np.concatenate([first, second]), np.array([400, 400]))
            one, other = shingles(first), shingles(second)
            errors.append((a == b).mean() - len(one & other) / len(one | other))
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.05


def test_short_and_empty_documents_have_signatures_of_their_own():
    pytest.importorskip("rensa")
    ids = np.array([1, 2, 3, 1, 2, 3, 1, 2, 1, 2, 3, 4, 5, 6], np.int32)
    signatures = sign_documents(ids, np.array([3, 3, 2, 0, 6]))
    assert signatures.shape == (5, HASHES) and hash_bands(signatures).shape == (BANDS, 5)
    same = [[bool((a == b).all()) for b in signatures] for a in signatures]
    assert same == [[row == column or {row, column} == {0, 1} for column in range(5)] for row in range(5)]
    assert sign_documents(ids[:0], np.array([], np.int64)).shape == (0, HASHES)


def test_documents_like_an_earlier_one_are_found_and_no_others():
    pytest.importorskip("rensa")
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 5000, 300).astype(np.int32) for _ in range(200)]
    for k in range(100, 150):  # like document k - 100: 3 of 300 tokens are others
        documents[k] = documents[k - 100].copy()
        documents[k][rng.integers(0, 300, 3)] = 6000
    for k in range(150, 200):  # half of it is another
        documents[k] = np.concatenate([documents[k - 150][:150], documents[k][:150]])
    signatures = sign_documents(np.concatenate(documents), np.array([300] * 200))
    bands, present = hash_bands(signatures), np.ones(200, bool)
    present[[0, 101]] = False
    found, twins = find_similar(lambda band: bands[band], lambda chosen: signatures[chosen], 0.8, present)
    assert [*zip(found.tolist(), twins.tolist(), strict=True)] == [(k, k - 100) for k in range(102, 150)]


def test_near_duplicates_are_removed_whatever_the_parts(tmp_path, demo):
    pytest.importorskip("rensa")
    texts = [" ".join(WORDS[k * 40 : k * 40 + 150]) for k in range(20)]
    texts += [text.replace("the", "THE", 1) for text in texts[:5]] + texts[5:7]
    padding = [f"{k} " + "".join(map(chr, np.random.default_rng(k).integers(97, 123, 900))) for k in range(700)]
    file = write_texts(tmp_path / "a.jsonl", [*texts, *padding])
    more = {"deduplicate": "near", "max_length": 2048}
    prepare([file], tmp_path / "one", demo, **more)
    prepare([file], tmp_path / "three", demo, parts=3, **more)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert rows_of(tmp_path / "one") == {
        "trained": 720,
        "removed: exact duplicate": 2,
        "removed: near duplicate": 5,
    }
    ledger = read_manifest(tmp_path / "one")["ledger"]
    assert any(
        note.startswith(f"Removed: near duplicates, 5 in all: {file}, row 21 = {file}, row 1; ")
        for note in ledger["notes"]
    )


def test_documents_that_hold_evaluation_texts_are_removed(tmp_path, demo):
    question = "Wenn die Sonne untergeht, dann schlafen alle kleinen Tiere im tiefen dunklen Wald bis zum Morgen ein"
    chinese = "太阳从东方升起的时候所有的小动物都会醒来"
    held_out = tmp_path / "eval.jsonl"
    rows = [{"question": {"text": question}, "choices": ["yes", "no"]}, {"question": chinese}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [
        *make_texts(40),
        f"before {question.upper().replace(',', ' -')} after",
        f"以前{chinese[2:18]}以后",  # 16 characters of it
        " ".join(question.split()[:12]),  # a word less than 13
        chinese[:12],
    ]
    file = write_texts(tmp_path / "a.jsonl", texts)
    prepare([file], tmp_path / "corpus", demo, deduplicate="none", decontaminate_files=[str(held_out)])
    name = "removed: 13 words in a row are in decontaminate_files"
    assert rows_of(tmp_path / "corpus") == {"trained": 42, name: 2}
    numbers = set(open_corpus(tmp_path / "corpus").number.tolist())
    assert not numbers & {41, 42} and {43, 44} <= numbers
    notes = read_manifest(tmp_path / "corpus")["ledger"]["notes"]
    assert notes == ["decontaminate_files: 2 texts with fewer than 13 words are compared with nothing."]
    ngrams = EvaluationNgrams([as_source(str(held_out))], 13)
    assert ngrams.short_texts == 2 and not ngrams.appear_in("") and ngrams.appear_in(question)


FIM = FillInTheMiddle(KNOWN_FIM_TOKENS[1], 0.5, 0.5, 7)


@given(st.text(max_size=50), st.binary(min_size=16, max_size=16))
@settings(deadline=None)
def test_a_rearranged_text_has_all_its_characters(text, digest):
    rearranged = FIM.rearrange(text, digest)
    if rearranged is None:
        return
    prefix, rest = rearranged.removeprefix("<fim_prefix>").split("<fim_suffix>")
    suffix, middle = rest.split("<fim_middle>")
    assert (prefix + middle + suffix if prefix or text.startswith(middle) else middle + suffix) in (
        text,
        middle + suffix,
    )
    assert sorted(prefix + middle + suffix) == sorted(text)
    assert FIM.rearrange(text, digest) == rearranged and FIM.rearrange(f"{text}<fim_middle>", digest) is None


def test_the_share_of_rearranged_documents_is_as_asked():
    texts = [FIM.rearrange("some text", bytes([k % 256, k // 256] * 8)) for k in range(4000)]
    rearranged = [text for text in texts if text]
    assert 0.47 < len(rearranged) / 4000 < 0.53
    spm = [text for text in rearranged if text.startswith("<fim_prefix><fim_suffix>")]
    assert 0.47 < len(spm) / len(rearranged) < 0.6  # an empty prefix looks the same


def test_fill_in_the_middle_is_the_same_whatever_the_parts(tmp_path):
    folder = ROOT.parent / "shared" / "data" / "tokenizers" / "smollm"
    if not folder.exists():
        pytest.skip("needs ../shared/data")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert find_fim_tokens(tokenizer) == KNOWN_FIM_TOKENS[1] if "<fim_prefix>" in tokenizer.get_vocab() else True
    tokenizer.add_special_tokens({"additional_special_tokens": list(KNOWN_FIM_TOKENS[1])})
    file = write_texts(tmp_path / "a.jsonl", make_texts(2500))
    more = {"fim_rate": 0.5, "deduplicate": "none", "max_length": 2048}
    prepare([file], tmp_path / "one", tokenizer, **more)
    prepare([file], tmp_path / "two", tokenizer, parts=2, **more)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    rows, middle = open_corpus(tmp_path / "one"), tokenizer.convert_tokens_to_ids("<fim_middle>")
    count = sum(middle in rows[k][0] for k in range(len(rows)))
    note = f"fim_rate: {count:,} documents were rearranged for fill-in-the-middle, duplicates counted."
    assert 1000 < count < 1500 and note in read_manifest(tmp_path / "one")["ledger"]["notes"]


def test_a_tokenizer_without_the_tokens_is_refused(demo):
    with pytest.raises(ConfigError, match=r"^fim_rate: the tokenizer .* has no tokens for fill-in-the-middle, such as"):
        find_fim_tokens(demo)


@pytest.mark.parametrize(("deduplicate", "expected"), [("exact", 44), ("near", 44 + 672)])
def test_the_state_of_a_document_has_the_bytes_that_the_page_says(tmp_path, demo, deduplicate, expected):
    """On the disk, beside the token ids, for documents of one row: 16 of them find exact duplicates."""
    if deduplicate == "near":
        pytest.importorskip("rensa")
    prepare(
        [write_texts(tmp_path / "a.jsonl", [f"text {k}" for k in range(500)])],
        tmp_path / "corpus",
        demo,
        deduplicate=deduplicate,
    )
    (piece,) = (tmp_path / "corpus" / "pieces").glob("*/*.safetensors")
    header = json.loads(piece.read_bytes()[8 : 8 + int.from_bytes(piece.read_bytes()[:8], "little")])
    sizes = {name: np.diff(entry["data_offsets"])[0] for name, entry in header.items() if name != "__metadata__"}
    assert sum(size for name, size in sizes.items() if name != "input_ids") == 500 * expected
    assert sizes["text_digest"] == 500 * 16
