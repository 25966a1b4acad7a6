"""The demo as files: its base model, data and recipe where a person named none."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import PretrainOptions, TrainOptions
from accel_llm.data.rows import cache_folder
from accel_llm.demo.skills import DOCUMENTS, demo_conversations, demo_documents
from accel_llm.demo.tokenizer import build_demo_tokenizer, demo_base_config
from accel_llm.system.disk import write_atomically

TrainOptionsT = TypeVar("TrainOptionsT", bound=TrainOptions)
DEMO_NAME = "demo"
DEMO_BASE = Path(__file__).parents[1] / "demo_base"


def resolve_demo(options: TrainOptionsT) -> TrainOptionsT:
    """Replace the name `demo` by files: the shipped base as model, generated conversations or texts as data."""
    folder = cache_folder(options)
    found: dict[str, Any] = {}
    if options.model_name_or_path == DEMO_NAME:
        found["model_name_or_path"] = str(DEMO_BASE)
    if isinstance(options, PretrainOptions) and options.config_name == DEMO_NAME:
        found["config_name"] = _write_shape(folder / f"demo-shape-{os.getpid()}")
    if options.train_files == [DEMO_NAME]:
        if isinstance(options, PretrainOptions):
            found["train_files"] = [
                _write(folder / "demo-text.jsonl", ({"text": t} for t in demo_documents(0, DOCUMENTS)))
            ]
        else:
            found["train_files"] = [_write(folder / "demo-train.jsonl", demo_conversations("train"))]
    if options.eval_files == [DEMO_NAME]:
        found["eval_files"] = [_write(folder / "demo-eval.jsonl", demo_conversations("eval"))]
    return options.model_copy(update=found)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Every process writes the same bytes, each to a file of its own that then takes the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def _write_shape(folder: Path) -> str:
    """The config and tokenizer that the base is built from: nothing of the shipped folder goes into a rebuild."""
    demo_base_config().save_pretrained(folder)
    build_demo_tokenizer().save_pretrained(folder)
    return str(folder)


def parse_or_demo(options_class: type[TrainOptionsT], recipe: Path, argv: list[str]) -> TrainOptionsT:
    """The options of a script; its demo recipe's where the person named no model, data or recipe."""
    options = parse_options(options_class, argv)
    if "--config" not in argv and options.model_name_or_path is None and not options.train_files:
        options = parse_options(options_class, ["--config", str(recipe), *argv])
    return resolve_demo(options)
