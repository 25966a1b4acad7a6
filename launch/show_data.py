"""See what a model would be trained on: rows with trained tokens in green, lengths, density, and the ledger.

    python launch/show_data.py --model_name_or_path Qwen/Qwen3-0.6B --train_files chats.jsonl
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --json > rows.jsonl
    python launch/show_data.py dpo --tokenizer_name Qwen/Qwen3-0.6B --train_files pairs.jsonl

The first word names a training script: sft (the default), dpo, kto or reward; rows are read as it reads them, and it
takes the options of it. It reads the tokenizer, never the weights; rows of plain text need no chat template. With
--json the rows go to standard output, one JSON object a line, and the ledger goes to standard error.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.tool_options import ShowOptions
from accel_llm.data.answers import as_units
from accel_llm.data.prepare import encode_conversations
from accel_llm.data.rows import Rows
from accel_llm.report import display
from accel_llm.system.exit import run_script
from accel_llm.training import data_only, setup

SHOWN_ROWS = 5


class Options(ShowOptions, SftOptions):
    """The options of sft.py, of which only those about data matter here, and the output format."""


class OptionsForDpo(ShowOptions, DpoOptions):
    """The same of dpo.py."""


class OptionsForKto(ShowOptions, KtoOptions):
    """The same of kto.py."""


class OptionsForReward(ShowOptions, RewardOptions):
    """The same of reward.py."""


SCRIPTS = {"sft": Options, "dpo": OptionsForDpo, "kto": OptionsForKto, "reward": OptionsForReward}


def main() -> None:
    script = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in SCRIPTS else "sft"
    recipe = "demo_reward" if script == "reward" else "demo"  # those that need no adapter
    options = data_only.read_data_options(SCRIPTS[script], recipe)
    tokenizer, template, no_template = data_only.tokenizer_and_template(options)
    kind = setup.preference_kind(options)
    data = encode_conversations(options, options.seed, tokenizer, template, no_template, kind)
    if options.json_lines:
        is_utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
        for row in json_rows(tokenizer, data.train):
            # Half a surrogate pair, in the name of a file, cannot be written as UTF-8; its escape means the same.
            print(json.dumps(row, ensure_ascii=not is_utf8).encode(errors="backslashreplace").decode())
        display.show_ledger(data.ledger, Console(stderr=True, highlight=False))
        return
    display.show_rows(tokenizer, data.train, SHOWN_ROWS)
    units = as_units(data.train)
    display.show_histogram("Tokens a row" if units is data.train else "Tokens a pair, its prompt once", units.lengths)
    display.show_histogram("Share of a row that is trained", trained_shares(data.train))
    display.show_ledger(data.ledger)


def json_rows(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> Iterator[dict[str, Any]]:
    """Each row with its origin, ids, labels and texts, and with what else the rows have: weights, label, or its pair.

    The two answers of a pair follow each other; `shared_tokens` are the tokens with which both begin.
    """
    for k in range(len(rows)):
        ids, labels = rows[k]
        row = {
            "file": rows.origins[rows.origin[k]].file,
            "row": int(rows.number[k]),
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "text": decode_tokens(tokenizer, ids.tolist()),
            "trained_text": display.trained_text(tokenizer, ids, labels),
        }
        if weights := rows.label_weights([k]):
            row["weights"] = weights[0].tolist()
        if rows.label is not None:
            row["label"] = bool(rows.label[k])
        if rows.shared is not None and rows.margin is not None:
            row |= {"pair": k // 2, "side": ("chosen", "rejected")[k % 2], "shared_tokens": int(rows.shared[k])}
            row["margin"] = float(rows.margin[k])
        yield row


def trained_shares(rows: Rows) -> np.ndarray:
    """The share of trained tokens in each row: float64 [rows]."""
    trained = (np.asarray(rows.labels) != IGNORED).astype(np.int64)
    return np.add.reduceat(trained, rows.offsets[:-1]) / rows.lengths


if __name__ == "__main__":
    run_script(main)
