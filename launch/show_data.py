"""See what a model would be trained on: rows with trained tokens in green, lengths, density, and the ledger.

    python launch/show_data.py --model_name_or_path Qwen/Qwen3-0.6B --train_files chats.jsonl
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --json > rows.jsonl

Takes the data options of sft.py; reads the tokenizer, never the weights.
"""

import json
import sys
from pathlib import Path

import numpy as np

from accel_llm.backend import accelerator as distributed
from accel_llm.chat.span_tokenizer import decode
from accel_llm.chat.template import template_of
from accel_llm.config.options import SftOptions, TrainOptions
from accel_llm.config.tool_options import ShowOptions
from accel_llm.data import prepare as encode
from accel_llm.data import sources
from accel_llm.demo import skills as demo
from accel_llm.errors import check, run
from accel_llm.model import loading as models
from accel_llm.model import vocabulary
from accel_llm.report import display
from accel_llm.report.metrics import console


class Options(ShowOptions, SftOptions, TrainOptions):
    """The options of sft.py, of which those about data count, and how to show them."""


def main() -> None:
    options = demo.parse_or_demo(Options, Path(__file__).parent / "recipes" / "demo.yaml", sys.argv[1:])
    # A tokenizer is all that is read of a model, so one with that alone will do.
    check(sources.problems(options) + ([] if options.tokenizer_name else models.problems(options)))
    distributed.quiet()
    tokenizer = models.tokenizer_of(options)
    vocabulary.add_missing(tokenizer, options)
    template = template_of(tokenizer, options)
    encoded = encode.conversations(options, options.seed, tokenizer, template)
    if options.json_lines:
        for k in range(len(encoded.train)):
            ids, labels = encoded.train[k]
            weights = encoded.train.weights_of([k])
            row = {
                "file": encoded.train.origins[encoded.train.origin[k]].file,
                "row": int(encoded.train.number[k]),
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "text": decode(tokenizer, ids.tolist()),
                "trained_text": display.trained_text(tokenizer, ids, labels),
            }
            print(json.dumps(row | ({"weights": weights[0].tolist()} if weights else {}), ensure_ascii=False))
        return
    display.rows(tokenizer, encoded.train, 5)
    trained = np.add.reduceat((np.asarray(encoded.train.labels) != -100).astype(np.int64), encoded.train.offsets[:-1])
    display.histogram("Tokens a row", encoded.train.lengths)
    display.histogram("Share of a row that is trained", trained / encoded.train.lengths)
    console.print(encoded.ledger.table())


if __name__ == "__main__":
    run(main)
