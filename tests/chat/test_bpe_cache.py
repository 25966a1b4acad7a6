"""The cache gives the ids of the tokenizer itself, or None."""

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
    monkeypatch.setattr("accel_llm.chat.bpe_cache._MAX_WORDS", 10)
    backend = make_backend()
    cache = BpeCache(backend)
    for k in range(50):
        assert cache.encode(f"word{k} x{k}") == backend.encode(f"word{k} x{k}").ids
        assert len(cache._ids) <= 14


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
