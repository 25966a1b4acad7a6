"""Which options each script of launch/ has, and the JSON schemas of their recipes, which editors complete and check."""

import json
from pathlib import Path
from typing import Any

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.corpus_options import CorpusOptions, SealOptions, TokenizerOptions
from accel_llm.config.fields import Options
from accel_llm.config.hub_options import PushOptions
from accel_llm.config.options import SftOptions
from accel_llm.config.plan_options import PlanOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.config.tool_options import (
    ChatOptions,
    ExportOptions,
    ExtractOptions,
    MergeOptions,
    MethodsOptions,
    PredictOptions,
    ReportOptions,
    ShowOptions,
)

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
    "export": ExportOptions,
    "push": PushOptions,
    "report": ReportOptions,
    "show_methods": MethodsOptions,
}
# Scripts whose first word says what they do; without it they do the first of these.
OPTIONS_BY_STEP: dict[str, dict[str, type[Options]]] = {
    "prepare": {"corpus": CorpusOptions, "seal": SealOptions, "tokenizer": TokenizerOptions},
}
# Scripts that take the options of a training script, which their first word names (without it sft), and their own.
OPTIONS_BESIDE: dict[str, type[Options]] = {"show_data": ShowOptions, "plan": PlanOptions}


def options_of_script(name: str, words: list[str]) -> tuple[type[Options], list[str]] | None:
    """Return the options of a script and the words that give them; None if there is no such script."""
    if steps := OPTIONS_BY_STEP.get(name):
        return (steps[words[0]], words[1:]) if words[:1] and words[0] in steps else (next(iter(steps.values())), words)
    if name not in OPTIONS_BESIDE:
        return (SCRIPT_OPTIONS[name], words) if name in SCRIPT_OPTIONS else None
    named = words[:1] and Path(words[0]).stem in TRAINING_SCRIPTS
    kind, rest = (Path(words[0]).stem, words[1:]) if named else ("sft", words)
    return type("Options", (OPTIONS_BESIDE[name], TRAINING_SCRIPTS[kind]), {}), rest


def recipe_schema(options_class: type[Options]) -> dict[str, Any]:
    """Return the JSON schema of a script's recipe."""
    return options_class.model_json_schema(by_alias=True)


def write_schemas(folder: Path) -> None:
    """Write the schema of each training script's recipe into `folder`, as they are in launch/recipes/schemas."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options_class in TRAINING_SCRIPTS.items():
        text = json.dumps(recipe_schema(options_class), indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
