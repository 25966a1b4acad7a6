"""Builds a model without its weights, and converts tensors between the form in files and the form in the model.

For many families transformers 5 renames, splits, stacks and transposes weights when it loads and saves them: above all
it stacks the experts of a mixture into one tensor. This module calls the same code for a few tensors at a time.
"""

from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from accel_llm.errors import ConfigError
from accel_llm.model.language_part import causal_lm_loader
from accel_llm.model.loading import LOADING_ERRORS, describe_shape_mismatch, short_reason
from accel_llm.model.padding import drop_invalid_pad_ids
from accel_llm.model.untrusted import check_untrusted_config
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightFiles

# PEFT's task types.
TASKS: dict[str | None, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


class WeightGroup(NamedTuple):
    """Tensors in the files (`sources`) that become parameters of the model (`targets`) together, usually one and one.

    `patterns` tell for each source which of the converter's inputs it is.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    converter: WeightConverter | None


class Skeleton(NamedTuple):
    """A model without its weights.

    `groups`: where each parameter and buffer comes from, by its name in the model. `missing`: names that the checkpoint
    should hold, but does not.
    """

    model: PreTrainedModel
    groups: dict[str, WeightGroup]
    missing: frozenset[str]


def read_model_config(folder: Path | str, trust_remote_code: bool, field: str = "base") -> PreTrainedConfig:
    """Read config.json of a model folder; `field` is the option to name in an error.

    Raises:
        ConfigError: it cannot be read, or asks for code without trust_remote_code.
    """
    check_untrusted_config(str(folder), field, "main", trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{field}: {folder} cannot be loaded ({short_reason(error)}).") from None
    drop_invalid_pad_ids(config)
    return config


def model_class(config: PreTrainedConfig, task: str | None) -> Any:
    """Return the class that loads a model for `task`. Without a task it is the base's own architecture."""
    if task is None:
        own_class = getattr(transformers, (config.architectures or [""])[0], None)
        return own_class or AutoModelForCausalLM
    return causal_lm_loader(config) if task == "CAUSAL_LM" else TASKS[task]


def build_skeleton(
    config: PreTrainedConfig,
    task: str | None,
    checkpoint: WeightFiles,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    lazy: bool,
) -> Skeleton:
    """Build the model for `task`, and find where each of its weights comes from.

    `lazy` leaves the weights on the meta device. Otherwise they are memory-mapped, and take no memory until read.

    Raises:
        ConfigError: the checkpoint belongs to another model.
    """
    loader = model_class(config, task)
    with torch.device("meta"):
        # `from_pretrained(None, state_dict=...)` needs the model's own class, which remote code may define.
        is_auto_class = hasattr(loader, "from_config")
        build = loader.from_config if is_auto_class else loader._from_config
        own_class = type(build(deepcopy(config), **({"trust_remote_code": trust_remote_code} if is_auto_class else {})))
    # transformers reports missing and misshapen weights as if it had loaded them.
    try:
        model, report = own_class.from_pretrained(
            None,
            config=deepcopy(config),
            state_dict=_empty_tensors(checkpoint.specs) if lazy else checkpoint.mapped(),
            dtype=dtype,
            device_map={"": "meta"} if lazy else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except LOADING_ERRORS as error:
        raise ConfigError(f"base: cannot be loaded ({short_reason(error)}).") from None
    if mismatch := describe_shape_mismatch(report["mismatched_keys"]):
        raise ConfigError(f"base: does not fill the model: {mismatch}.")
    groups = _group_weights(model, checkpoint.specs)
    if lazy:
        _tie_equal_weights(model, groups, checkpoint)
    # All names of a tied parameter share the group of the one that the files hold.
    for names in tied_names(model):
        group = next((groups[name] for name in names if name in groups), None)
        if group is not None:
            groups |= {name: group._replace(targets=(name,)) for name in names if name not in groups}
    return Skeleton(model.eval(), groups, frozenset(report["missing_keys"]))


def _tie_equal_weights(model: PreTrainedModel, groups: dict[str, WeightGroup], checkpoint: WeightFiles) -> None:
    """Tie weights that the files hold twice with equal values, as `from_pretrained` does.

    transformers 5.23 cannot compare values on the meta device, and leaves such weights untied.
    """
    for name, other in list((model.all_tied_weights_keys or {}).items()):
        if not {name, other} <= groups.keys() or model.get_parameter(name) is model.get_parameter(other):
            continue
        # Equal values: one parameter from now on. Others are no longer declared as tied.
        (first,), (second,) = groups[name].sources, groups[other].sources
        if checkpoint.same(first, second):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(other))
            del groups[name]
        else:
            model.all_tied_weights_keys.pop(name)


def _empty_tensors(specs: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the groups of names that belong to one parameter, usually the embedding's and the head's."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return [group for group in names.values() if len(group) > 1]


def saved_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters and buffers that are saved. A tied parameter is saved once."""
    ignored = set(model._keys_to_ignore_on_save or [])
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return list(remove_tied_weights_from_state_dict(state, model))


def _group_weights(model: PreTrainedModel, specs: dict[str, TensorSpec]) -> dict[str, WeightGroup]:
    """Return the group of each parameter by its name, paired as transformers pairs them (core_model_loading, 5.23)."""
    conversions = get_model_conversion_mapping(model)
    # transformers renames single tensors, and converts groups of tensors.
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    # Find the first parameter that each tensor becomes, and the pattern that it matches.
    state, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    # Natural order, as transformers loads: experts 2 and 10 are stacked in the order of their numbers.
    for source in sorted(specs, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if name not in state and source in state:  # the file has the model's own name already
            name, pattern = rename_source_key(source, [], [], prefix, state)
        if name in state:
            collected[name].append((source, pattern))

    # Convert empty tensors to learn all parameters that a group becomes.
    groups = {}
    for first, entries in collected.items():
        pattern = entries[0][1]
        if pattern is None:
            groups[first] = WeightGroup((entries[-1][0],), (first,), (first,), None)
            continue
        sources, patterns = zip(*entries, strict=True)
        group = WeightGroup(sources, patterns, (first,), converter_by_pattern[pattern])
        targets = tuple(convert_group(model, group, [_empty_tensors(specs)[source] for source in group.sources]))
        groups |= dict.fromkeys(targets, group._replace(targets=targets))
    return groups


def convert_group(model: PreTrainedModel, group: WeightGroup, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert `tensors`, those of the group's sources, to the parameters that they become, by name."""
    if group.converter is None:
        return {group.targets[0]: tensors[0]}
    # A converter collects tensors, so each group needs a fresh copy.
    converter = deepcopy(group.converter)
    for source, pattern, tensor in zip(group.sources, group.patterns, tensors, strict=True):
        converter.add_tensor(group.targets[0], source, pattern, tensor)  # type: ignore[arg-type]
    parameters = converter.convert(group.targets[0], model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in parameters.items()}


def parameter_specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """Return the dtype and shape of each parameter and buffer that can be saved, by name."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def load_group(
    model: PreTrainedModel, group: WeightGroup, checkpoint: WeightFiles, specs: dict[str, TensorSpec]
) -> dict[str, torch.Tensor]:
    """Load the parameters of a group by name, in the dtypes and shapes of `specs`.

    Rows that the checkpoint lacks become the mean of the other rows, as `extend_vocabulary` makes them.
    """
    dtype = specs[group.targets[0]].dtype
    # Cast before converting, as loading does.
    tensors = [checkpoint.read(source) for source in group.sources]
    tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    parameters = convert_group(model, group, tensors)
    del tensors
    return {name: _add_rows(tensor, specs[name].shape) for name, tensor in parameters.items()}


def _add_rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    # Only an embedding or head can lack rows.
    if tensor.shape == shape or tensor.ndim == 0 or tensor.shape[0] >= shape[0]:
        return tensor
    mean = tensor.mean(0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(shape[0] - tensor.shape[0], *tensor.shape[1:])])


def file_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert parameters to the form and the names that they have in files."""
    return revert_weight_conversion(model, tensors)
