"""The head of a classifier that an adapter makes of a base: its labels, and whether all of its weights are in files."""

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from accel_llm.adapters.compat import PEFT_PREFIX, SavedAdapter
from accel_llm.data.labels import REGRESSION, SINGLE_LABEL
from accel_llm.errors import ConfigError
from accel_llm.merge.skeleton import model_class
from accel_llm.model.classifier import HEAD, has_scores, score_config
from accel_llm.model.encoders import classifier_config
from accel_llm.model.loading import short_reason

_UNLIKELY = 1013  # a number of labels that is the width of no layer


def adapted_config(config: PreTrainedConfig, adapter: SavedAdapter, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the config of the classifier that an adapter makes of a base with `config`.

    The labels are those of config.json in the adapter's folder. An adapter of plain PEFT has none: then their number is
    that of the rows of the head in its file. They have the names of the base, if it is a classifier with as many, or else
    those that transformers gives them (LABEL_0, ...). One label is a score, several exclude each other, unless a config
    says something else.

    Raises:
        ConfigError: config.json in the adapter's folder cannot be read, or the family has no classifiers.
    """
    saved, head = _read_saved_labels(adapter.folder), _head_weights(config, "SEQ_CLS", trust_remote_code)
    rows = count_head_rows(config, adapter, trust_remote_code)
    if saved is not None:
        problem_type, names = saved
        names = names or _generic_names(rows or 2)
    elif rows is None or (has_scores(config) and rows == config.num_labels):
        problem_type, names = config.problem_type, class_names(config)
    elif rows == 1 and head == [f"{HEAD}.weight"]:  # an answer's reward, as from launch/reward.py
        problem_type, names = REGRESSION, class_names(score_config(config))
    else:
        problem_type, names = None, _generic_names(rows)
    config = complete_config(classifier_config(config, (problem_type, names)))
    if head == [f"{HEAD}.weight"]:
        config.pad_token_id = _pad_token_id(adapter.folder, config.pad_token_id)
    return config


def complete_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a classifier with a problem type: one label is a score, several exclude each other."""
    config = deepcopy(config)
    config.problem_type = config.problem_type or (SINGLE_LABEL if len(class_names(config)) > 1 else REGRESSION)
    return config


def class_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of the classes in the order of their numbers."""
    names: Any = config.id2label
    return [str(names[number]) for number in sorted(names)]


def _generic_names(count: int) -> list[str]:
    return [f"LABEL_{number}" for number in range(count)]


def _read_saved_labels(folder: Path) -> tuple[str | None, list[str]] | None:
    """Return problem type and names in config.json beside an adapter; None if there is none of a classifier.

    transformers does not write the names LABEL_0 and LABEL_1 of two classes; then the list is empty.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = {int(number): str(name) for number, name in (settings.get("id2label") or {}).items()}
        architectures, problem_type = settings.get("architectures") or [""], settings.get("problem_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"adapter: {path} cannot be read ({error}).") from None
    if not (names or problem_type or str(architectures[0]).endswith("ForSequenceClassification")):
        return None  # that of a base
    return problem_type, [names[number] for number in sorted(names)]


def count_head_rows(config: PreTrainedConfig, adapter: SavedAdapter, trust_remote_code: bool) -> int | None:
    """Return the number of rows of the head in an adapter's file, or None if it holds no head for its task."""
    task = adapter.config.task_type
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    # The layer itself, or the factor of a LoRA on it.
    stems = [f"{PEFT_PREFIX}{name.removesuffix('.weight')}" for name in _head_weights(config, task, trust_remote_code)]
    names = [f"{stem}{end}" for stem in stems for end in (".weight", ".lora_B.weight")]
    return next((len(adapter.weights[name]) for name in names if name in adapter.weights), None)


def _head_weights(config: PreTrainedConfig, task: str, trust_remote_code: bool) -> list[str]:
    """Return the names of the matrices of a model for `task` that have a row for each label."""
    config = deepcopy(config)
    config.num_labels = _UNLIKELY
    model = _empty_model(config, task, trust_remote_code)
    return [name for name, weight in model.named_parameters() if weight.ndim == 2 and len(weight) == _UNLIKELY]


def _empty_model(config: PreTrainedConfig, task: str, trust_remote_code: bool) -> Any:
    try:
        with torch.device("meta"):
            return model_class(config, task).from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        family = type(config).__name__.removesuffix("Config")
        raise ConfigError(
            f"base: there is no model for {task} of the family {family} ({short_reason(error)})."
        ) from None


def _pad_token_id(folder: Path, old: int | None) -> int | None:
    """Return the id of the pad token of the tokenizer beside an adapter, or `old` if there is none.

    transformers takes the score of a row before its padding, and must know the token that pads.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return old
    new = AutoTokenizer.from_pretrained(str(folder)).pad_token_id
    return old if new is None else new


def check_head_stored(
    missing: Iterable[str], adapters: list[SavedAdapter], source: Path | str, field: str = "base"
) -> None:
    """Check that the adapters hold all weights of a classifier that the files of its base lack (`missing`).

    transformers would draw them at random, at each load anew.

    Raises:
        ConfigError: some weights are in no file.
    """
    stored = {name.removeprefix(PEFT_PREFIX) for adapter in adapters for name in adapter.weights}
    lost = sorted(set(missing) - stored)
    if not lost:
        return
    shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
    if not adapters:
        raise ConfigError(
            f"{field}: {source} lacks the weights {shown}, so its predictions would be random; name a model that was "
            "saved as a classifier."
        )
    raise ConfigError(
        f"{field}: neither {source} nor the adapter {adapters[0].folder} has the weights {shown}, so predictions would be "
        "random; name the classifier that the adapter was trained on with --base, or train the adapter again with these "
        "modules in modules_to_save."
    )
