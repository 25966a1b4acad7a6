"""A LoRA adapter out of a tuned model and its base: the best low-rank part of what has changed, layer by layer."""

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
from accel_llm.model.loading import check_model_name, short_reason
from accel_llm.system.folders import check_output_dir, whole_output
from accel_llm.system.tensors import TensorSpec, write_tensors
from accel_llm.system.weights import WeightFiles, open_weights

SMALL_MATRIX = 1024  # the shorter side up to which all singular values are computed
OVERSAMPLING, ITERATIONS = 16, 4  # of the randomised decomposition, for larger matrices


class Extracted(NamedTuple):
    """`errors` are |change - B A| / |change| by layer; `left` is |change| / |base| of what changed and is not covered."""

    folder: Path
    errors: dict[str, float]
    left: dict[str, float]


class ModelSide(NamedTuple):
    """A model's weights, and how they are read."""

    checkpoint: WeightFiles
    laid: Skeleton
    specs: dict[str, TensorSpec]

    def load(self, name: str) -> torch.Tensor:
        made = load_group(self.laid.model, self.laid.groups[name], self.checkpoint, self.specs)
        return made[name].float()


def extract_adapter(
    options: ExtractOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> Extracted:
    """Write the adapter; `output_dir` appears whole or not at all.

    Raises:
        ConfigError: a model that is not there, two models of different shape, or two that do not differ.
    """
    target = Path(options.output_dir).expanduser().resolve()
    for name, field in ((options.base, "base"), (options.model, "model")):
        check_model_name(name, field)
    folders = [locate_folder(name, field) for name, field in ((options.base, "base"), (options.model, "model"))]
    check_output_dir(
        target, [*zip(("base", "model"), folders, strict=True)], options.overwrite_output_dir, "adapter_config.json"
    )
    base, tuned = (_side(folder, field, options) for folder, field in zip(folders, ("base", "model"), strict=True))
    _check_shapes(base, tuned)
    with whole_output(target) as partial:
        state, errors, left = _changes(base, tuned, options, progress)
        if not state:
            raise ConfigError(f"model: {options.model} has the weights of {options.base}; there is nothing to extract.")
        local = Path(options.base).expanduser()
        model = base.laid.model
        LoraConfig(
            task_type=_task(model),
            base_model_name_or_path=str(local.resolve()) if local.is_dir() else options.base,
            r=options.lora_r,
            lora_alpha=options.lora_r,
            target_modules=sorted(errors),
            # By their whole names: by the end of one PEFT would take others as well, with `norm` each layer's.
            modules_to_save=sorted(_whole(model, options)) or None,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in errors),
            rank_pattern={name: len(state[f"{PEFT_PREFIX}{name}.lora_A.weight"]) for name in errors},
            alpha_pattern={name: len(state[f"{PEFT_PREFIX}{name}.lora_A.weight"]) for name in errors},
            inference_mode=True,
        ).save_pretrained(str(partial))
        write_tensors(
            partial / ADAPTER_WEIGHTS, state, {"format": "pt", BASE_FINGERPRINT: model_fingerprint(str(folders[0]))}
        )
        copy_tokenizer(folders[1], folders[0], partial)
    return Extracted(target, errors, left)


def _task(model: PreTrainedModel) -> str:
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"


def _side(folder: Path, field: str, options: ExtractOptions) -> ModelSide:
    try:
        checkpoint = open_weights(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{field}: {folder} cannot be read ({short_reason(error)}).") from None
    config = read_model_config(folder, options.trust_remote_code)
    laid = build_skeleton(config, None, checkpoint, "auto", options.trust_remote_code, lazy=True)
    return ModelSide(checkpoint, laid, parameter_specs(laid.model))


def _check_shapes(base: ModelSide, tuned: ModelSide) -> None:
    problems = []
    if strange := base.specs.keys() ^ tuned.specs.keys():
        problems.append(f"model: it has other weights than its base, such as {min(strange)}.")
    wrong = [name for name in base.specs.keys() & tuned.specs if base.specs[name].shape != tuned.specs[name].shape]
    if wrong:
        first = min(wrong)
        problems.append(
            f"model: {len(wrong)} of its weights have another shape than the base's, such as {first}, "
            f"{tuned.specs[first].shape} for {base.specs[first].shape}."
        )
    raise_problems(problems)


def _changes(
    base: ModelSide, tuned: ModelSide, options: ExtractOptions, progress: Callable[[int, int], None]
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, float]]:
    """The adapter's weights, the error of each layer, and what is not covered."""
    state: dict[str, torch.Tensor] = {}
    errors, left = {}, {}
    names = [name for name in saved_names(base.laid.model) if base.specs[name].dtype.is_floating_point]
    whole = _whole(base.laid.model, options)
    for done, name in enumerate(names):
        progress(done, len(names))
        first, second = base.load(name), tuned.load(name)
        change = second - first
        key, _, attribute = name.rpartition(".")
        module = base.laid.model.get_submodule(key)
        if key in whole:
            state[f"{PEFT_PREFIX}{name}"] = second.to(tuned.specs[name].dtype)
        elif not change.any():
            continue
        elif isinstance(module, nn.Linear | Conv1D) and attribute == "weight":
            change = change.T if isinstance(module, Conv1D) else change
            left_factor, right_factor = low_rank(change, options.lora_r)
            state[f"{PEFT_PREFIX}{key}.lora_A.weight"], state[f"{PEFT_PREFIX}{key}.lora_B.weight"] = (
                right_factor,
                left_factor,
            )
            errors[key] = float((change - left_factor @ right_factor).norm() / change.norm())
        else:
            left[name] = float(change.norm() / first.norm())
    progress(len(names), len(names))
    return state, errors, left


def _whole(model: PreTrainedModel, options: ExtractOptions) -> set[str]:
    names = [name for name, _ in model.named_modules()]
    return {
        name for name in names if any(name == saved or name.endswith(f".{saved}") for saved in options.modules_to_save)
    }


def low_rank(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [rows, r] and A [r, columns] whose product is the nearest of that rank to `change` [rows, columns].

    By the singular values (Eckart and Young 1936), of large matrices by a randomised decomposition with power iterations
    (Halko, Martinsson and Tropp 2011), whose seed is fixed. Each of B and A takes the square root of a singular value.
    """
    rank = min(rank, *change.shape)
    if min(change.shape) <= SMALL_MATRIX:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(change, min(rank + OVERSAMPLING, *change.shape), ITERATIONS)
        right = right.T
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()
