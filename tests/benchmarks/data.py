"""Compare rows a second through template, mask, tokenizer and packing with TRL's SFTTrainer: one file, one core.

python tests/benchmarks/data.py [--tokenizer FOLDER] [--rows N] [FILE ...]

Without files: generated conversations. Needs `pip install -e ".[bench]"`; the tokenizer needs a chat template.
"""

import os

from accel_llm.chat.template import configured_template
from accel_llm.config.data_options import DataOptions
from accel_llm.data.formats import Conversation, parse_row
from accel_llm.data.packing import pack
from accel_llm.data.prepare import encode_conversations
from accel_llm.data.sources import as_source, read_source
from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer

# One core for both: the tokenizer's own threads are set when it is first used.
os.environ |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import trl
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

MAX_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--tokenizer")
    parser.add_argument("--rows", type=int, default=None)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else build_demo_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'file':44}{'rows':>8}{'tokens':>11}{'ours':>12}{'TRL ' + trl.__version__:>12}{'ratio':>8}")
        for name in args.files or [""]:
            messages = conversations(name, args.rows)
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages), encoding="utf-8")
            tokens, ours = time_ours(file, tokenizer, Path(folder))
            theirs = time_theirs(messages, tokenizer, Path(folder))
            rates = len(messages) / ours, len(messages) / theirs
            label = Path(name).name or "generated"
            print(
                f"{label:44}{len(messages):>8,}{tokens:>11,}"
                f"{rates[0]:>10,.0f}/s{rates[1]:>10,.0f}/s{theirs / ours:>7.1f}x"
            )


def conversations(name: str, limit: int | None) -> list[list[dict]]:
    """Return rows as plain chats, which both can read."""
    if not name:
        return [row["messages"] for row in demo_conversations("train")[: limit or 20_000]]
    rows = [parse_row(row.fields) for row in read_source(as_source(name))]
    chats = [
        [{"role": message["role"], "content": message["content"]} for message in row.messages]
        for row in rows
        if isinstance(row, Conversation) and not row.tools
    ]
    return list(itertools.islice(itertools.cycle(chats), limit)) if limit else chats


def time_ours(file: Path, tokenizer, folder: Path) -> tuple[int, float]:
    """Tokens, and seconds from the file on disk to a written cache and packed bins, with a template that is new."""
    cache = folder / f"cache{time.perf_counter()}"
    options = DataOptions(
        train_files=[str(file)], cache_dir=str(cache), max_length=MAX_LENGTH, overlong="truncate", max_lost=1.0
    )
    template = configured_template(tokenizer, options)
    start = time.perf_counter()
    encoded = encode_conversations(options, 0, tokenizer, template)
    pack(encoded.train.lengths, MAX_LENGTH, np.random.default_rng(0))
    return int(encoded.train.offsets[-1]), time.perf_counter() - start


def time_theirs(messages: list[list[dict]], tokenizer, folder: Path) -> float:
    """Seconds of SFTTrainer's preparation of a dataset that is in memory already."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    settings = trl.SFTConfig(
        output_dir=str(folder / "trl"), max_length=MAX_LENGTH, packing=True, assistant_only_loss=True, use_cpu=True
    )
    dataset = datasets.Dataset.from_dict({"messages": messages})
    model = Qwen3ForCausalLM(config)
    trainer = trl.SFTTrainer(model, settings, train_dataset=dataset.select([0]), processing_class=tokenizer)
    start = time.perf_counter()
    trainer._prepare_dataset(dataset, tokenizer, settings, True, None, "train")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
