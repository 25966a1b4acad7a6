"""Where a run begins: what an output folder may be used for, which checkpoint is continued, and whether it is of this run."""

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

from accel_llm.backend.collectives import sum_on_hosts
from accel_llm.backend.strategy import rows_per_step
from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import DataOptions, RunOptions, TrainOptions
from accel_llm.data.rows import Rows
from accel_llm.data.sources import as_source
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.system.launcher import process_rank
from accel_llm.system.manifest import find_damage, remove_folder
from accel_llm.training.start import Start

# What a run leaves in its folder. run.json is removed last: without it the rest would be taken for somebody else's.
RUN_FILES = ("metrics.jsonl", "checkpoints", "adapter", "model", "report.html", "logs", "run.json")
# Options that shape the saved state: with another value it has no place to go.
FIXED_OPTIONS = (
    "method",
    "optim",
    "lora_r",
    "lora_bias",
    "lora_target_modules",
    "modules_to_save",
    "use_dora",
    "add_tokens",
)
FIXED_OPTIONS += ("master_weights",)
# They change where, how fast and with how many words a run goes, but not one number of its training. How a step's rows are
# shared out is one of them: how many rows it has is compared.
HARMLESS = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_changed", "adapter_name_or_path"}
HARMLESS |= {"logging_steps", "save_steps", "save_total_limit", "save_async", "report_to", "run_name", "dry_run"}
HARMLESS |= {"check_only", "eval_steps", "eval_on_start", "eval_generate", "per_device_eval_batch_size", "cache_dir"}
HARMLESS |= {"preprocessing_num_workers", "gradient_checkpointing", "metric_for_best_model", "max_skipped_steps"}
HARMLESS |= {"per_device_train_batch_size", "gradient_accumulation_steps", "total_batch_size", "max_lost"}
HARMLESS |= {"on_bad_row", "trust_remote_code", "overfit"}
# The model and the data are known by what is in them, wherever they lie.
PLACES = {"model_name_or_path": "base", "config_name": "base", "tokenizer_name": "data", "revision": "base"}
PLACES |= {"train_files": "data", "eval_files": "data", "chat_template": "data"}
DESCRIPTIONS = {"base": ("model_name_or_path", "the model with the fingerprint"), "data": ("train_files", "the rows")}
DATA_OPTIONS = set(DataOptions.model_fields)


def run_identity(options: TrainOptions, rows: Rows) -> dict[str, Any]:
    """What makes a run this run, beside its options: the model's and the rows' fingerprints and the rows of a step."""
    config = getattr(options, "config_name", None)
    base = model_fingerprint(str(config or options.model_name_or_path), options.revision)
    digest = hashlib.sha256(str([as_source(place).weight for place in options.train_files]).encode())
    for array in (rows.digest, rows.offsets, rows.source):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {"base": base, "data": digest.hexdigest()[:16], "total_batch_size": rows_per_step(options)}


