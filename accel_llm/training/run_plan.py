"""Says before any weight is read what a run will do: its size, steps, memory, disk, and where everything will lie."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.adapters.defaults import describe_rate, method_notes
from accel_llm.backend.strategy import resolve_precision, strategy
from accel_llm.config.options import TrainOptions
from accel_llm.config.preference_options import KtoOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.answers import advise_weights, as_units
from accel_llm.data.prepare import EncodedData
from accel_llm.data.rows import cache_folder
from accel_llm.data.stream import TrainingPlan
from accel_llm.errors import ConfigError
from accel_llm.model.parameter_counts import ParameterCounts, count_from_config
from accel_llm.model.stored_dtypes import StoredDtypes
from accel_llm.report import plan_text
from accel_llm.report.display import advise, show_ledger
from accel_llm.report.plan_text import Lines, describe_size
from accel_llm.report.row_text import show_rows
from accel_llm.training.memory_estimate import MemoryEstimate
from accel_llm.training.memory_report import RunMemory, find_memory, memory_problem

SAMPLE_ROWS = 3


def show_run_plan(
    accelerator: Accelerator,
    options: TrainOptions,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    data: EncodedData,
    plan: TrainingPlan,
) -> dict[str, Any]:
    """Print the ledger, the plan, the settings that differ from the defaults, and advice, on the main process.

    With `verbose` all settings, sample rows and the whole ledger too. Returns the estimated memory and the disk that is
    needed, for run.json and the verdict of `check_only`; an empty dict on the other processes.

    Raises:
        ConfigError: the method cannot compute on this model, or not with these options, or the disk is too small.
    """
    if not accelerator.is_main_process:
        return {}
    if options.verbose:
        plan_text.show_settings(options)
        show_rows(tokenizer, data.train, SAMPLE_ROWS, data.labels)
        show_ledger(data.ledger)
    else:
        plan_text.show_lost_rows(data.ledger)
    memory = find_memory(accelerator, options, config, data.train)
    disk, problem = disk_needs(options, config, plan, memory.estimate)
    counts = count_from_config(config) if isinstance(options, PretrainOptions) else None
    lines = _lines_on_the_model(accelerator, options, memory.estimate, counts) + _lines_on_the_steps(
        options, data, plan
    )
    lines += _lines_on_the_machine(options, memory, disk)
    plan_text.show_lines([*lines, ("settings", plan_text.changed_settings(options))])
    starts = not (options.dry_run or options.check_only)
    if problem and starts and options.preflight:
        raise ConfigError(f"{problem} To start all the same, say --preflight false.")
    for sentence in (*plan_text.plan_warnings(options, plan), *_notes(options, config, data), problem):
        if sentence:
            advise(accelerator, sentence)
    if sentence := memory_problem(accelerator, options, config, data.train, memory):
        advise(accelerator, sentence)
    facts = {"disk_problem": problem} if problem else {}
    return memory.facts() | facts | ({"parameters": asdict(counts)} if counts else {})


def _lines_on_the_model(
    accelerator: Accelerator, options: TrainOptions, estimate: MemoryEstimate | None, counts: ParameterCounts | None
) -> Lines:
    name = options.model_name_or_path
    if isinstance(options, PretrainOptions) and options.config_name:
        name = f"random weights, {options.config_name}"
    size = f"{counts.describe()}, method {options.method}" if counts else f"method {options.method}"
    if estimate and estimate.parameters:
        share = estimate.trainable / estimate.parameters
        trained = "all" if share == 1 else f"{estimate.trainable:,} ({share:.2%})"
        rows = " without the rows of added tokens" if getattr(options, "add_tokens", False) else ""
        parameters = counts.describe() if counts else f"{estimate.parameters:,} parameters{rows}"
        size = f"{parameters}, {trained} trained by method {options.method}"
    device = "the CPU"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    return [
        ("model", f"{name}: {size}"),
        ("device", f"{processes} on {device}, {strategy()}, {resolve_precision(options)}"),
    ]


def _lines_on_the_steps(options: TrainOptions, data: EncodedData, plan: TrainingPlan) -> Lines:
    evaluated = 0 if data.eval is None else len(as_units(data.eval))
    return [
        ("sources", plan_text.describe_ledger(data.ledger)),
        ("data", plan_text.describe_rows(data.train, plan, options)),
        ("steps", plan_text.describe_steps(plan)),
        ("learning rate", describe_rate(options)),
        ("evaluations", plan_text.describe_evaluations(plan, options, evaluated)),
        ("checkpoints", plan_text.describe_saves(plan, options)),
    ]


def _lines_on_the_machine(options: TrainOptions, memory: RunMemory, disk: str) -> Lines:
    host, folder = memory.describe_host(), Path(options.run_folder)
    time = "measured now" if options.check_only else "unknown before the first steps; --check_only measures it"
    return [
        ("memory", memory.describe()),
        *([("host memory", host)] if host else []),
        ("disk", disk),
        ("time", time),
        ("output", f"{folder}; encoded rows in {cache_folder(options)}"),
    ]


def _notes(options: TrainOptions, config: PreTrainedConfig, data: EncodedData) -> list[str]:
    notes = method_notes(options, config)
    if isinstance(options, KtoOptions) and data.train.label is not None:
        weights = options.desirable_weight, options.undesirable_weight
        notes += filter(None, [advise_weights(data.train.label, *weights)])
    return notes


def disk_needs(
    options: TrainOptions, config: PreTrainedConfig, plan: TrainingPlan, estimate: MemoryEstimate | None
) -> tuple[str, str]:
    """Say what checkpoints and export take of the disk of the output folder, and what it has free.

    The second value is a sentence if that is too little, else empty. What an earlier start of the run has there counts
    as free: a checkpoint goes when a newer one is complete.
    """
    place = Path(options.run_folder).absolute()
    earlier = [path for path in (place / "checkpoints").rglob("*") if path.is_file()]
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in earlier)
    if estimate is None:
        return f"unknown without an estimate; {describe_size(free)} free", ""
    count = plan_text.checkpoints_at_once(plan, options)
    checkpoints, export = count * estimate.checkpoint, export_bytes(options, config, estimate)
    at_once = f"{count:,} at once, of {describe_size(estimate.checkpoint)} each" if count > 1 else "one"
    text = (
        f"{describe_size(checkpoints)} for checkpoints ({at_once}), {describe_size(export)} for the export; "
        f"{describe_size(free)} free"
    )
    if checkpoints + export <= free:
        return text, ""
    return text, (
        f"output_dir: the checkpoints and the export need {describe_size(checkpoints + export)}, but the disk of {place} "
        f"has {describe_size(free)} free; name another folder, or lower save_total_limit."
    )


def export_bytes(options: TrainOptions, config: PreTrainedConfig, estimate: MemoryEstimate) -> int:
    """Return about how many bytes the weights of the export have: of an adapter as trained, of a model as in its files."""
    if options.has_adapter:
        return 4 * estimate.trainable
    return StoredDtypes(options, config).main.itemsize * estimate.parameters
