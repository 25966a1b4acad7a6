"""Checkpoints: whole or absent, found, verified, resumed, rotated; and what an output folder may be used for.

A checkpoint is written to a temporary folder; its manifest (size and SHA-256 of every file) is written last, and one
rename makes it appear. Without a manifest that holds, a folder is not a checkpoint.
"""

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accel_llm.config import resolved
from accel_llm.distributed import bare
from accel_llm.errors import ConfigError, check
from accel_llm.metrics import Meter
from accel_llm.options import RunOptions

OURS = ("run.json", "metrics.jsonl", "checkpoints", "adapter", "model", "report.html", "logs")
# Options that shape the saved state: with another value it has no place to go.
SHAPING = ("method", "optim", "lora_r", "lora_bias", "lora_target_modules", "modules_to_save", "use_dora", "add_tokens")


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or at the step of a verified checkpoint; and where it writes."""

    output_dir: Path
    step: int = 0
    folder: Path | None = None


def start(accelerator: Accelerator, options: RunOptions) -> Start:
    """Decide from `output_dir` and `resume_from_checkpoint` where to begin; every process comes to the same answer.

    Nothing is written or removed yet: that is left to `resume`, when model, adapter and backend have held.

    Raises:
        ConfigError: the folder holds a finished run or something foreign, or the named checkpoint does not hold.
    """
    folder, named = Path(options.output_dir).expanduser(), options.resume_from_checkpoint
    _check_usable(folder, options.overwrite_output_dir)
    checkpoint = None
    if named not in ("auto", "none"):
        checkpoint = Path(named).expanduser()
        if problem := broken(checkpoint):
            raise ConfigError(f"resume_from_checkpoint: {named} {problem}.")
    elif named == "auto" and not options.overwrite_output_dir:
        checkpoint = newest(folder / "checkpoints")
    step = _check_same(checkpoint, options) if checkpoint else 0
    # Nobody may write before everybody has looked.
    accelerator.wait_for_everyone()
    return Start(folder, step, checkpoint)


def _check_usable(folder: Path, overwrite: bool) -> None:
    """Refuse an output_dir that holds something else than a run that may be continued."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder.")
    if overwrite or not folder.exists() or not any(folder.iterdir()):
        return
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"output_dir: {folder} holds files that are not a run of this project; name another folder, or set "
            "overwrite_output_dir."
        ) from None
    if status == "done":
        raise ConfigError(
            f"output_dir: {folder} holds a finished run; name another folder, or set overwrite_output_dir to start anew."
        )


def _check_same(checkpoint: Path, options: RunOptions) -> int:
    """The step of a checkpoint that this run can continue."""
    state, now = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")), resolved(options)
    check(
        [
            f"{name}: {checkpoint} was saved with {state['options'][name]}, this run has {now[name]}; give the same, or "
            "resume_from_checkpoint: none."
            for name in SHAPING
            if name in state["options"] and state["options"][name] != now.get(name)
        ]
    )
    return state["step"]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that holds; broken ones are named and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = broken(path)
        if problem is None:
            return path
        if os.environ.get("RANK", "0") == "0":
            print(f"checkpoint {path} {problem}; taking an older one", flush=True)
    return None


def broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file in its manifest is there with its size and hash."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return "does not exist" if not folder.exists() else "is not a whole checkpoint (no manifest.json)"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8")).items()
    except ValueError:
        return "has a damaged manifest.json"
    for name, (size, digest) in files:
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"has a damaged {name}"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def when_due(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, meter: Meter, options: RunOptions, step: int
) -> None:
    """Save every `save_steps`, and at the end of the run."""
    if step == meter.plan.total_steps or (options.save_steps and step % options.save_steps == 0):
        with meter.pause_clock():
            save(accelerator, model, optimizer, scheduler, step, options)


