"""See what a model would be trained on: rows with trained tokens in green, lengths, density, and the ledger.

    python launch/show_data.py --model_name_or_path Qwen/Qwen3-0.6B --train_files chats.jsonl
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --json > rows.jsonl

Takes the data options of sft.py; reads the tokenizer, never the weights.
"""

import json
import sys
from pathlib import Path

import numpy as np

from accel_llm import demofiles as demo
from accel_llm import display, distributed, encode, models
from accel_llm.chat import load_template
from accel_llm.errors import run
from accel_llm.metrics import console
from accel_llm.options import SftOptions, ShowOptions, TrainOptions


class Options(ShowOptions, SftOptions, TrainOptions):
    """The options of sft.py, of which those about data count, and how to show them."""


def main() -> None:
    options = demo.parse_or_demo(Options, Path(__file__).parent / "recipes" / "demo.yaml", sys.argv[1:])
    distributed.quiet()
    tokenizer = models.tokenizer_of(options)
    template = load_template(tokenizer, options.chat_template)
    data = encode.conversations(options, options.seed, tokenizer, template)
    if options.json_lines:
        for k in range(len(data.train)):
            ids, labels = data.train[k]
            row = {
                "row": int(data.train.source[k]),
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "trained_text": display.trained_text(tokenizer, ids, labels),
            }
            print(json.dumps(row, ensure_ascii=False))
        return
    display.rows(tokenizer, data.train, 5)
    trained = np.add.reduceat((np.asarray(data.train.labels) != -100).astype(np.int64), data.train.offsets[:-1])
    display.histogram("Tokens a row", data.train.lengths)
    display.histogram("Share of a row that is trained", trained / data.train.lengths)
    console.print(data.ledger.table())


if __name__ == "__main__":
    run(main)
