"""Writes, checks and reads the folder of an adapter: adapter_config.json and adapter_model.safetensors."""

import json
import math
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.adapters.budget import fill_ranks, has_budget, note_kept_ranks
from accel_llm.adapters.fixed_parts import save_all_parts
from accel_llm.adapters.initial import joined_factors, lora_layers, plain_config
from accel_llm.adapters.prompts import MEMBER, ensemble_folders, loads_prompt, saved_prompt
from accel_llm.errors import ConfigError
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.loading import describe_shape_mismatch, short_reason
from accel_llm.model.vocabulary import NEW_ROWS, PEFT_ROWS
from accel_llm.system.places import missing_reason
from accel_llm.system.tensors import write_tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FINGERPRINT = "base_fingerprint"
BASE_BITS = "base_bits"  # "4" if the adapter was trained on a base in 4 bits


def save_adapter(
    model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base: str, base_fingerprint: str = ""
) -> None:
    """Write an adapter's config and its trained weights `state`, gathered from all ranks, to `folder`.

    A LoRA is always a plain one on the base itself, whatever its first values were, see `adapters/initial.py`. `base`
    is written down as the base model; a folder becomes an absolute path, so that the adapter works from anywhere.
    `base_fingerprint`, and that the base was in 4 bits, go into the header of the weights file, which other programs
    ignore.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note_kept_ranks(model, state)
    weights = _named_for_file(model, joined_factors(model, state))
    metadata = {"format": "pt"} | ({BASE_FINGERPRINT: base_fingerprint} if base_fingerprint else {})
    metadata |= {BASE_BITS: "4"} if getattr(model.get_base_model(), "is_loaded_in_4bit", False) else {}
    write_tensors(folder / ADAPTER_WEIGHTS, dict(sorted(weights.items())), metadata)
    # The config says what the weights are.
    config, local = copy(plain_config(model)), Path(base)
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    for name in [name for name in model.peft_config if name.startswith(MEMBER)]:
        (folder / name).mkdir()
        write_tensors(folder / name / ADAPTER_WEIGHTS, saved_prompt(model, state, name), metadata)
        config.save_pretrained(str(folder / name))


def _named_for_file(model: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return trained weights by their names in an adapter's file; `state` has them by their names in the model."""
    if model.peft_config["default"].is_prompt_learning:
        return saved_prompt(model, state)
    complete = state | _other_names(model, state) | _saved_buffers(model)
    weights = get_peft_model_state_dict(model, state_dict=complete, save_embedding_layers=False)
    # The rows of new tokens are our own parameters; they are added under PEFT's name.
    rows = {name: tensor for name, tensor in state.items() if name.endswith(f".{NEW_ROWS}")}
    return weights | {name.removesuffix(NEW_ROWS) + PEFT_ROWS: tensor for name, tensor in rows.items()}


