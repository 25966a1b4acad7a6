"""Write the demo to files, and use its model, data and recipe when a script gets none."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.command_line import parse_options
from accel_llm.config.options import TrainOptions
from accel_llm.config.preference_options import AnswerOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.rows import cache_folder, cache_problems
from accel_llm.demo.preferences import demo_pairs
from accel_llm.demo.questions import demo_questions
from accel_llm.demo.skills import DOCUMENTS, demo_conversations, demo_documents
from accel_llm.demo.tokenizer import build_demo_tokenizer, demo_base_config
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.system.disk import write_atomically
from accel_llm.system.project_files import project_recipes

TrainOptionsT = TypeVar("TrainOptionsT", bound=TrainOptions)
DEMO_NAME = "demo"  # the value of an option that stands for the demo's model or data
DEMO_BASE = Path(__file__).parents[1] / "demo_base"


def resolve_demo(options: TrainOptionsT) -> TrainOptionsT:
    """Replace the value `demo` by paths: the shipped base as model, and as data generated rows.

    Raises:
        ConfigError: the folder of the caches cannot be written.
    """
    raise_problems(cache_problems(options))  # also the rows that are encoded later are written there
    folder = cache_folder(options)
    changes: dict[str, Any] = {}

    # The model, or the config to build it from.
    if options.model_name_or_path == DEMO_NAME:
        changes["model_name_or_path"] = str(DEMO_BASE)
    if isinstance(options, PretrainOptions) and options.config_name == DEMO_NAME:
        # One folder for each process, because `save_pretrained` does not write in one step.
        changes["config_name"] = _write_base_config(folder / f"demo-shape-{os.getpid()}")

    # The data.
    splits: list[tuple[str, Literal["train", "eval"]]] = [("train_files", "train"), ("eval_files", "eval")]
    for field, split in splits:
        if getattr(options, field) == [DEMO_NAME]:
            changes[field] = [_write_data(folder, options, split)]
    return options.model_copy(update=changes)


def _write_data(folder: Path, options: TrainOptions, split: Literal["train", "eval"]) -> str:
    """Write the rows of a split that the script of these options reads."""
    if isinstance(options, PretrainOptions) and split == "train":
        documents = ({"text": text} for text in demo_documents(0, DOCUMENTS))
        return _write_rows(folder / "demo-text.jsonl", documents)
    if isinstance(options, AnswerOptions):
        return _write_rows(folder / f"demo-pairs-{split}.jsonl", demo_pairs(split))
    if isinstance(options, ClassifyOptions):
        return _write_rows(folder / f"demo-questions-{split}.jsonl", demo_questions(split))
    # Without the column `family`, which no training reads.
    chats = ({"messages": row["messages"]} for row in demo_conversations(split))
    return _write_rows(folder / f"demo-{split}.jsonl", chats)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write JSON lines in one step, since every process writes this file, all with the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def _write_base_config(folder: Path) -> str:
    """Write the config and tokenizer to build the base from, so that a rebuild uses nothing of the shipped folder."""
    demo_base_config().save_pretrained(folder)
    build_demo_tokenizer().save_pretrained(folder)
    return str(folder)


def parse_options_or_demo(options_class: type[TrainOptionsT], recipe: str, argv: list[str]) -> TrainOptionsT:
    """Parse the options of a script; without a model, data and `--config` its demo recipe, named `recipe`, is used.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed, or the demo goes on with an adapter that is
            not there yet.
    """
    options = parse_options(options_class, argv)
    if "--config" not in argv and options.model_name_or_path is None and not options.train_files:
        options = parse_options(options_class, ["--config", str(project_recipes()[recipe]), *argv])
        adapter = options.adapter_name_or_path
        if adapter and not Path(adapter).exists():
            raise ConfigError(
                f"adapter_name_or_path: the demo goes on with {adapter}, which is not there; run launch/sft.py first, "
                "without options, or name a model and data of your own."
            )
    return resolve_demo(options)
