"""Texts that are tokenized in chunks have the ids of the tokenizer's own call, for every tokenizer and text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, character_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.data import chunk_tokenizer
from accel_llm.data.chunk_tokenizer import ChunkTokenizer
from accel_llm.demo.tokenizer import build_demo_tokenizer

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
WORDS = ["a", "The", "don't", "we'LL", "foo_bar", "(x)", "1234", "3.14", "=", "->", "...", "'", "é", "e\u0301", "你好"]
WORDS += [
    "世界。",
    "🙂",
    "👍🏽",
    "<|im_end|>",
    "<|endoftext|>",
    "\u3000",
    "\xa0",
    "\u2028",
    "\x1c",
    "\x85",
    "ﬁ",
    "Å",
    "/*",
    "x's",
]
SPACES = ["", " ", "  ", "\n", "\r\n", "\n\n", "\t", " \n", "\n    ", "\n \n", "   \t", "\n\t\t", " \r"]
TEXTS = st.lists(
    st.tuples(st.sampled_from(SPACES), st.one_of(st.sampled_from(WORDS), st.text(max_size=4))), max_size=30
)


def patterned_tokenizer(pattern: str, **more: object) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that splits by a pattern."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(
        [" don't foo_bar the   \n\n    return self.x(1234) 你好世界" * 9, " a a'll \r\n /*"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", **more)


TOKENIZERS = {f"pattern {k}": patterned_tokenizer(p) for k, p in enumerate(sorted(chunk_tokenizer.KNOWN_PATTERNS))}
TOKENIZERS |= {"demo": build_demo_tokenizer(), "characters": character_tokenizer()}
if SHARED.exists():
    names = ("qwen3", "smollm", "llama2", "happy-llm_tokenizer_k")
    TOKENIZERS |= {name: AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name) for name in names}
    for loaded in TOKENIZERS.values():
        loaded.backend_tokenizer.no_truncation()
        loaded.backend_tokenizer.no_padding()
CHUNKED = {name: ChunkTokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(parts=st.lists(TEXTS, max_size=4))
@settings(max_examples=600, deadline=None)
def test_chunks_have_the_ids_of_the_whole_text(name, parts):
    texts = ["".join(space + word for space, word in part) for part in parts]
    texts = [text.encode(errors="replace").decode() for text in texts]
    expected = [TOKENIZERS[name](text)["input_ids"] for text in texts]
    assert [ids.tolist() for ids in CHUNKED[name].encode(texts)] == expected


@needs_shared
@pytest.mark.parametrize("name", ["qwen3", "smollm", "pattern 0", "pattern 3", "demo"])
def test_real_texts_have_the_ids_of_the_tokenizer_and_are_cut(name):
    assert name not in ("qwen3", "smollm") or CHUNKED[name]._chunks is not None
    texts = (SHARED / "pretrain" / "tinystories.txt").read_text(encoding="utf-8").split("\n")[:300]
    texts += (SHARED / "pretrain" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")[:5]
    texts += [Path(__file__).read_text(encoding="utf-8")]
    texts += (SHARED / "instruct" / "alpaca_zh_demo.json").read_text(encoding="utf-8")[:50_000].split("  },")
    texts = [text for text in texts if text]
    assert [ids.tolist() for ids in CHUNKED[name].encode(texts)] == [TOKENIZERS[name](t)["input_ids"] for t in texts]


def test_other_tokenizers_are_left_alone():
    assert CHUNKED["characters"]._chunks is None and CHUNKED["pattern 0"]._chunks is not None
    assert ChunkTokenizer(patterned_tokenizer(r"\S+|\s+"))._chunks is None
    if SHARED.exists():
        assert CHUNKED["llama2"]._chunks is None and CHUNKED["happy-llm_tokenizer_k"]._chunks is None


def test_few_chunks_are_kept(monkeypatch):
    tokenizer = build_demo_tokenizer()
    chunked = ChunkTokenizer(tokenizer)
    monkeypatch.setattr(chunk_tokenizer, "MAX_CHUNKS", 20)
    for k in range(10):
        text = " ".join(f"w{n}" for n in range(10 * k, 10 * k + 10)) + " " + "long" * 20
        assert chunked.encode([text])[0].tolist() == tokenizer(text)["input_ids"]
        assert len(chunked._ids) <= 40 and not any("long" in chunk for chunk in chunked._ids)
