"""Small encoders on disk with a tokenizer of BERT's kind, files of texts with labels, and runs of launch/classify.py."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

VOCABULARY = "the a film movie plot actor was is very not good great fine bad poor dull but and so this that"
WORDS = VOCABULARY.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of WORDS, that writes [CLS] a [SEP] b [SEP] and gives token types."""
    vocabulary = {token: k for k, token in enumerate([*SPECIAL, *WORDS])}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """The folder of a masked language model that tests must not change; it has no head for classes."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = words_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **SHAPE)
        model = BertForMaskedLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_text(draw: random.Random, good: bool) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.randint(1, 12))]
    words = [word for word in words if word not in ("good", "great", "bad", "poor")]
    words.insert(draw.randint(0, len(words)), draw.choice(("good", "great") if good else ("bad", "poor")))
    return " ".join(words)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> tuple[Path, Path]:
    """Texts with the label positive or negative, to train and to evaluate on."""
    folder, draw = tmp_path_factory.mktemp("reviews"), random.Random(0)
    for name, count in (("train", 160), ("eval", 45)):
        with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["sentence", "label"])
            for _ in range(count):
                good = draw.random() < 0.6
                writer.writerow([random_text(draw, good), "positive" if good else "negative"])
    return folder / "train.tsv", folder / "eval.tsv"


@pytest.fixture
def classify(script, bert, reviews, tmp_path_factory) -> Callable[..., Path]:
    """`classify(folder, "--method", "lora")`: a run of six steps in this process; errors are raised."""

    def run(folder: Path, *more: object) -> Path:
        files = {"--train_files": reviews[0], "--eval_files": reviews[1]}  # given twice, an option has both
        words = [word for name, file in files.items() if name not in more for word in (name, file)]
        words += ["--model_name_or_path", bert]
        words += [
            "--max_length",
            64,
            "--max_steps",
            6,
            "--logging_steps",
            1,
            "--save_steps",
            3,
            "--learning_rate",
            1e-2,
        ]
        words += ["--cache_dir", tmp_path_factory.getbasetemp() / "texts", "--output_dir", folder]
        script("classify", *words, *more)
        return folder

    return run
