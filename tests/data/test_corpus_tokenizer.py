"""The tokenizer that is learned from text: every text comes back, special tokens are single, chats are trained exactly."""

import json
from pathlib import Path

import pytest
from support import ROOT
from transformers import AutoTokenizer

from accel_llm.chat.template import load_template
from accel_llm.config.corpus_options import TokenizerOptions
from accel_llm.data.chunk_tokenizer import ChunkTokenizer
from accel_llm.data.corpus_tokenizer import learn_tokenizer
from accel_llm.errors import ConfigError

TEXTS = ["The cat sat on the mat. " * 5, "深度学习模型 深度学习 模型训练\n\n  return x == 1234;", "naïve café 🙂"] * 4


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def learn(file: Path, **more: object):
    values = {"train_files": [str(file)], "output_dir": "unused", "vocab_size": 300}
    return learn_tokenizer(TokenizerOptions(**(values | more)))  # type: ignore[arg-type]


def test_every_text_comes_back_and_special_tokens_are_one(file, tmp_path):
    tokenizer = learn(file, special_tokens=["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        len(loaded) == 300
        and loaded.get_vocab()
        == learn(file, special_tokens=["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]).get_vocab()
    )
    for text in [*TEXTS[:3], "\x00\r\n\t ﬁ é e\u0301 \u3000", "unseen words: 你好世界"]:
        assert loaded.decode(loaded(text)["input_ids"]) == text
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_middle|>"):
        assert len(loaded(token)["input_ids"]) == 1
    assert len(loaded(" The cat sat")["input_ids"]) < 9  # what was frequent is merged
    assert ChunkTokenizer(loaded)._chunks is not None


def test_its_template_trains_the_answers_with_their_end(file):
    tokenizer = learn(file)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (row,) = load_template(tokenizer).encode(messages, train_on="assistant").rows
    assert tokenizer.decode([t for t, label in zip(row.input_ids, row.labels, strict=True) if label != -100]) == (
        "Hello.<|im_end|>"
    )


def test_too_little_text_is_said(file):
    with pytest.raises(ConfigError, match=r"^vocab_size: 30,000 tokens are more than the texts give \([\d,]+, with"):
        learn(file, vocab_size=30_000)


def test_a_script_learns_one_and_prepares_a_corpus_with_it(script, file, tmp_path, capsys):
    script("prepare", "tokenizer", "--train_files", file, "--vocab_size", 300, "--output_dir", tmp_path / "tokenizer")
    assert "300 tokens" in capsys.readouterr().out
    words = ("--train_files", file, "--max_length", 32, "--output_dir", tmp_path / "corpus", "--max_lost", 1)
    script("prepare", "corpus", "--tokenizer_name", tmp_path / "tokenizer", *words)
    out = capsys.readouterr().out
    assert "removed: exact duplicate" in out and "3 documents" in out
    with pytest.raises(ConfigError, match="not empty"):
        script(
            "prepare", "tokenizer", "--train_files", file, "--vocab_size", 300, "--output_dir", tmp_path / "tokenizer"
        )
    assert ROOT.exists()
