"""temporary: to be folded into demo.py"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from accel_llm import demo
from accel_llm.config import parse
from accel_llm.data import cache_folder
from accel_llm.options import TrainOptions

OptionsT = TypeVar("OptionsT", bound=TrainOptions)
NAME = "demo"
DOCUMENTS = 60_000


def resolve(options: OptionsT) -> OptionsT:
    """Replace the name `demo` by files: the shipped base as model, generated conversations or texts as data."""
    folder = cache_folder(options)
    found: dict[str, Any] = {}
    for field in ("model_name_or_path", "tokenizer_name", "config_name"):
        if getattr(options, field, None) == NAME:
            found[field] = str(demo.BASE)
    if getattr(options, "train_files", None) == [NAME]:
        if hasattr(options, "text_column"):
            found["train_files"] = [
                _write(folder / "demo-text.jsonl", ({"text": t} for t in demo.documents(0, DOCUMENTS)))
            ]
        else:
            found["train_files"] = [_write(folder / "demo-train.jsonl", demo.conversations("train"))]
    if getattr(options, "eval_files", None) == [NAME]:
        found["eval_files"] = [_write(folder / "demo-eval.jsonl", demo.conversations("eval"))]
    return options.model_copy(update=found)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Every process writes the same bytes, each to a file of its own that then takes the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
    return str(path)


def parse_or_demo(options_class: type[OptionsT], recipe: Path, argv: list[str]) -> OptionsT:
    """The options of a script; its demo recipe's where the person named no model, data or recipe."""
    options = parse(options_class, argv)
    if "--config" not in argv and options.model_name_or_path is None and not options.train_files:
        options = parse(options_class, ["--config", str(recipe), *argv])
    return resolve(options)
