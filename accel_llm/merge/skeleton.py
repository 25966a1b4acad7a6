"""A model without its weights, and how the tensors of a checkpoint become its parameters and go back into files.

transformers 5 renames, splits, stacks and transposes weights of many families between the files and the model (the
experts of a mixture in one tensor, above all). It does so here with the same code, for a few tensors at a time.
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
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.model.untrusted import check_untrusted_config
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightFiles

TASKS: dict[str | None, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


class WeightGroup(NamedTuple):
    """Tensors of the checkpoint that become parameters of the model together, most often one that becomes one.

    `patterns` say for each source which of the converter's inputs it is.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    converter: WeightConverter | None


class Skeleton(NamedTuple):
    """`model` is on the meta device, `groups` has the origin of each of its parameters and buffers by name.

    `missing` are names that the checkpoint has nothing for, though it should.
    """

    model: PreTrainedModel
    groups: dict[str, WeightGroup]
    missing: frozenset[str]


def read_model_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Raises ConfigError when the folder's config.json cannot be read."""
    check_untrusted_config(str(folder), "base", "main", trust_remote_code)
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ConfigError(f"base: {folder} cannot be loaded ({short_reason(error)}).") from None


def model_class(config: PreTrainedConfig, task: str | None) -> Any:
    """What loads a model for `task`; an adapter that names none is for the architecture that the base is of."""
    if task is None:
        named = getattr(transformers, (config.architectures or [""])[0], None)
        return named or AutoModelForCausalLM
    return TASKS[task]


def build_skeleton(
    config: PreTrainedConfig,
    task: str | None,
    checkpoint: WeightFiles,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    lazy: bool,
) -> Skeleton:
    """The model for `task`, and where each of its weights comes from; `lazy` leaves them on the meta device.

    Otherwise they are maps of the files, which take no memory until they are read.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    loader = model_class(config, task)
    with torch.device("meta"):
        # Only the family's own class, which code that comes with the model may define, takes tensors by name.
        whole = hasattr(loader, "from_config")
        build = loader.from_config if whole else loader._from_config
        family = type(build(deepcopy(config), **({"trust_remote_code": trust_remote_code} if whole else {})))
    try:
        model, report = family.from_pretrained(
            None,
            config=deepcopy(config),
            state_dict=_placeholders(checkpoint.specs) if lazy else checkpoint.mapped(),
            dtype=dtype,
            device_map={"": "meta"} if lazy else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except LOADING_ERRORS as error:
        raise ConfigError(f"base: cannot be loaded ({short_reason(error)}).") from None
    if mismatched := sorted(
        f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
    ):
        raise ConfigError(
            f"base: does not fill the model: {len(mismatched)} weights have another shape ({', '.join(mismatched[:3])})."
        )
    groups = _groups(model, checkpoint.specs)
    if lazy:
        _tie_equals(model, groups, checkpoint)
    for names in tied_names(model):
        found = next((groups[name] for name in names if name in groups), None)
        if found is not None:
            groups |= {name: found._replace(targets=(name,)) for name in names if name not in groups}
    return Skeleton(model.eval(), groups, frozenset(report["missing_keys"]))


def _tie_equals(model: PreTrainedModel, groups: dict[str, WeightGroup], checkpoint: WeightFiles) -> None:
    """Tie what the files have twice with the same values, as loading does; transformers 5.23 leaves it on the meta device."""
    for name, other in list((model.all_tied_weights_keys or {}).items()):
        if not {name, other} <= groups.keys() or model.get_parameter(name) is model.get_parameter(other):
            continue
        (first,), (second,) = groups[name].sources, groups[other].sources
        if checkpoint.same(first, second):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(other))
            del groups[name]
        else:
            model.all_tied_weights_keys.pop(name)


def _placeholders(specs: dict[str, TensorSpec]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, the embedding's and the head's most often."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return [found for found in names.values() if len(found) > 1]


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters and buffers that are saved: of tied ones only the one that loading expects."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in _ignored(model)}
    return list(remove_tied_weights_from_state_dict(state, model))


def _ignored(model: PreTrainedModel) -> set[str]:
    return set(model._keys_to_ignore_on_save or [])


def _groups(model: PreTrainedModel, specs: dict[str, TensorSpec]) -> dict[str, WeightGroup]:
    """By each target's name, as transformers' own loading pairs them (core_model_loading, 5.23)."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    collected: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for source in sorted(specs, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], prefix, state)
        if name in state:
            collected[name].append((source, pattern))
    groups = {}
    for first, found in collected.items():
        pattern = found[0][1]
        if pattern is None:
            groups[first] = WeightGroup((found[-1][0],), (first,), (first,), None)
            continue
        sources, patterns = zip(*found, strict=True)
        group = WeightGroup(sources, patterns, (first,), of_pattern[pattern])
        targets = tuple(convert_group(model, group, [_placeholders(specs)[source] for source in group.sources]))
        groups |= dict.fromkeys(targets, group._replace(targets=targets))
    return groups


def convert_group(model: PreTrainedModel, group: WeightGroup, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters that `tensors`, those of the group's sources, become, by name."""
    if group.converter is None:
        return {group.targets[0]: tensors[0]}
    converter = deepcopy(group.converter)
    for source, pattern, tensor in zip(group.sources, group.patterns, tensors, strict=True):
        converter.add_tensor(group.targets[0], source, pattern, tensor)  # type: ignore[arg-type]
    made = converter.convert(group.targets[0], model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def parameter_specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """Dtype and shape of each parameter and buffer that files may hold."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def load_group(
    model: PreTrainedModel, group: WeightGroup, checkpoint: WeightFiles, specs: dict[str, TensorSpec]
) -> dict[str, torch.Tensor]:
    """The parameters of a group as they are loaded: in the dtypes and shapes of `specs`.

    Rows that the checkpoint does not have are the mean of all others, as `vocabulary.extend` makes them.
    """
    dtype = specs[group.targets[0]].dtype
    tensors = [checkpoint.read(source) for source in group.sources]
    tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    made = convert_group(model, group, tensors)
    del tensors
    return {name: _extended(tensor, specs[name].shape) for name, tensor in made.items()}


def _extended(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.shape == shape or tensor.ndim == 0 or tensor.shape[0] >= shape[0]:
        return tensor
    mean = tensor.mean(0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(shape[0] - tensor.shape[0], *tensor.shape[1:])])


def revert_names(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters as they stand in files, by the names that they have there."""
    return revert_weight_conversion(model, tensors)
