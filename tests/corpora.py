"""Corpora that tests prepare: files of texts, and the bytes of what comes out."""

import json
from pathlib import Path

import numpy as np

from accel_llm.config.corpus_options import CorpusOptions
from accel_llm.data.corpus_build import prepare_part
from accel_llm.data.corpus_seal import seal_corpus

LENGTH = 64


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of one to some hundred words, in Latin letters, Chinese and emoji, some of them twice."""
    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "你好 世界", "深度学习模型", "🙂👍🏽", "déjà vu", "x=1;\n", "\t", "。"]
    texts = ["a " + " ".join(rng.choice(words, rng.integers(1, 120))) for _ in range(count)]
    return [text if k % 10 else texts[k // 2] for k, text in enumerate(texts)]


def corpus_options(files: list[Path], output: Path, **more: object) -> CorpusOptions:
    values = {
        "tokenizer_name": "demo",
        "max_length": LENGTH,
        "overlong": "split",
        "max_lost": 1.0,
        "preprocessing_num_workers": 1,
    }
    names = list(map(str, files))
    return CorpusOptions(**(values | {"train_files": names, "output_dir": str(output)} | more))  # type: ignore[arg-type]


def prepare(files: list[Path], output: Path, tokenizer, parts: int = 1, **more: object):
    for number in range(1, parts + 1):
        prepare_part(corpus_options(files, output, part=f"{number}/{parts}", **more), tokenizer)
    return seal_corpus([output], output)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all that a sealed corpus consists of."""
    return {path.name: path.read_bytes() for path in [folder / "corpus.json", *(folder / "shards").iterdir()]}
