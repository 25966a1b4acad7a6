"""Which options each script of launch/ has, and the JSON schemas of their recipes, which editors complete and check."""

import json
from pathlib import Path
from typing import Any

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.fields import Options
from accel_llm.config.options import PretrainOptions, SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.tool_options import ChatOptions, ExtractOptions, MergeOptions, MethodsOptions, PredictOptions

TRAINING_SCRIPTS: dict[str, type[Options]] = {
    "sft": SftOptions,
    "pretrain": PretrainOptions,
    "dpo": DpoOptions,
    "kto": KtoOptions,
    "reward": RewardOptions,
    "classify": ClassifyOptions,
}
SCRIPT_OPTIONS: dict[str, type[Options]] = TRAINING_SCRIPTS | {
    "chat": ChatOptions,
    "predict": PredictOptions,
    "merge": MergeOptions,
    "extract": ExtractOptions,
    "show_methods": MethodsOptions,
}


def recipe_schema(options_class: type[Options]) -> dict[str, Any]:
    """Return the JSON schema of a script's recipe."""
    return options_class.model_json_schema(by_alias=True)


def write_schemas(folder: Path) -> None:
    """Write the schema of each training script's recipe into `folder`, as they are in launch/recipes/schemas."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options_class in TRAINING_SCRIPTS.items():
        text = json.dumps(recipe_schema(options_class), indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
