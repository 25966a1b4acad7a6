"""Extracts a LoRA adapter from a tuned model and its base: for each layer the best low-rank part of the change."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import accel_llm.system.chatter

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.compat import PEFT_PREFIX
from accel_llm.adapters.locate import locate_folder
from accel_llm.adapters.saved import ADAPTER_WEIGHTS, BASE_FINGERPRINT
from accel_llm.config.tool_options import ExtractOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.merge.model_card import copy_tokenizer
from accel_llm.merge.skeleton import (
    Skeleton,
    build_skeleton,
    load_group,
    parameter_specs,
    read_model_config,
    saved_names,
)
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.loading import describe_shape_mismatch, short_reason
from accel_llm.model.model_names import check_model_name
from accel_llm.system.folders import atomic_output, check_output_dir, check_writable
from accel_llm.system.tensors import TensorSpec, write_tensors
from accel_llm.system.weights import WeightFiles, open_weights

SMALL_MATRIX = 1024  # up to this length of the shorter side all singular values are computed
OVERSAMPLING, ITERATIONS = 16, 4  # settings of the randomized decomposition for larger matrices


class ExtractResult(NamedTuple):
    """The extracted adapter, and what it loses.

    `errors`: |change - B A| / |change| of each layer. `uncovered_changes`: |change| / |base| of each weight that
    changed but is not in the adapter.
    """

    folder: Path
    errors: dict[str, float]
    uncovered_changes: dict[str, float]


class ModelReader(NamedTuple):
    """Reads the weights of a model one at a time."""

    checkpoint: WeightFiles
    skeleton: Skeleton
    specs: dict[str, TensorSpec]

    def load(self, name: str) -> torch.Tensor:
        """Return one weight in float32, by its name in the model."""
        weights = load_group(self.skeleton.model, self.skeleton.groups[name], self.checkpoint, self.specs)
        return weights[name].float()


def extract_adapter(
    options: ExtractOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> ExtractResult:
    """Extract the adapter and write it. `output_dir` appears complete or not at all.

    `progress` is called with the number of weights done and the number of weights in all.

    Raises:
        ConfigError: a model does not exist, or the two models have different shapes or equal weights.
    """
    # Open both models and check them before anything is written.
    check_writable(Path(options.output_dir))
    target = Path(options.output_dir).resolve()
    for name, field in ((options.base, "base"), (options.model, "model")):
        check_model_name(name, field)
    folders = [locate_folder(name, field) for name, field in ((options.base, "base"), (options.model, "model"))]
    check_output_dir(
        target, [*zip(("base", "model"), folders, strict=True)], options.overwrite_output_dir, "adapter_config.json"
    )
    base, tuned = (
        _open_model(folder, field, options) for folder, field in zip(folders, ("base", "model"), strict=True)
    )
    _check_shapes(base, tuned)

    with atomic_output(target) as partial:
        state, errors, uncovered = _extract_changes(base, tuned, options, progress)
        if not state:
            raise ConfigError(f"model: {options.model} has the weights of {options.base}; there is nothing to extract.")
        # A local base is named by its full path, so that the adapter finds it from anywhere.
        local = Path(options.base)
        model = base.skeleton.model
        LoraConfig(
            task_type=_task_type(model),
            base_model_name_or_path=str(local.resolve()) if local.is_dir() else options.base,
            r=options.lora_r,
            lora_alpha=options.lora_r,
            target_modules=sorted(errors),
            # Full names: PEFT would match the ends of names too, so that `norm` would select the norms of all layers.
            modules_to_save=sorted(_modules_saved_whole(model, options)) or None,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in errors),
            # A small matrix has a lower rank than lora_r. With alpha equal to the rank, the scaling is 1.
            rank_pattern={name: len(state[f"{PEFT_PREFIX}{name}.lora_A.weight"]) for name in errors},
            alpha_pattern={name: len(state[f"{PEFT_PREFIX}{name}.lora_A.weight"]) for name in errors},
            inference_mode=True,
        ).save_pretrained(str(partial))
        write_tensors(
            partial / ADAPTER_WEIGHTS, state, {"format": "pt", BASE_FINGERPRINT: model_fingerprint(str(folders[0]))}
        )
        copy_tokenizer(folders[1], folders[0], partial)
    return ExtractResult(target, errors, uncovered)


def _task_type(model: PreTrainedModel) -> str:
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"


def _open_model(folder: Path, field: str, options: ExtractOptions) -> ModelReader:
    try:
        checkpoint = open_weights(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{field}: {folder} cannot be read ({short_reason(error)}).") from None
    config = read_model_config(folder, options.trust_remote_code)
    skeleton = build_skeleton(config, None, checkpoint, "auto", options.trust_remote_code, lazy=True)
    return ModelReader(checkpoint, skeleton, parameter_specs(skeleton.model))


def _check_shapes(base: ModelReader, tuned: ModelReader) -> None:
    """Refuse two models whose weights have different names or shapes."""
    problems = []
    if unmatched := base.specs.keys() ^ tuned.specs.keys():
        problems.append(f"model: it has other weights than its base, such as {min(unmatched)}.")
    common = base.specs.keys() & tuned.specs
    shapes = [(name, tuned.specs[name].shape, base.specs[name].shape) for name in common]
    if mismatch := describe_shape_mismatch((s for s in shapes if s[1] != s[2]), "the base has"):
        problems.append(f"model: {mismatch}.")
    raise_problems(problems)


def _extract_changes(
    base: ModelReader, tuned: ModelReader, options: ExtractOptions, progress: Callable[[int, int], None]
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, float]]:
    """Return the adapter's weights, the error of each layer, and the relative change of weights it does not cover."""
    state: dict[str, torch.Tensor] = {}
    errors, uncovered = {}, {}
    # Integer buffers have no low-rank change.
    names = [name for name in saved_names(base.skeleton.model) if base.specs[name].dtype.is_floating_point]
    whole_modules = _modules_saved_whole(base.skeleton.model, options)
    for done, name in enumerate(names):
        progress(done, len(names))
        before, after = base.load(name), tuned.load(name)
        change = after - before
        key, _, attribute = name.rpartition(".")
        module = base.skeleton.model.get_submodule(key)
        if key in whole_modules:
            state[f"{PEFT_PREFIX}{name}"] = after.to(tuned.specs[name].dtype)
        elif not change.any():
            continue
        # Conv1D (GPT-2) stores its weight transposed.
        elif isinstance(module, nn.Linear | Conv1D) and attribute == "weight":
            change = change.T if isinstance(module, Conv1D) else change
            lora_b, lora_a = low_rank_factors(change, options.lora_r)
            state[f"{PEFT_PREFIX}{key}.lora_A.weight"] = lora_a
            state[f"{PEFT_PREFIX}{key}.lora_B.weight"] = lora_b
            errors[key] = float((change - lora_b @ lora_a).norm() / change.norm())
        else:
            uncovered[name] = float(change.norm() / before.norm())
    progress(len(names), len(names))
    return state, errors, uncovered


def _modules_saved_whole(model: PreTrainedModel, options: ExtractOptions) -> set[str]:
    """Return the full names of the modules that modules_to_save selects by the ends of their names."""
    names = [name for name, _ in model.named_modules()]
    return {name for name in names if any(name == end or name.endswith(f".{end}") for end in options.modules_to_save)}


def low_rank_factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors B [rows, r] and A [r, columns] of the best rank-r approximation B A of `change` [rows, columns].

    The approximation keeps the largest singular values (Eckart and Young 1936). Large matrices use a randomized
    decomposition with power iterations and a fixed seed (Halko, Martinsson and Tropp 2011). B and A each take the
    square root of every singular value.
    """
    rank = min(rank, *change.shape)
    # A fixed seed gives the same adapter each time; the generator of the caller is left as it was.
    if min(change.shape) <= SMALL_MATRIX:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(change, min(rank + OVERSAMPLING, *change.shape), ITERATIONS)
        right = right.T
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()
