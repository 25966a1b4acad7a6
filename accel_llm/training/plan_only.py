"""Steps of launch/plan.py, which trains nothing: read options and the model's config, say what fits and what would."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.defaults import fill_method_options
from accel_llm.adapters.methods import check_method
from accel_llm.adapters.refusals import check_quantized_base
from accel_llm.backend.launch_yaml import as_launched
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.command_line import parse_options
from accel_llm.config.plan_options import SPELLINGS, Cards, parse_cards
from accel_llm.config.preference_options import RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.classifier import score_config
from accel_llm.model.loading import load_model_config
from accel_llm.model.model_names import model_problems
from accel_llm.model.parameter_counts import count_from_config
from accel_llm.report.plan_text import Lines, changed_settings, count_of
from accel_llm.training.classes import fit_to_model
from accel_llm.training.memory_estimate import GB, memory_savings
from accel_llm.training.memory_search import StrategyPlan

_SAVINGS_SHOWN = 4
DEFAULTS_OF_PRETRAIN = {"method": "full", "overlong": "split"}


def read_plan_options(options_class: Any, script: str) -> tuple[Any, PreTrainedConfig, Cards]:
    """Read and check the options of launch/plan.py; return them, the model's config, and the cards to plan for.

    Raises:
        ConfigError: an option, the model's config or `gpu` cannot be used. It lists all problems of the options.
    """
    options = parse_options(options_class, sys.argv[1:], DEFAULTS_OF_PRETRAIN if script == "pretrain" else None)
    options = fill_method_options(adopt_adapter_options(options))
    check_method(options)
    raise_problems(_missing_cards(options) + model_problems(options))
    quiet_libraries()
    cards = parse_cards(options.gpu) if options.gpu else _cards_here()
    if isinstance(options, ClassifyOptions):
        options = fit_to_model(options)
    config = load_model_config(options, options.max_length)
    check_quantized_base(options, config)
    return options, score_config(config) if isinstance(options, RewardOptions) else config, cards


def _missing_cards(options: Any) -> list[str]:
    return (
        []
        if options.gpu or torch.cuda.is_available()
        else [f"gpu: is missing, and there is none here; give {SPELLINGS}."]
    )


def _cards_here() -> Cards:
    return Cards(torch.cuda.get_device_properties(0).total_memory / GB, torch.cuda.device_count())


def describe_model(options: Any, config: PreTrainedConfig, plans: list[StrategyPlan], cards: Cards) -> Lines:
    """Return lines on what is planned. Every row is taken as full, whatever the data is.

    Raises:
        ConfigError: the options can run under none of the launch YAMLs.
    """
    estimate = next((plan.estimate for plan in plans if plan.estimate), None)
    if estimate is None:
        raise ConfigError(*dict.fromkeys(f"{plan.refused}." for plan in plans))
    name, share = options.model_name_or_path or options.config_name, estimate.trainable / estimate.parameters
    rows = count_of(options.per_device_train_batch_size, "row")
    counts = count_from_config(config) if isinstance(options, PretrainOptions) else None
    parameters = counts.describe() if counts else f"{estimate.parameters:,} parameters"
    return [
        ("model", f"{name}: {parameters}, {estimate.trainable:,} ({share:.2%}) trained"),
        ("planned for", f"{count_of(cards.count, 'GPU')} of {cards.gigabytes:g} GB; full micro-batches of {rows} of "
         f"{options.max_length:,} tokens; no data is read"),
        ("settings", changed_settings(options)),
    ]  # fmt: skip


def advise_plan(
    options: Any, config: PreTrainedConfig, plans: list[StrategyPlan], cards: Cards, chosen: Path | None, script: str
) -> Lines:
    """Return lines on what fits the cards, and what to change where nothing does."""
    usable = [plan for plan in plans if plan.estimate is not None]
    fitting = [plan for plan in usable if plan.fits(cards.gigabytes)]
    asked = next((plan for plan in usable if chosen is not None and plan.path.resolve() == chosen.resolve()), None)
    # The first one sends the least between the processes.
    best = asked or (
        fitting[0] if fitting else min(usable, key=lambda plan: plan.estimate.total if plan.estimate else 0)
    )
    assert best.estimate is not None
    total, has = best.estimate.total / GB, f"of {cards.gigabytes:g} GB"
    if best.fits(cards.gigabytes):
        command = f"accelerate launch --config_file {_shown(best.path)} launch/{script}.py ..."
        return [("fits", f"{best.name}: {total:.1f} {has}; start it with `{command}`")]
    lines = [("too large", f"{best.name}: {total:.1f} {has}")]
    if others := [plan.name for plan in fitting]:
        lines.append(("what fits", f"the same under {', '.join(others)}"))
    with as_launched(best.path, cards.count):
        savings = memory_savings(options, config, cards.count, known=best.figures)
    named = ", ".join(f"{setting} ({size / GB:.1f} GB)" for setting, size in savings[:_SAVINGS_SHOWN])
    return [*lines, ("saves most", named or "a smaller model, or more and larger cards")]


def _shown(path: Path) -> Path:
    """Return the path from the current folder, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
