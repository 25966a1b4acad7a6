"""Which modules of a model a method adapts: its own choice where `all-linear` is not what it is made for."""

import re
from typing import Any

import accel_llm.system.chatter

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.classifier import head_modules
from accel_llm.model.experts import expert_weights

# (IA)3 scales the keys, the values and the second product of the feed-forward part (Liu 2022, "Few-Shot
# Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3).
IA3_ATTENTION = ["k_proj", "v_proj"]
IA3_FEEDFORWARD = {name for names in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.values() for name in names}


def choose_targets(options: MethodOptions, config: Any, model: PreTrainedModel) -> None:
    """Set the targets in PEFT's `config` of a method that is not made for all linear layers, unless the user did.

    Raises:
        ConfigError: the modules of this model are not known, or it has no row for a token.
    """
    chosen = "lora_target_modules" in options.model_fields_set or options.adapter_name_or_path is not None
    if options.method == "ia3":
        if not chosen:
            config.target_modules = _ia3_targets(model)
        elif config.target_modules == "all-linear":
            # PEFT 0.21 writes whole names into the file, and then misses the feed-forward names among them.
            config.target_modules = [name for name in linear_names(model) if name != _head_name(model)]
        if "feedforward_modules" not in options.method_options:
            names = config.target_modules
            config.feedforward_modules = sorted(
                IA3_FEEDFORWARD.intersection(names) if not isinstance(names, str) else ()
            )
    elif options.method == "ln_tuning" and not chosen:
        config.target_modules = _norms(model)
    elif options.method == "trainable_tokens":
        embedding: Any = model.get_input_embeddings()
        _check_token_ids(config.token_indices, len(embedding.weight))
        if not chosen:
            config.target_modules = [name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is embedding]


def _check_token_ids(ids: list[int], rows: int) -> None:
    """Check that each id has a row of its own; PEFT 0.21 fails without a sentence, or trains one of two equal ids.

    Raises:
        ConfigError: one of them has none.
    """
    wrong = [k for k in ids if not 0 <= k < rows]
    twice = [k for k in ids if ids.count(k) > 1]
    if wrong or twice:
        reason = (
            f"{wrong[0]}, but the embedding has rows 0 to {rows - 1}" if wrong else f"{twice[0]} twice; name it once"
        )
        raise ConfigError(f"method_options: token_indices names {reason}.")


def _ia3_targets(model: PreTrainedModel) -> list[str]:
    """Return the keys, values and feed-forward layers; PEFT's own table names the queries for some families (OPT, Phi)."""
    linear = set(linear_names(model))
    if linear.issuperset(IA3_ATTENTION) and len(feedforward := linear & IA3_FEEDFORWARD) == 1:
        return [*IA3_ATTENTION, *feedforward]
    names = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(model.config.model_type, ())
    modules = [f".{name}" for name, _ in model.named_modules()]
    # The table names w2 of Mixtral, whose experts have become one parameter.
    if names and all(any(module.endswith(f".{name}") for module in modules) for name in names):
        return list(names)
    raise ConfigError(
        f"lora_target_modules: method ia3 scales keys, values and the feed-forward part, whose names in "
        f"{type(model).__name__} are not known; name them. Its linear layers are {', '.join(linear_names(model))}."
    )


def _norms(model: PreTrainedModel) -> list[str]:
    """Return the last names of all normalisation layers: the only modules whose weight is a vector."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 1
    }
    return sorted(names)


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the last names of all linear layers."""
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def leave_out(config: Any, parts: list[str], model: PreTrainedModel) -> None:
    """Give no adapter to `parts`: `all-linear`, and names such as q_proj, also match the layers of a vision tower."""
    targets = getattr(config, "target_modules", None)
    if not parts or targets is None:
        return
    pattern = rf"(?:{'|'.join(map(re.escape, parts))})(?:\..*)?"
    if hasattr(config, "exclude_modules"):
        if isinstance(own := config.exclude_modules, list | set):
            own = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(own)))})"
        config.exclude_modules = f"(?:{own})|{pattern}" if own else pattern
        return
    if targets == "all-linear":
        targets = [name for name in linear_names(model) if name != _head_name(model)]
    if not isinstance(targets, str):
        targets = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(targets)))})"
    config.target_modules = f"(?!{pattern}$){targets}"


def refused_by_peft(config: Any, model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that `all-linear` must leave out, because PEFT refuses to adapt them.

    The kernels of Mamba read the weight of out_proj, and would not see its adapter.
    """
    check = getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "_check_target_module_compatiblity", None)
    refused = []
    for name in linear_names(model) if check else ():
        try:
            check(None, config, model, name)  # type: ignore[misc]
        except ValueError:
            refused += [key for key, _ in model.named_modules() if key == name or key.endswith(f".{name}")]
    return refused


def spell_out_targets(config: Any, model: PreTrainedModel) -> None:
    """Replace `all-linear` by the names of all linear layers if only some layers are to be adapted.

    PEFT reads `layers_to_transform` only together with names.

    Raises:
        ConfigError: the model has experts, to which names of layers do not apply, or no layer of such a number.
    """
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None:
        return
    count = model.config.get_text_config().num_hidden_layers
    for number in [wanted] if isinstance(wanted, int) else wanted:
        if not 0 <= number < count:
            raise ConfigError(
                f"method_options: layers_to_transform has {number}, but the model has layers 0 to {count - 1}."
            )
    if next(expert_weights(model), None) is not None:
        raise ConfigError(
            "method_options: layers_to_transform does not reach experts that are one parameter of a layer; name "
            "lora_target_modules, or leave it out."
        )
    config.target_modules = {name for name in linear_names(model) if name != _head_name(model)}


def _head_name(model: PreTrainedModel) -> str:
    head = next(reversed(head_modules(model)), None) or model.get_output_embeddings()
    return next((name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head), "")


def check_module_names(model: PreTrainedModel, options: MethodOptions) -> None:
    """Check that each name in the options is a module: PEFT ignores a wrong name as long as another one fits.

    Raises:
        ConfigError: the model does not have one of them.
    """
    modules = [name for name, _ in model.named_modules()]
    problems = []
    # PEFT knows names such as gate_proj, which the experts had before they became one parameter: see _check_targets in attach.py.
    has_fused_experts = next(expert_weights(model), None) is not None
    for field, names in (
        ("lora_target_modules", [] if has_fused_experts else options.lora_target_modules),
        # PEFT 0.21 gives each adapter of a classifier the names of heads of all families.
        ("modules_to_save", [] if options.gives_scores and options.adapter_name_or_path else options.modules_to_save),
    ):
        if not isinstance(names, list):  # a pattern, or all-linear
            continue
        for name in names:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                problems.append(
                    f"{field}: the model has no {name!r}; its linear layers are {', '.join(linear_names(model))}."
                )
    raise_problems(problems)
