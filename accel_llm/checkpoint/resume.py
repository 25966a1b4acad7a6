"""Decides where a run starts: may it use its output folder, which checkpoint does it continue, do settings match?"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from accel_llm.adapters.locate import find_adapter
from accel_llm.backend.collectives import sum_on_cpus
from accel_llm.backend.strategy import rows_per_step
from accel_llm.checkpoint.files import open_checkpoint
from accel_llm.config.command_line import resolved_options
from accel_llm.config.data_options import DataOptions
from accel_llm.config.options import RunOptions, TrainOptions
from accel_llm.config.preference_options import PreferenceOptions
from accel_llm.data.rows import Rows
from accel_llm.data.sources import as_source
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.fresh_config import family_fingerprint, is_family
from accel_llm.preference.reference import reference_name
from accel_llm.system.folders import hidden_sibling
from accel_llm.system.launcher import process_rank
from accel_llm.system.manifest import find_damage, remove_folder
from accel_llm.system.run_lock import RUN_FILES
from accel_llm.training.best import Best
from accel_llm.training.schedule import SCHEDULE_OPTIONS, same_rates, schedule_arguments
from accel_llm.training.start import Start

# Options that shape the saved state: a checkpoint cannot be loaded under another value.
FIXED_OPTIONS = (
    "method", "method_options", "optim", "lora_r", "lora_bias", "lora_target_modules", "modules_to_save", "use_dora", "add_tokens",
    "master_weights", "init_lora_weights", "prompt_ensemble", "config_overrides",
)  # fmt: skip
# Options that change where, how fast and how verbosely a run works, but not one number of its training. The split of a
# step's rows over processes and micro-batches is among them; the number of rows in a step is compared separately.
HARMLESS_OPTIONS = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_changed", "adapter_name_or_path",
    "logging_steps", "save_steps", "save_total_limit", "save_async", "report_to", "run_name", "project", "dry_run", "check_only",
    "preflight", "verbose", "push_to_hub", "hub_model_id", "hub_private_repo",
    "eval_steps", "eval_on_start", "eval_generate", "per_device_eval_batch_size", "cache_dir", "trust_remote_code",
    "preprocessing_num_workers", "gradient_checkpointing", "metric_for_best_model", "max_skipped_steps", "overfit",
    "early_stopping_patience",
    "per_device_train_batch_size", "gradient_accumulation_steps", "total_batch_size", "max_lost", "on_bad_row",
    "tokens_per_step", "max_tokens", "warmup_tokens", "decay_tokens", "batch_warmup_tokens",  # each sets one in steps
    "sample_text", "sample_steps", "sample_tokens",
}  # fmt: skip
# Options of the end of a run. They may differ as long as every learning rate up to the checkpoint is the same.
END_OPTIONS = {
    "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "min_lr_rate", "decay_share", "decay_steps",
}  # fmt: skip
# Options that say where model and data are. A fingerprint of the content (base or data) decides, not the place.
LOCATION_OPTIONS = {
    "model_name_or_path": "base", "config_name": "base", "revision": "base",
    "reference_model_name_or_path": "reference", "tokenizer_name": "data", "train_files": "data", "eval_files": "data", "chat_template": "data",
}  # fmt: skip
DESCRIPTIONS = {"base": ("model_name_or_path", "the model with the fingerprint"), "data": ("train_files", "the rows")}
DATA_OPTIONS = set(DataOptions.model_fields)


def run_identity(options: TrainOptions, rows: Rows) -> dict[str, Any]:
    """Identify a run beyond its options: fingerprints of model, rows and reference, and the rows in a step."""
    # pretrain.py starts from a config instead of a model.
    config = getattr(options, "config_name", None)
    name = str(config or options.model_name_or_path)
    family = bool(config) and is_family(name)
    base = family_fingerprint(name) if family else model_fingerprint(name, options.revision)
    # The rows: their content, their lengths, their sources, and the weight of each source.
    digest = hashlib.sha256(str([as_source(source).weight for source in options.train_files]).encode())
    for array in (rows.digest, rows.offsets, rows.source):
        digest.update(np.ascontiguousarray(array).tobytes())
    if rows.streamed is not None:
        digest.update(rows.streamed.identity.encode())
    identity = {"base": base, "data": digest.hexdigest()[:16], "total_batch_size": rows_per_step(options)}
    if isinstance(options, PreferenceOptions) and options.needs_reference:
        identity["reference"] = reference_name(options)
    return identity


def find_start(accelerator: Accelerator, options: TrainOptions, rows: Rows) -> Start:
    """Decide from `output_dir` and `resume_from_checkpoint` where to start. Every process gets the same answer.

    Nothing is written or removed yet. `Checkpoints.resume` does that, after model, adapter and backend are set up.

    Raises:
        ConfigError: the folder holds a finished run, other files, only damaged checkpoints, or what this run reads; or
            the named checkpoint is damaged or belongs to another run.
    """
    folder, choice = Path(options.output_dir), options.resume_from_checkpoint
    rank, world = accelerator.process_index, accelerator.num_processes
    find_problem = partial(find_damage, rank=rank, world=world, add_up=partial(sum_on_cpus, accelerator))
    _check_usable(folder, options)
    # A checkpoint that the user names, or the newest intact one in the folder.
    checkpoint = None
    if choice not in ("auto", "none"):
        checkpoint = Path(choice)
        if problem := find_problem(checkpoint):
            raise ConfigError(f"resume_from_checkpoint: {choice} {problem}.")
        _check_no_other_run(folder, checkpoint, options.overwrite_output_dir)
    elif choice == "auto" and not options.overwrite_output_dir:
        checkpoint = newest_checkpoint(folder / "checkpoints", find_problem)
        if checkpoint is None and any((folder / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"resume_from_checkpoint: auto: none of the checkpoints in {folder / 'checkpoints'} is intact; repair "
                "one, or set resume_from_checkpoint: none to start anew."
            )
    if checkpoint is None or not _is_in(folder, checkpoint):
        _check_no_source_is_removed(folder, options)
    # No process may write before all have read the folder.
    accelerator.wait_for_everyone()
    fresh = Start(output_dir=folder, identity=run_identity(options, rows), rank=rank, world=world)
    return fresh if checkpoint is None else _continue_from(fresh, checkpoint, options)


def _check_usable(folder: Path, options: RunOptions) -> None:
    """Refuse an output_dir that holds a finished run, or files that are not a run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder.")
    # Hidden files were left by a killed process.
    if options.overwrite_output_dir or not any(path for path in folder.glob("*") if path.name[0] != "."):
        return
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        status = run["status"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"output_dir: {folder} holds files that are not a run of this project; name another folder, or set "
            "overwrite_output_dir."
        ) from None
    if status == "done":
        raise ConfigError(
            f"output_dir: {folder} holds a finished run; name another folder, or set overwrite_output_dir to start "
            "anew."
        )


