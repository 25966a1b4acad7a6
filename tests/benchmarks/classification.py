"""Train classifiers beside transformers.Trainer: accuracy and examples a second, on two CPU cores.

python tests/benchmarks/classification.py
python tests/benchmarks/classification.py --quick

A small BERT begins with the same random weights in both programs, for each seed. Both take about 32 texts a step, the same
number of epochs, learning rate, linear schedule with warmup, AdamW, float32, and cut texts to the same length. The Trainer
pads each batch to its longest text (DataCollatorWithPadding) and shuffles, as its defaults are. Ours is started as a user
does, `python launch/classify.py`, and packs: so many packed rows make a step that an epoch has as many steps as the
Trainer's, as nearly as whole rows allow. The programs take turns, and never run at once.

SST-2: its first 6,000 rows to train, its next 4,000 and its dev set to evaluate (tokenizer of bert-base-uncased). ChnSentiCorp: hotel reviews,
split by a fixed draw (tokenizer of bert-base-chinese). Accuracies are those of the last evaluation. Examples a second:
of the Trainer its own `train_samples_per_second`, without evaluation; of ours by the clock of metrics.jsonl, which stops
for evaluations too. A difference of accuracies of one seed is noise of about a point, so their mean counts.
"""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TEXTS_A_STEP, RATE, WARMUP_STEPS = 32, 1e-3, 30
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
NOW = time.perf_counter
Row = dict[str, Any]


class Task(NamedTuple):
    """A data set, and how it is trained: texts are cut to `max_length` tokens, and so long are packed rows."""

    tokenizer: str
    max_length: int
    rows: int  # to train
    epochs: int


TASKS = {
    "SST-2": Task("bert-base-uncased", 64, 6_000, 2),
    "ChnSentiCorp": Task("bert-base-chinese", 256, 1_600, 2),
}


def read_rows(name: str) -> tuple[list[Row], list[Row]]:
    """Return the rows to train and to evaluate, `{"text": ..., "label": "0" or "1"}`."""
    folder = DATA / "seqcls"
    if name == "SST-2":
        train, evaluation = (read_table(folder / name / f"{part}.tsv", "\t") for part in ("train_first10000", "dev"))
        evaluation += train[TASKS[name].rows :]  # 872 rows alone would give each accuracy an error of 1.4 points
    else:
        rows = read_table(folder / "ChnSentiCorp_htl_all.csv", ",")
        random.Random(0).shuffle(rows)
        train, evaluation = rows[:-2000], rows[-2000:]
    return train[: TASKS[name].rows], evaluation


def read_table(path: Path, delimiter: str) -> list[Row]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
        return [
            {"text": text, "label": row["label"]} for row in rows if (text := (row.get("text") or row.get("review")))
        ]


def write_inputs(folder: Path, name: str, quick: bool) -> Row:
    """Write the rows of both parts; return how many texts there are, and their tokens."""
    from transformers import AutoTokenizer

    task = TASKS[name]
    parts = dict(zip(("train", "eval"), read_rows(name), strict=True))
    if quick:
        parts = {part: rows[: 20 * TEXTS_A_STEP] for part, rows in parts.items()}
    for part, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / task.tokenizer)
    texts = [row["text"] for row in parts["train"]]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=task.max_length)["input_ids"]]
    return {"texts": len(lengths), "tokens": sum(lengths), "eval": len(parts["eval"]), "lengths": lengths}


