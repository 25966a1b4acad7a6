"""Compare documents a second of `prepare.py corpus` with `datasets.map` and `group_texts`: same text, cores and tokenizer.

python tests/benchmarks/prepare.py --tokenizer FOLDER [--workers N] [--megabytes N] [FILE.jsonl ...]

Without files: the Python files and pages of the installed packages, each a document, so that no text is there twice on
purpose. Both read JSON lines from the disk, and end when the rows to train on are on the disk. Ours also removes exact
duplicates, keeps documents apart, and loses no text; theirs drops the rest of each batch of 1,000 documents.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import argparse
import hashlib
import json
import resource
import site
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from accel_llm.config.corpus_options import CorpusOptions
from accel_llm.data.corpus_build import prepare_part
from accel_llm.data.corpus_seal import seal_corpus
from accel_llm.model.tokenizer import load_tokenizer

MAX_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--megabytes", type=float, default=40)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = list(map(Path, args.files)) or [collect_texts(folder / "texts.jsonl", args.megabytes * 1e6)]
        print(f"{'file':24}{'MB':>8}{'documents':>11}{'ours':>14}{'datasets.map':>14}{'ratio':>8}{'CPU time':>11}")
        for number, file in enumerate(files):
            with file.open(encoding="utf-8") as lines:
                documents = sum(1 for _ in lines)
            theirs, their_cpu = measure(time_theirs, file, args.tokenizer, folder / f"theirs{number}", args.workers)
            ours, our_cpu = measure(time_ours, file, args.tokenizer, folder / f"ours{number}", args.workers)
            print(
                f"{file.name:24}{file.stat().st_size / 1e6:>8.1f}{documents:>11,}{documents / ours:>12,.0f}/s"
                f"{documents / theirs:>12,.0f}/s{theirs / ours:>7.1f}x{their_cpu / our_cpu:>10.1f}x",
                flush=True,
            )


def collect_texts(target: Path, size: float) -> Path:
    """Write the text files of the installed packages, each once, as JSON lines."""
    written, seen = 0, set()
    with target.open("w", encoding="utf-8") as out:
        for text in installed_texts():
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen and 200 < len(text) < 20_000:
                seen.add(digest)
                written += out.write(json.dumps({"text": text}) + "\n")
                if written > size:
                    break
    return target


def installed_texts() -> Iterator[str]:
    for folder in site.getsitepackages():
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".py", ".md", ".rst", ".txt") and path.is_file():
                try:
                    yield path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue


def measure(function: Callable[..., float], *arguments: object) -> tuple[float, float]:
    """Return the seconds that a function took, and the seconds of CPU time of all its processes."""

    def used() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    before = used()
    return function(*arguments), used() - before


def time_ours(file: Path, tokenizer: str, folder: Path, workers: int) -> float:
    start = time.perf_counter()
    options = CorpusOptions(  # type: ignore[call-arg]
        tokenizer_name=tokenizer,
        train_files=[str(file)],
        output_dir=str(folder),
        max_length=MAX_LENGTH,
        overlong="split",
        max_lost=1.0,
        preprocessing_num_workers=workers,
    )
    prepare_part(options, load_tokenizer(tokenizer))
    seal_corpus([folder], folder)
    return time.perf_counter() - start


def time_theirs(file: Path, name: str, folder: Path, workers: int) -> float:
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(name)
    dataset = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))

    def tokenize(rows: dict) -> dict:
        return tokenizer(rows["text"])

    def group_texts(rows: dict) -> dict:
        joined = {key: list(chain(*rows[key])) for key in rows}
        length = len(joined["input_ids"]) // MAX_LENGTH * MAX_LENGTH
        blocks = {
            key: [values[k : k + MAX_LENGTH] for k in range(0, length, MAX_LENGTH)] for key, values in joined.items()
        }
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    number = workers if workers > 1 else None
    dataset = dataset.map(tokenize, batched=True, num_proc=number, remove_columns=dataset.column_names)
    dataset = dataset.map(group_texts, batched=True, num_proc=number)
    assert len(dataset) > 0
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