def find_start(accelerator: Accelerator, options: TrainOptions, rows: Rows) -> Start:
    """Decide from `output_dir` and `resume_from_checkpoint` where to begin; every process comes to the same answer.

    Nothing is written or removed yet: that is left to `Checkpoints.resume`, when model, adapter and backend have held.

    Raises:
        ConfigError: the folder holds a finished run, something foreign or checkpoints of which none holds, or the named
            checkpoint does not hold or is of another run.
    """
    folder, named = Path(options.output_dir).expanduser(), options.resume_from_checkpoint
    rank, world = accelerator.process_index, accelerator.num_processes
    whole = partial(find_damage, rank=rank, world=world, add_up=partial(sum_on_hosts, accelerator))
    _check_usable(folder, options)
    checkpoint = None
    if named not in ("auto", "none"):
        checkpoint = Path(named).expanduser()
        if problem := whole(checkpoint):
            raise ConfigError(f"resume_from_checkpoint: {named} {problem}.")
        _check_apart(folder, checkpoint, options.overwrite_output_dir)
    elif named == "auto" and not options.overwrite_output_dir:
        checkpoint = newest_checkpoint(folder / "checkpoints", whole)
        if checkpoint is None and any((folder / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"resume_from_checkpoint: auto: none of the checkpoints in {folder / 'checkpoints'} is whole; repair one, or "
                "set resume_from_checkpoint: none to start anew."
            )
    # Nobody may write before everybody has looked.
    accelerator.wait_for_everyone()
    fresh = Start(output_dir=folder, identity=run_identity(options, rows), rank=rank, world=world)
    return fresh if checkpoint is None else _continued(fresh, checkpoint, options)


def _check_usable(folder: Path, options: RunOptions) -> None:
    """Refuse an output_dir that holds something else than a run that may be continued."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder.")
    # Hidden is what a killed process was writing.
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
            f"output_dir: {folder} holds a finished run; name another folder, or set overwrite_output_dir to start anew."
        )


def _check_apart(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """A checkpoint from elsewhere starts a run of its own; another run's folder would have to be emptied for it."""
    own = checkpoint.resolve().parent == (folder / "checkpoints").resolve()
    if not own and not overwrite and any((folder / "checkpoints").glob("step-*")):
        raise ConfigError(
            f"output_dir: {folder} holds checkpoints of another run than {checkpoint}; name another folder, or set "
            "overwrite_output_dir."
        )


def newest_checkpoint(folder: Path, problem_of: Callable[[Path], str | None]) -> Path | None:
    """The newest checkpoint that holds; broken ones are named and passed over."""
    found = sorted(folder.glob("step-*"))
    for path in reversed(found):
        problem = problem_of(path)
        if problem is None:
            return path
        if process_rank() == 0:
            print(f"checkpoint {path} {problem}{'; taking an older one' if path != found[0] else ''}", flush=True)
    return None


def make_room(found: Start) -> None:
    """Remove what this run replaces: all that is ours of another run, or the checkpoints after the one it continues."""
    checkpoints = found.output_dir / "checkpoints"
    obsolete = [found.output_dir / name for name in RUN_FILES]
    if found.folder is not None and found.folder.resolve().parent == checkpoints.resolve():
        # Rotation keeps the newest by name, and these would outlive the ones that are still to come.
        obsolete = []
        for path in checkpoints.glob("step-*"):
            if path.name > found.folder.name:
                remove_folder(path)
    # What a killed process was writing: a checkpoint, an export, run.json.
    for path in [
        *checkpoints.glob(".*.partial"),
        *found.output_dir.glob(".*.partial"),
        *found.output_dir.glob(".*.old"),
        *obsolete,
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    found.output_dir.mkdir(parents=True, exist_ok=True)


def _continued(fresh: Start, checkpoint: Path, options: TrainOptions) -> Start:
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    changed = _check_same(checkpoint, state, options, fresh.identity)
    # Whoever is here takes on the sums of those who are not.
    meters = [rank_file(checkpoint, saved)["meter"] for saved in range(fresh.rank, state["processes"], fresh.world)]
    sums = [sum(column) for column in zip(*meters, strict=True)] if meters else [0.0] * 5
    found = replace(
        fresh,
        folder=checkpoint,
        step=state["step"],
        rows=state["rows"],
        same_processes=state["processes"] == fresh.world,
        meter=(*sums[:4], max((meter[4] for meter in meters), default=0.0)),
        skipped=state["skipped"],
        best=tuple(state["best"]) if state["best"] else None,
        evaluate=state["evaluate"],
        changed=tuple(changed),
    )
    if found.rank == 0:
        _say(found, state["processes"])
    return found


def rank_file(checkpoint: Path, rank: int) -> dict[str, Any]:
    return json.loads((checkpoint / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))


def _say(found: Start, saved_by: int) -> None:
    print(f"going on from {found.folder}, step {found.step}", flush=True)
    if not found.same_processes:
        print(
            f"saved by {saved_by} processes, continued by {found.world}: the same rows and the exact state, but dropout and "
            "noise are drawn anew",
            flush=True,
        )
    for name in found.changed:
        print(f"allowed to differ from the checkpoint: {name}", flush=True)


def _check_same(checkpoint: Path, state: dict[str, Any], options: TrainOptions, mine: dict[str, Any]) -> list[str]:
    """The options that differ from the checkpoint's and are allowed to.

    Raises:
        ConfigError: some differ that are not allowed to, or never can.
    """
    now, then = resolved_options(options), state["options"]
    differ = [name for name in now if name in then and now[name] != then[name] and name not in HARMLESS]
    moved = {kind for kind in ("base", "data") if mine[kind] != state["identity"][kind]}
    # Another place is no difference as long as the same is there; what has changed in its place is one.
    differ = [name for name in differ if PLACES.get(name) is None or PLACES[name] in moved]
    problems = {name: (f"{then[name]!r}", f"{now[name]!r}") for name in differ}
    for kind in moved:
        # An option that differs explains it better.
        explained = {name for name in differ if PLACES.get(name) == kind or (kind == "data" and name in DATA_OPTIONS)}
        if not explained:
            name, what = DESCRIPTIONS[kind]
            problems[name] = (f"{what} {state['identity'][kind]}", mine[kind])
    if state["identity"]["total_batch_size"] != mine["total_batch_size"]:
        problems["total_batch_size"] = (state["identity"]["total_batch_size"], mine["total_batch_size"])
    allowed = set(options.allow_changed) - set(FIXED_OPTIONS)
    raise_problems(
        [
            f"{name}: {checkpoint} was saved with {was}, this run has {found}; give the same, "
            + ("" if name in FIXED_OPTIONS else f"allow it by allow_changed: {name}, ")
            + "or resume_from_checkpoint: none."
            for name, (was, found) in problems.items()
            if name not in allowed
        ]
    )
    return sorted(problems)
