"""See what a model would be trained on: rows with what is trained in green, bad rows in red, lengths, and the ledger.

    python launch/show_data.py --model_name_or_path Qwen/Qwen3-0.6B --train_files chats.jsonl
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --rows 20 --random
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --row 7
    python launch/show_data.py --tokenizer_name Qwen/Qwen3-0.6B --train_files chats.jsonl --json > rows.jsonl
    python launch/show_data.py dpo --tokenizer_name Qwen/Qwen3-0.6B --train_files pairs.jsonl

The first word names a training script: sft (the default), dpo, kto, reward or classify; rows are read as it reads them,
and it takes the options of it. It reads the tokenizer, never the weights; rows of plain text need no chat template. If
training would refuse the data, everything is shown all the same; the last line says why, and the exit code is 2. With
--json the rows go to standard output, one JSON object a line, and the ledger goes to standard error.
"""

import itertools
import json
import sys
from collections.abc import Iterable

import accel_llm.config.early

from rich.console import Console

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.tool_options import ShowOptions
from accel_llm.data.prepare import EncodedData
from accel_llm.data.samples import Sample
from accel_llm.report import display, row_text
from accel_llm.report.row_objects import row_objects, sample_objects
from accel_llm.system.exit import run_script
from accel_llm.training import data_only


class Options(ShowOptions, SftOptions):
    """The options of sft.py, of which only those about data matter here, and what is shown."""


class OptionsForDpo(ShowOptions, DpoOptions):
    """The same of dpo.py."""


class OptionsForKto(ShowOptions, KtoOptions):
    """The same of kto.py."""


class OptionsForReward(ShowOptions, RewardOptions):
    """The same of reward.py."""


class OptionsForClassify(ShowOptions, ClassifyOptions):
    """The same of classify.py."""


SCRIPTS = {"sft": Options, "dpo": OptionsForDpo, "kto": OptionsForKto, "reward": OptionsForReward}
SCRIPTS |= {"classify": OptionsForClassify}
DEMOS = {"reward": "demo_reward", "classify": "demo_classify"}  # recipes; the others show the rows of demo


def main() -> None:
    script = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in SCRIPTS else "sft"
    options = data_only.read_data_options(SCRIPTS[script], DEMOS.get(script, "demo"))
    reader = data_only.open_reader(options)
    data, refusal = reader.encode() if options.row is None else (None, None)
    samples = reader.choose_samples(options, data)
    if options.json_lines:
        some = bool({"rows", "random", "row"} & options.model_fields_set)
        print_json(reader, samples if some or data is None else reader.left_out_samples(data), None if some else data)
    elif samples:
        row_text.show_samples(reader.tokenizer, samples)
    if data and not options.json_lines:
        row_text.show_numbers(data.train)
    if data:
        display.show_ledger(data.ledger, Console(stderr=True, highlight=False) if options.json_lines else None)
    reader.raise_refusal(refusal, data, samples)


def print_json(reader: data_only.RowReader, samples: Iterable[Sample], data: EncodedData | None) -> None:
    """Print a JSON object for each row of `data`, and then for each of `samples`."""
    is_utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
    rows = row_objects(reader.tokenizer, data.train, data.labels) if data else ()
    for row in itertools.chain(rows, sample_objects(reader.tokenizer, samples)):
        # Half a surrogate pair, in the name of a file, cannot be written as UTF-8; its escape means the same.
        print(json.dumps(row, ensure_ascii=not is_utf8).encode(errors="backslashreplace").decode())


if __name__ == "__main__":
    run_script(main)