def _check_no_other_run(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """Refuse a checkpoint of another folder if this folder holds checkpoints too: they would have to be removed."""
    if not _is_in(folder, checkpoint) and not overwrite and any((folder / "checkpoints").glob("step-*")):
        raise ConfigError(
            f"output_dir: {folder} holds checkpoints of another run than {checkpoint}; name another folder, or set "
            "overwrite_output_dir."
        )


def _is_in(folder: Path, checkpoint: Path) -> bool:
    """Tell whether a checkpoint is one of the run in `folder`."""
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


def _check_no_source_is_removed(folder: Path, options: TrainOptions) -> None:
    """Refuse to remove the files of an earlier run in `folder` if this run reads some of them, such as its export."""
    sources = {name: [getattr(options, name, None)] for name in ("model_name_or_path", "config_name", "tokenizer_name")}
    sources["adapter_name_or_path"] = [options.adapter_name_or_path and str(find_adapter(options.adapter_name_or_path))]
    sources["chat_template"] = [options.chat_template]
    for name in ("train_files", "eval_files"):
        sources[name] = [as_source(source).path for source in getattr(options, name)]
    removed = [(folder / name).resolve() for name in RUN_FILES]
    raise_problems(
        [
            f"{name}: {place} is a part of the earlier run in {folder}, which this run replaces; move it, or name "
            "another output_dir."
            for name, places in sources.items()
            for place in places
            if place and any(Path(place).resolve().is_relative_to(path) for path in removed)
        ]
    )


def newest_checkpoint(folder: Path, find_problem: Callable[[Path], str | None]) -> Path | None:
    """Return the newest intact checkpoint in `folder`, or None. Damaged ones are reported and skipped."""
    paths = sorted(folder.glob("step-*"))
    for path in reversed(paths):
        problem = find_problem(path)
        if problem is None:
            return path
        if process_rank() == 0:
            print(f"checkpoint {path} {problem}{'; taking an older one' if path != paths[0] else ''}", flush=True)
    return None


def remove_obsolete_files(start: Start) -> None:
    """Remove what this run replaces: the files of another run, or the checkpoints after the one that it continues."""
    checkpoints = start.output_dir / "checkpoints"
    obsolete = [start.output_dir / name for name in RUN_FILES]
    obsolete += [hidden_sibling(path, "old") for path in obsolete]  # left by a process that was killed during an export
    if start.folder is not None and _is_in(start.output_dir, start.folder):
        # Rotation keeps the highest step numbers, so these later checkpoints would displace new ones.
        obsolete = []
        for path in checkpoints.glob("step-*"):
            if path.name > start.folder.name:
                remove_folder(path)
    # A killed process may have left an unfinished checkpoint, export or run.json.
    for path in [*checkpoints.glob(".*.partial"), *start.output_dir.glob(".*.partial"), *obsolete]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    start.output_dir.mkdir(parents=True, exist_ok=True)


def _continue_from(fresh: Start, checkpoint: Path, options: TrainOptions) -> Start:
    """Return the start of a run that continues `checkpoint`."""
    # Settings are compared first: nothing is loaded from a checkpoint of another run.
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    changed = _compare_options(checkpoint, state, options, fresh.identity)
    # With fewer processes than before, each one adds up the sums of several.
    ranks = range(fresh.rank, state["processes"], fresh.world)
    meters = [read_rank_state(checkpoint, rank)["meter"] for rank in ranks]
    meters = meters or [[0.0] * len(read_rank_state(checkpoint, 0)["meter"])]
    # The state of a meter: four sums, the seconds of this process, of which the maximum counts, and what losses measured.
    sums = [sum(values, 0.0) for values in zip(*meters, strict=True)]
    seconds = max(meter[4] for meter in meters)
    start = replace(
        fresh,
        folder=checkpoint,
        step=state["step"],
        rows=state["rows"],
        streams=state.get("streams", []),
        saved=open_checkpoint(checkpoint).parameter_sizes(),
        same_processes=state["processes"] == fresh.world,
        meter=(*sums[:4], seconds, *sums[5:]),
        skipped=state["skipped"],
        spikes=state.get("spikes", 0),
        recent=tuple(map(tuple, state.get("recent", ()))),
        best=_best_so_far(state, options),
        evaluate=state["evaluate"],
        changed=tuple(changed),
    )
    if start.rank == 0:
        _print_start(start, state["processes"])
    return start


def _best_so_far(state: dict[str, Any], options: TrainOptions) -> Best:
    """Return the best evaluation of a checkpoint; by another metric none was compared yet."""
    metric, before = options.metric_for_best_model, state["options"]["metric_for_best_model"]
    return Best(*(state["best"] or ())) if metric == before else Best()


def read_rank_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Return the JSON values that one process saved."""
    return json.loads((checkpoint / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))


def _print_start(start: Start, processes: int) -> None:
    """Say which checkpoint is continued and what differs; `processes` is how many saved it."""
    print(f"resuming from {start.folder}, step {start.step}", flush=True)
    if not start.same_processes:
        print(
            f"saved by {processes} processes, continued by {start.world}: the same rows and the exact state, but "
            "dropout and noise are drawn anew",
            flush=True,
        )
    for name in start.changed:
        print(f"allowed to differ from the checkpoint: {name}", flush=True)


def _compare_options(
    checkpoint: Path, state: dict[str, Any], options: TrainOptions, identity: dict[str, Any]
) -> list[str]:
    """Return the names of the options that differ from the checkpoint's and are allowed to.

    Raises:
        ConfigError: options differ that may not, or that are not named in allow_changed.
    """
    now, before = resolved_options(options), state["options"]
    differ = [name for name in now if name in before and now[name] != before[name] and name not in HARMLESS_OPTIONS]
    changed_content = {kind for kind in identity if identity[kind] != state["identity"].get(kind, identity[kind])}
    # Another path is fine as long as the content is the same.
    differ = [
        name for name in differ if LOCATION_OPTIONS.get(name) is None or LOCATION_OPTIONS[name] in changed_content
    ]
    if END_OPTIONS.intersection(differ) and _same_so_far(state, options):
        differ = [name for name in differ if name not in END_OPTIONS]
    problems = {name: (f"{before[name]!r}", f"{now[name]!r}") for name in differ}

    # Content that changed at the same path is named by its fingerprint, unless a changed option explains it already.
    for kind in changed_content & DESCRIPTIONS.keys():
        if not any(LOCATION_OPTIONS.get(name) == kind or (kind == "data" and name in DATA_OPTIONS) for name in differ):
            name, description = DESCRIPTIONS[kind]
            problems[name] = (f"{description} {state['identity'][kind]}", identity[kind])
    if "total_batch_size" in changed_content:
        problems["total_batch_size"] = (state["identity"]["total_batch_size"], identity["total_batch_size"])

    allowed = set(options.allow_changed) - set(FIXED_OPTIONS)
    # What the run was compared with so far is gone: an option that decides it may have been allowed for other reasons.
    other_reference = "reference" in changed_content and "reference_model_name_or_path" not in differ
    if other_reference and problems.keys() <= allowed:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} was trained against another reference than this run has; give the "
            "model, the adapter, the options of the method, precision, attention and seed that it had, or "
            "resume_from_checkpoint: none."
        )
    raise_problems(
        [
            f"{name}: {checkpoint} was saved with {old}, this run has {new}; give the same, "
            + ("" if name in FIXED_OPTIONS else f"allow it by allow_changed: {name}, ")
            + "or resume_from_checkpoint: none."
            for name, (old, new) in problems.items()
            if name not in allowed
        ]
    )
    return sorted(problems)


def _same_so_far(state: dict[str, Any], options: TrainOptions) -> bool:
    """Return whether a run with `options` would have come to the same checkpoint, though it ends elsewhere.

    So it is in the stable part of warmup_stable_decay: the decay of either run is still to come. The number of steps must
    be known before rows are packed (max_steps), and AdaLoRA's ranks follow the number of all steps.
    """
    before = state["options"]
    if "total_steps" not in state or options.max_steps is None or options.method == "adalora":
        return False
    rates = {argument: before.get(name) for argument, name in SCHEDULE_OPTIONS.items()}
    return same_rates(rates, state["total_steps"], schedule_arguments(options), options.max_steps, state["step"])
