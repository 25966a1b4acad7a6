"""transformers 45920, also 45488 and 46489: AutoTokenizer of transformers 5 gives other ids than tokenizer.json.

The classes GPT2Tokenizer and LlamaTokenizer build normalizer and pre-tokenizer anew: OLMo 2 cuts "2023" in other places,
Phi-3 and Llama 2 write other tokens behind special tokens. Training then teaches ids that the model has never seen.
Right are the ids of tokenizer.json, as the tokenizers library reads it; transformers 4 gives the same.
"""

import json
from pathlib import Path

import pytest
from support import ROOT
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.model.tokenizer import load_tokenizer
from accel_llm.model.tokenizer_file import save_tokenizer

DATA = ROOT.parent / "shared" / "data"
TEXTS = [
    "In 1234 there were 4567 of 2023.",
    " leading",
    "<s>a</s> b",
    "<|user|>\nHi<|end|>\n<|assistant|>\n Yes",
    "x\n\ny  z",
]


def _numbers_apart(folder: Path, tokenizer_class: str) -> Path:
    """Save a byte-level tokenizer that cuts numbers into groups of three digits, as OLMo 2's does."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*\b)"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["123 456 2023 1999"] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))
    return folder


@pytest.mark.parametrize("tokenizer_class", ["GPT2TokenizerFast", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_the_ids_are_those_of_tokenizer_json(tmp_path: Path, tokenizer_class: str) -> None:
    folder = _numbers_apart(tmp_path, tokenizer_class)
    backend, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(str(folder))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids


def test_the_library_alone_gives_other_ids(tmp_path: Path) -> None:
    """If this fails, transformers is mended, and `load_as_published` is no longer needed for this class."""
    folder = _numbers_apart(tmp_path, "GPT2TokenizerFast")
    ids = AutoTokenizer.from_pretrained(folder).encode(TEXTS[0])
    assert ids != Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXTS[0]).ids


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize("name", ["phi-3-mini", "llama2", "mistral-7b", "smollm", "happy-llm_tokenizer_k"])
def test_published_tokenizers(tmp_path: Path, name: str) -> None:
    """The export gives the same ids again, through AutoTokenizer alone, and keeps the special tokens."""
    folder = DATA / "tokenizers" / name
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    tokenizer, stock = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (stock.bos_token, stock.eos_token)
    assert tokenizer.model_input_names == stock.model_input_names
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert again.encode(text, add_special_tokens=False) == expected
        assert again(text).keys() == stock(text).keys()