def write_model(folder: Path, name: str, seed: int) -> None:
    """Write a BERT with random values, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / TASKS[name].tokenizer)
    labels = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}, "problem_type": "single_label_classification"}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SHAPE, **labels)
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows_of_a_step(facts: Row, max_length: int) -> tuple[int, int]:
    """Return how many packed rows are a step, and the steps of an epoch: nearest to the Trainer's number of steps."""
    import numpy as np

    from accel_llm.config.classify_options import ClassifyOptions
    from accel_llm.data.order import arrange_epoch

    lengths, options = np.array(facts["lengths"]), ClassifyOptions(max_length=max_length)
    bins = len(arrange_epoch(np.arange(len(lengths)), lengths, options, 0).offsets) - 1
    steps = -(-facts["texts"] // TEXTS_A_STEP)
    size = min(range(1, bins + 1), key=lambda rows: abs(-(-bins // rows) - steps))
    return size, -(-bins // size)


def train_ours(folder: Path, name: str, seed: int, facts: Row) -> Row:
    """Train by launch/classify.py, and read its metrics."""
    task = TASKS[name]
    size, _ = rows_of_a_step(facts, task.max_length)
    options: Row = {"model_name_or_path": folder / "model", "train_files": folder / "train.jsonl"}
    options |= {"eval_files": folder / "eval.jsonl", "output_dir": folder / "ours", "cache_dir": folder / "cache"}
    options |= {"method": "full", "max_length": task.max_length, "overlong": "truncate", "max_lost": 1, "seed": seed}
    options |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": 8, "learning_rate": RATE}
    options |= {"lr_scheduler_type": "linear", "warmup_steps": WARMUP_STEPS, "num_train_epochs": task.epochs}
    options |= {"logging_steps": 1_000_000}  # the first step, and all others together
    words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
    run([str(ROOT / "launch" / "classify.py"), *words])
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [line for line in lines if "tokens_per_second" in line]
    texts = [training[0]["supervised_tokens"], training[-1]["supervised_tokens"] - training[0]["supervised_tokens"]]
    tokens_of_a_text = facts["tokens"] / facts["texts"]
    seconds = sum(
        n * tokens_of_a_text / line["tokens_per_second"] for n, line in zip(texts, training, strict=True) if n
    )
    return {"accuracy": lines[-1]["eval/accuracy"], "rate": sum(texts) / seconds, "steps": training[-1]["step"]}


def train_theirs(folder: Path, name: str, seed: int) -> Row:
    """Train by the Trainer, in a process of its own."""
    run([__file__, "--trainer", str(folder), name, str(seed)])
    return json.loads((folder / "theirs.json").read_text(encoding="utf-8"))


def run_trainer(folder: Path, name: str, seed: int) -> None:
    """Train by transformers.Trainer, with its defaults but for what launch/classify.py has too."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    task, tokenizer = TASKS[name], AutoTokenizer.from_pretrained(folder / "model")

    def encoded(part: str) -> Dataset:
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        table = tokenizer([row["text"] for row in rows], truncation=True, max_length=task.max_length)
        return Dataset.from_dict({**table, "labels": [int(row["label"]) for row in rows]})

    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "model"),
        args=TrainingArguments(
            output_dir=str(folder / "theirs"),
            use_cpu=True,
            per_device_train_batch_size=TEXTS_A_STEP,
            per_device_eval_batch_size=64,
            num_train_epochs=task.epochs,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_STEPS,
            optim="adamw_torch",
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=encoded("train"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
    )
    metrics = trainer.train().metrics
    accuracy = trainer.evaluate(encoded("eval"))["eval_accuracy"]
    facts = {"accuracy": accuracy, "rate": metrics["train_samples_per_second"], "steps": trainer.state.global_step}
    (folder / "theirs.json").write_text(json.dumps(facts), encoding="utf-8")


def run(words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{words[0]} failed:\n{result.stdout[-3000:]}")


def compare(name: str, seeds: int, quick: bool) -> str | None:
    """Train on one data set by both programs; print a table, and return what is not as required."""
    with tempfile.TemporaryDirectory() as work:
        facts = write_inputs(Path(work), name, quick)
        size, steps = rows_of_a_step(facts, TASKS[name].max_length)
        per_text = facts["tokens"] / facts["texts"]
        print(
            f"{name}: {facts['texts']:,} texts to train ({per_text:.1f} tokens on average, at most "
            f"{TASKS[name].max_length}), {facts['eval']:,} to evaluate; {TASKS[name].epochs} epochs. Ours packs them: "
            f"{size} rows a step, {facts['texts'] / steps:.1f} texts in place of {TEXTS_A_STEP}.",
            flush=True,
        )
        print(
            f"{'seed':>6}{'accuracy':>12}{'theirs':>9}{'texts/s':>12}{'theirs':>9}{'ratio':>8}{'steps':>9}{'theirs':>9}"
        )
        pairs: list[tuple[Row, Row]] = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory(dir=work) as folder:
                place = Path(folder)
                for part in ("train", "eval"):
                    (place / f"{part}.jsonl").symlink_to(Path(work) / f"{part}.jsonl")
                write_model(place / "model", name, seed)
                ours, theirs = train_ours(place, name, seed, facts), train_theirs(place, name, seed)
            pairs.append((ours, theirs))
            print(
                f"{seed:>6}{ours['accuracy']:>12.2%}{theirs['accuracy']:>9.2%}{ours['rate']:>12.1f}{theirs['rate']:>9.1f}"
                f"{ours['rate'] / theirs['rate']:>8.2f}{ours['steps']:>9,}{theirs['steps']:>9,}",
                flush=True,
            )
    accuracy, rate = (
        [mean(run[key] for run in runs) for runs in zip(*pairs, strict=True)] for key in ("accuracy", "rate")
    )
    difference, ratio = 100 * (accuracy[0] - accuracy[1]), mean(a["rate"] / b["rate"] for a, b in pairs)
    print(f"{'mean':>6}{accuracy[0]:>12.2%}{accuracy[1]:>9.2%}{rate[0]:>12.1f}{rate[1]:>9.1f}{ratio:>8.2f}", flush=True)
    print(
        f"{name}: ours has {difference:+.2f} points of accuracy, and {ratio:.2f} times the texts a second", flush=True
    )
    return name if difference < -0.5 or ratio < 2 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed and few rows, only to see that it runs")
    parser.add_argument(
        "--threads", default="2", help="of each program; where cores are shared with others, 1 waits less"
    )
    parser.add_argument("--trainer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        folder, name, seed = args.trainer
        run_trainer(Path(folder), name, int(seed))
        return
    os.environ["OMP_NUM_THREADS"] = args.threads
    start = NOW()
    busy = os.getloadavg()[0]
    missed = [compare(name, 1 if args.quick else args.seeds, args.quick) for name in args.only]
    print(
        f"required: at most 0.5 points less, 2 x the texts a second; missed: {', '.join(filter(None, missed)) or 'none'}"
    )
    print(
        f"{NOW() - start:.0f} s; load of the machine (of 1.0 for each core in use) {busy:.1f} before, {os.getloadavg()[0]:.1f} after"
    )


if __name__ == "__main__":
    main()