def save(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, step: int, options: RunOptions) -> Path:
    """Write `checkpoints/step-XXXXXXXX` and remove those beyond `save_total_limit`. A collective."""
    folder = Path(options.output_dir) / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _save_weights(accelerator, model, optimizer, partial)
    _save_randomness(partial / f"rng-{accelerator.process_index:05d}.safetensors", accelerator.device)
    if accelerator.is_main_process:
        state: dict[str, Any] = {
            "step": step,
            "options": resolved(options),
            "scheduler": _plain(scheduler.state_dict()),
        }
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _seal(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _sync(folder.parent)
        for old in sorted(folder.parent.glob("step-*"))[: -options.save_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "lr_lambdas"}


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = {str(path.relative_to(folder)): (path.stat().st_size, sha256(path)) for path in files}
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_weights(accelerator: Accelerator, model: Any, optimizer: Any, folder: Path) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # ZeRO's own files are the only ones that hold its partitioned optimizer; frozen weights stay out of them.
        frozen = any(not parameter.requires_grad for parameter in model.module.parameters())
        model.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=frozen)
    elif accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict_saver import save as save_shards

        save_shards(_sharded_state(model, optimizer), checkpoint_id=str(folder / "fsdp"))
    elif accelerator.is_main_process:
        names = {
            parameter: name
            for name, parameter in bare(accelerator, model).named_parameters()
            if parameter.requires_grad
        }
        save_file({name: p.detach().cpu().contiguous() for p, name in names.items()}, folder / "weights.safetensors")
        tensors, values = {}, {}
        for parameter, state in optimizer.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{names[parameter]}|{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    values[f"{names[parameter]}|{key}"] = value
        save_file(tensors, folder / "optimizer.safetensors", metadata={"values": json.dumps(values)})


def _sharded_state(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer.optimizer, options=options)
    return {"weights": weights, "optimizer": moments}


def _save_randomness(path: Path, device: torch.device) -> None:
    """Every generator that training draws from, as plain tensors: nothing to unpickle."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "python": torch.tensor(internal, dtype=torch.int64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    facts = {"numpy": [kind, int(position), int(has_gauss), float(cached)], "python": [version, gauss]}
    save_file(state, path, metadata={"facts": json.dumps(facts)})


def resume(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, found: Start) -> None:
    """Bring model, optimizer, schedule and random generators to the state of the checkpoint, and make `output_dir` ready.

    A collective.
    """
    if found.folder is not None:
        _load(accelerator, model, optimizer, scheduler, found.folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _make_room(found)
    accelerator.wait_for_everyone()


def _make_room(found: Start) -> None:
    """Remove what this run replaces: all that is ours of another run, or the checkpoints after the one it continues."""
    checkpoints = found.output_dir / "checkpoints"
    if found.folder is not None and found.folder.resolve().parent == checkpoints.resolve():
        # Rotation keeps the newest by name, and these would outlive the ones that are still to come.
        obsolete = [path for path in checkpoints.glob("step-*") if path.name > found.folder.name]
    else:
        obsolete = [found.output_dir / name for name in OURS]
    # What a killed process was writing: a checkpoint, an export, run.json.
    for path in [*obsolete, *checkpoints.glob(".*.partial"), *found.output_dir.glob(".*.partial")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    found.output_dir.mkdir(parents=True, exist_ok=True)


def _load(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _load_weights(accelerator, model, optimizer, folder)
    # The lambdas are code, not state: the ones built from the options stay.
    scheduler.load_state_dict(state["scheduler"] | {"lr_lambdas": []})
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    randomness = folder / f"rng-{accelerator.process_index:05d}.safetensors"
    if randomness.is_file():  # a process that the saving run did not have keeps the generators of its seed
        _load_randomness(randomness, accelerator.device)


def _load_weights(accelerator: Accelerator, model: Any, optimizer: Any, folder: Path) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        frozen = any(not parameter.requires_grad for parameter in model.module.parameters())
        # A frozen base is not in the file, so its keys are missing by design; trained ones are all there.
        loaded, _ = model.load_checkpoint(str(folder), tag="zero", load_module_strict=not frozen)
        if loaded is None:
            raise ConfigError(
                f"resume_from_checkpoint: DeepSpeed could not load {folder}; it was saved by another strategy or world size."
            )
    elif accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load as load_shards

        state = _sharded_state(model, optimizer)
        load_shards(state, checkpoint_id=str(folder / "fsdp"))
        set_state_dict(
            model,
            optimizer.optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    else:
        _load_plain(bare(accelerator, model), optimizer.optimizer, folder)


def _load_plain(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {name: p.shape for name, p in trained.items()} != {name: tensor.shape for name, tensor in weights.items()}:
        raise ConfigError(
            f"resume_from_checkpoint: {folder} holds other weights than this run trains; the method or model differs."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        values = json.loads(file.metadata()["values"])
        moments = {key: file.get_tensor(key) for key in file.keys()} | values  # noqa: SIM118 (not a dict)
    names = {parameter: name for name, parameter in trained.items()}
    saved = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[parameter]: i for i, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in moments.items():
        name, field = key.rsplit("|", 1)
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _load_randomness(path: Path, device: torch.device) -> None:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        torch.set_rng_state(file.get_tensor("torch"))
        kind, position, has_gauss, cached = facts["numpy"]
        np.random.set_state((kind, file.get_tensor("numpy").numpy().astype(np.uint32), position, has_gauss, cached))
        version, gauss = facts["python"]
        random.setstate((version, tuple(file.get_tensor("python").tolist()), gauss))
        if device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor("cuda"), device)