def _other_names(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of `state` that several layers share, by all their names; PEFT saves them under one of these."""
    shared = {id(parameter): state[name] for name, parameter in model.named_parameters() if name in state}
    every_name = model.named_parameters(remove_duplicate=False)
    return {name: shared[id(p)] for name, p in every_name if name not in state and id(p) in shared}


def _saved_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Return what is not trained but may be saved, such as VeRA's random projections and SHiRA's positions."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}


def check_saved_adapter(model: Any, folder: Path) -> None:
    """Compare the adapter in `folder`, as plain PEFT loads it on an empty copy of the base, with the trained `model`.

    `model` comes without the wrappers of DDP or DeepSpeed. Its weights may be sharded: only their names and shapes are
    read, and the scaling of each layer. So one process is enough, and the base takes no memory.

    Raises:
        ConfigError: PEFT cannot load the adapter, or its weights have other names, shapes or another scaling.
    """
    try:
        problem = _compare_files(model, folder) or _compare_loaded(model, folder)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, SafetensorError) as error:
        problem = f"PEFT cannot load it ({short_reason(error)})"
    if problem:
        raise ConfigError(f"adapter: {folder} was written, but it does not hold what was trained: {problem}.")


def _compare_files(model: Any, folder: Path) -> str:
    """Say how names and shapes in the weights file differ from those of the trained weights; empty if they do not."""
    # Empty tensors get the names that the trained weights have in a file. Under ZeRO-3 a parameter's own shape is 0.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in trained.items()}
    device = "cpu" if has_budget(model) else "meta"  # PEFT picks AdaLoRA's ranks out of weights
    state = joined_factors(model, {name: torch.empty(shape, device=device) for name, shape in shapes.items()})
    named = _named_for_file(model, state)
    expected = {name: tuple(weight.shape) for name, weight in named.items()}
    kept = {id(tensor) for tensor in state.values()} & {id(tensor) for tensor in named.values()}
    new_tensors = has_budget(model) or model.peft_config["default"].is_prompt_learning
    if not new_tensors and (not kept or len(kept) != len(trained)):
        return f"{len(trained)} tensors are trained, and PEFT saves {len(kept)} of them"

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if missing := expected.keys() - stored:
        return f"{len(missing)} of {len(expected)} weights are missing, such as {min(missing)}"
    if unknown := stored.keys() - expected:
        return f"{len(unknown)} of {len(stored)} weights were not trained, such as {min(unknown)}"
    different = ((name, stored[name], shape) for name, shape in expected.items() if stored[name] != shape)
    return describe_shape_mismatch(different, "trained is")


def _compare_loaded(model: Any, folder: Path) -> str:
    """Say how PEFT's own loading differs from the trained adapter; empty if it does not."""
    # An empty copy of the base. FSDP2 has put a class of its own before the model's.
    inner = unwrap_causal_lm(model)
    model_class: Any = next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))
    unset_hf_deepspeed_config()  # otherwise transformers would shard the copy under ZeRO-3
    with torch.device("meta"):
        base = model_class._from_config(deepcopy(inner.config))
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # otherwise PEFT warns of another spelling of the base's path
    try:
        loaded: Any = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (NotImplementedError, RuntimeError):
        return ""  # PEFT computes parts of this method from the base's weights, such as FRoD's and SHiRA's
    if config.is_prompt_learning:
        places = [folder, *ensemble_folders(folder)]
        return "" if all(loads_prompt(loaded, place) for place in places) else "PEFT loads other virtual tokens"
    save_all_parts(loaded)
    if has_budget(loaded):
        fill_ranks(loaded)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    result = loaded.load_adapter(str(folder), "default", torch_device="cpu", low_cpu_mem_usage=True)
    if keys := [*unloaded(parameters, result.missing_keys), *result.unexpected_keys]:
        return f"{len(keys)} weights have no counterpart after loading, such as {min(keys)}"
    found, expected = (
        {name: layer.scaling["default"] for name, layer in lora_layers(m).items()} for m in (loaded, model)
    )
    wrong = [name for name, scaling in expected.items() if not math.isclose(found.get(name, 0.0), scaling)]
    return f"{len(wrong)} layers are scaled otherwise, such as {min(wrong)}" if wrong else ""


def unloaded(parameters: dict[str, Any], missing_keys: list[str]) -> set[str]:
    """Return those of PEFT's `missing_keys` that were really not loaded; `parameters` has them by all their names.

    A tensor that several layers share has a name in each of them, and is in the file under one of these.
    """
    missing = set(missing_keys)
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return {name for name in missing if name not in parameters or id(parameters[name]) not in loaded}


def read_base_fingerprint(folder: Path) -> str | None:
    """Return the `model_fingerprint` of the base that an adapter was trained on, or None if its file has none."""
    return _read_metadata(folder).get(BASE_FINGERPRINT)


def _read_metadata(folder: Path) -> dict[str, str]:
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            return file.metadata() or {}
    except (FileNotFoundError, SafetensorError):  # reading the weights will report it
        return {}


def trained_in_4_bits(folder: Path) -> bool:
    """Return whether an adapter was trained on a base in 4 bits, as its file or the run.json of its run says."""
    if BASE_BITS in (metadata := _read_metadata(folder)):
        return metadata[BASE_BITS] == "4"
    # Earlier releases did not write it into the file.
    try:
        run = json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))
        return run["options"]["method"] == "qlora" or run["options"].get("load_in_4bit", False)
    except (OSError, ValueError, LookupError, TypeError):  # no run.json, or one of another program
        return False


def read_adapter_config(folder: Path, field: str = "adapter") -> dict[str, Any]:
    """Return the content of an adapter's adapter_config.json; `field` is the option to name in an error.

    Raises:
        ConfigError: the folder does not exist, has no such file, or the file is not a JSON object.
    """
    path = folder / "adapter_config.json"
    if reason := missing_reason(folder):
        raise ConfigError(f"{field}: {folder} {reason}; name the adapter's folder, or the run's output_dir.")
    if not path.is_file():
        model = next((place for place in (folder, folder / "model") if (place / "config.json").is_file()), None)
        if model:
            raise ConfigError(f"{field}: {model} is a full model, not an adapter; it is used as it is.")
        raise ConfigError(f"{field}: {folder} is not an adapter: it has no adapter_config.json.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{field}: {path} is not JSON (line {error.lineno}: {error.msg}).") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{field}: {path} holds a {type(settings).__name__}, not the settings of an adapter.")
    return settings
