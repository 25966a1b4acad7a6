"""The cache gives the ids of the tokenizer itself, or None."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import byte_level, sentence_piece_like
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from accel_llm.chat import bpe_cache
from accel_llm.chat.bpe_cache import BpeCache

DATA = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# Letters, marks, digits and spaces of many scripts, and characters that engines are known to disagree on.
TEXTS = st.text(
    st.one_of(
        st.sampled_from([*"aB'sT ll9 .,\n\r\t<|>_é中😀ß", "\x1c", "\x85", "\xa0", "\u180e", "\u200b", "\u2028"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


def make_backend(cut: str = "gpt2", nfc: bool = False) -> Tokenizer:
    backend: Tokenizer = byte_level([]).backend_tokenizer  # type: ignore[assignment]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut == "gpt2")
    steps: list = {
        "gpt2": [],
        "gpt4": [pre_tokenizers.Split(Regex(GPT4), "isolated")],
        "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(GPT4), "isolated")],
    }[cut]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    backend.normalizer = normalizers.NFC() if nfc else None
    return backend


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("cut", ["gpt2", "gpt4", "digits"])
def test_words_give_the_ids_of_the_tokenizer(cut: str, nfc: bool) -> None:
    backend = make_backend(cut, nfc)
    cache = BpeCache(backend)
    assert cache.supported
    encoded = 0

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def holds(text: str) -> None:
        nonlocal encoded
        for _ in range(2):  # the second time from the cache
            ids = cache.encode(text)
            assert ids is None or ids == backend.encode(text, add_special_tokens=False).ids
            encoded += ids is not None

    holds()
    assert encoded > 300


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", ["qwen3", "smollm"])
def test_words_give_the_ids_of_real_tokenizers(name: str) -> None:
    backend = AutoTokenizer.from_pretrained(DATA / name).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    cache = BpeCache(backend)
    assert cache.supported
    for text in (
        "Hello, it's 2+2 = 4!\n\n  def f(x):\r\n\treturn x  \n",
        "细胞理论和日心说。",
        "naïve ÄÖÜ 👩‍🔬",
        "don'T \u2028 x",
    ):
        assert cache.encode(text) == backend.encode(text, add_special_tokens=False).ids

    added = [token.content for token in backend.get_added_tokens_decoder().values()]

    @settings(max_examples=100, deadline=None)
    @given(TEXTS.filter(lambda text: not any(token in text for token in added)))
    def holds(text: str) -> None:
        ids = cache.encode(text)
        assert ids is None or ids == backend.encode(text, add_special_tokens=False).ids

    holds()


def test_characters_that_engines_cut_differently_are_left_to_the_tokenizer() -> None:
    cache = BpeCache(make_backend("gpt4"))
    assert cache.encode("a\x1cb") is None or cache.encode("a\x1cb") == make_backend("gpt4").encode("a\x1cb").ids
    assert BpeCache(make_backend("gpt4", nfc=True)).encode("e\u0301") is None  # the tokenizer composes it first
    assert BpeCache(make_backend("gpt4")).encode("e\u0301") is not None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_cache, "_MAX_BYTES", 5000)
    monkeypatch.setattr(bpe_cache, "_MAX_CHARACTERS", 150)
    backend = make_backend()
    cache = BpeCache(backend)
    sizes = []
    for k in range(200):
        text = f"word{k} x{k} {chr(0x4E00 + k)}"
        assert cache.encode(text) == backend.encode(text).ids
        held = sum(sys.getsizeof(word) + sys.getsizeof(ids) + 100 + 32 * len(ids) for word, ids in cache._ids.items())
        assert held == cache._bytes <= 5000 and len(cache._checked_characters) <= 150 + 12
        sizes.append(len(cache._ids))
    assert max(sizes) > 10 and sizes != sorted(sizes)  # it was emptied and filled again
    many = " ".join(f"n{k}" for k in range(2000))  # words of one text that do not fit either
    assert cache.encode(many) == cache.encode(many) == backend.encode(many).ids and cache._bytes <= 5000


def test_long_words_are_not_kept() -> None:
    backend = make_backend()
    cache = BpeCache(backend)
    for length in (127, 128, 129, 4000):
        text = "a" * length + " b"
        for _ in range(2):
            assert cache.encode(text) == backend.encode(text).ids
    assert sorted(map(len, cache._ids)) == [2, 127, 128]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
def test_a_word_of_4000_characters_has_the_ids_of_the_tokenizer() -> None:
    path = DATA.parents[1] / "cases" / "one_long_word.jsonl"
    answer = json.loads(path.read_text(encoding="utf-8"))["messages"][1]["content"]
    assert max(map(len, answer.split())) >= 3900
    backend = AutoTokenizer.from_pretrained(DATA / "qwen3").backend_tokenizer
    cache = BpeCache(backend)
    for text in (answer, f"Sequence: {answer}, again {answer}!"):
        for _ in range(2):
            assert cache.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert all(len(word) <= 128 for word in cache._ids)


# Prints how many MB the process grows by different words of so many characters. It imports only what it must.
GROWTH = """
from tokenizers import Tokenizer, models, pre_tokenizers
from accel_llm.chat import bpe_cache
{change}
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({{letter: 1000 + k for k, letter in enumerate(letters)}}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
cache = bpe_cache.BpeCache(backend)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
before = resident()
for k in range({count}):
    word = "".join("abcdefghij"[int(digit)] for digit in str(k)).rjust({length}, "x")
    assert len(cache.encode(word)) == {length}
print(resident() - before)
"""


def growth(count: int, length: int, change: str = "") -> float:
    code = GROWTH.format(change=change, count=count, length=length)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("count, length", [(3000, 4000), (100_000, 30)])
@pytest.mark.long
def test_many_different_words_take_little_memory(count: int, length: int) -> None:
    assert growth(count, length) < 48


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.long
def test_without_the_bounds_they_would_take_much() -> None:
    change = "bpe_cache._MAX_WORD = bpe_cache._MAX_BYTES = 1 << 60"
    assert growth(1000, 4000, change) > 64 and growth(100_000, 30, change) > 64


@pytest.mark.parametrize("change", ["prefix space", "another normalizer", "no byte level", "sentencepiece", "no cut"])
def test_other_kinds_of_tokenizers_are_not_served(change: str) -> None:
    backend = make_backend()
    if change == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "another normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif change == "no byte level":
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    elif change == "no cut":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        backend = sentence_piece_like([]).backend_tokenizer  # type: ignore[assignment]
    assert not BpeCache(backend).supported


def test_the_ascii_form_of_a_pattern() -> None:
    assert bpe_cache._compile_for_ascii(GPT4).pattern == GPT4.replace(r"\p{L}+", "[a-zA-Z]+").replace(
        r"\p{N}{1,3}", "[0-9]{1,3}"
    ).replace(r"\p{L}\p{N}", "a-zA-Z0-9")
    assert bpe_cache._compile_for_ascii(r"[\p{Lu}\p{Lt}]+|\p{Lo}").pattern == r"[A-Z]+|(?!)"
    assert bpe_cache._compile_for_ascii(r"\p{Han}+").pattern == r"\p{Han}+"  # unknown to `re`, so compiled by `regex`
