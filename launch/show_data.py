"""See what a model would be trained on: rows with trained tokens in green, lengths, density, and the ledger.

    python launch/show_data.py --model_name_or_path Qwen/Qwen3-0.6B --train_files chats.jsonl
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --json > rows.jsonl

Takes the data options of sft.py; reads the tokenizer, never the weights.
"""

import json
import sys
from pathlib import Path

import numpy as np

from accel_llm.backend.accelerator import quiet_libraries
from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import configured_template
from accel_llm.config.options import SftOptions
from accel_llm.config.tool_options import ShowOptions
from accel_llm.data.prepare import encode_conversations
from accel_llm.data.sources import source_problems
from accel_llm.demo.files import parse_or_demo
from accel_llm.errors import raise_problems
from accel_llm.model.loading import model_problems
from accel_llm.model.tokenizer import configured_tokenizer
from accel_llm.model.vocabulary import add_missing_tokens
from accel_llm.report.display import show_histogram, show_rows, trained_text
from accel_llm.report.metrics import console
from accel_llm.system.exit import run_script


class Options(ShowOptions, SftOptions):
    """The options of sft.py, of which those about data count, and how to show them."""


def main() -> None:
    options = parse_or_demo(Options, Path(__file__).parent / "recipes" / "demo.yaml", sys.argv[1:])
    # A tokenizer is all that is read of a model, so one with that alone will do.
    raise_problems(source_problems(options) + ([] if options.tokenizer_name else model_problems(options)))
    quiet_libraries()
    tokenizer = configured_tokenizer(options)
    add_missing_tokens(tokenizer, options)
    template = configured_template(tokenizer, options)
    encoded = encode_conversations(options, options.seed, tokenizer, template)
    if options.json_lines:
        for k in range(len(encoded.train)):
            ids, labels = encoded.train[k]
            weights = encoded.train.weights_of([k])
            row = {
                "file": encoded.train.origins[encoded.train.origin[k]].file,
                "row": int(encoded.train.number[k]),
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "text": decode_tokens(tokenizer, ids.tolist()),
                "trained_text": trained_text(tokenizer, ids, labels),
            }
            print(json.dumps(row | ({"weights": weights[0].tolist()} if weights else {}), ensure_ascii=False))
        return
    show_rows(tokenizer, encoded.train, 5)
    trained = np.add.reduceat(
        (np.asarray(encoded.train.labels) != IGNORED).astype(np.int64), encoded.train.offsets[:-1]
    )
    show_histogram("Tokens a row", encoded.train.lengths)
    show_histogram("Share of a row that is trained", trained / encoded.train.lengths)
    console.print(encoded.ledger.table())


if __name__ == "__main__":
    run_script(main)
