"""Attaches an adapter to a base model with PEFT: a fresh one, or one that was trained before."""

import re
from collections import Counter
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.boft import layer as boft_layer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.budget import weigh_penalty
from accel_llm.adapters.decompositions import Decompositions, decomposition_work
from accel_llm.adapters.fixed_parts import follow_projections, save_all_parts
from accel_llm.adapters.heads import check_head, heads_without_adapter, leave_out_heads, save_head
from accel_llm.adapters.initial import (
    check_own_start,
    first_and_trained_factors,
    give_first_values,
    init_by_peft,
    start_from_rounding,
    subtracted_init,
)
from accel_llm.adapters.locate import describe_other_base
from accel_llm.adapters.lora_forward import shorten_lora_forward
from accel_llm.adapters.lora_options import check_biases, check_patterns
from accel_llm.adapters.methods import LORA_METHODS, fresh_adapter_config
from accel_llm.adapters.no_waits import avoid_waits
from accel_llm.adapters.prompts import attach_prompt, load_ensemble, load_prompt
from accel_llm.adapters.saved import ADAPTER_WEIGHTS, unloaded
from accel_llm.adapters.sizes import fit_sizes
from accel_llm.adapters.targets import (
    check_module_names,
    choose_targets,
    leave_out,
    linear_names,
    refused_by_peft,
    spell_out_targets,
)
from accel_llm.adapters.unset_values import check_values_are_set, unset_as_nan
from accel_llm.backend.strategy import compute_dtype, strategy, training_device
from accel_llm.config.method import PROMPT_METHODS
from accel_llm.config.options import MethodOptions, TrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.experts import unpack_experts_in_forward
from accel_llm.model.language_part import parts_beside_language
from accel_llm.model.vocabulary import NEW_ROWS, PEFT_ROWS, train_rows
from accel_llm.system.launcher import process_rank

# Otherwise PEFT 0.21 compiles a CUDA extension for BOFT in every process, and where that fails anew for every layer.
boft_layer._FBD_CUDA = False


def attach_adapter(model: PreTrainedModel, options: TrainOptions, new_tokens: range = range(0)) -> PeftModel:
    """Freeze `model` and add a trainable adapter to it, in float32 whatever the dtype of the base is.

    The vocabulary rows of `new_tokens` are trained too. If `adapter_name_or_path` is set, the adapter starts with the
    weights that are there.

    Raises:
        ConfigError: the method or its options do not fit the model or the backend, the model does not have the target
            modules or `modules_to_save`, the new rows cannot be trained with them, or the weights of the earlier adapter
            do not fit.
    """
    if options.method in PROMPT_METHODS:
        prompted = attach_prompt(model, options, new_tokens)
        unpack_experts_in_forward(prompted, recompute=not options.gradient_checkpointing)
        if options.adapter_name_or_path is not None:
            _load_weights(prompted, options.adapter_name_or_path)
            load_ensemble(prompted, Path(options.adapter_name_or_path))
        return prompted
    check_module_names(model, options)
    config, all_linear = _fitted_config(model, options)
    linear = linear_names(model)
    # Single rows of the vocabulary are trained by model/vocabulary.py.
    chosen_rows = getattr(config, "trainable_token_indices", None)
    if chosen_rows:
        config.trainable_token_indices = None
    wrapped = _add_lora(model, options, config) if options.method in LORA_METHODS else _add(model, options, config)
    if isinstance(options.lora_target_modules, list):
        _check_targets(wrapped, options.lora_target_modules, linear)
    check_patterns(wrapped, config)
    if options.adapter_name_or_path is None:
        check_biases(wrapped, options)
    weigh_penalty(wrapped)
    avoid_waits(wrapped)
    unpack_experts_in_forward(wrapped, recompute=not options.gradient_checkpointing)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # PEFT 0.21 makes the adapter itself float32, but not biases and modules_to_save. In bfloat16 they would not
            # change: at usual learning rates a step is smaller than the distance to the next number.
            parameter.data = parameter.data.float()

    if all_linear:
        _say_what_has_no_adapter(wrapped)
    _train_rows(wrapped, model, options, new_tokens, chosen_rows)
    if options.adapter_name_or_path is not None:
        _load_weights(wrapped, options.adapter_name_or_path)
    return wrapped


def _fitted_config(model: PreTrainedModel, options: TrainOptions) -> tuple[Any, bool]:
    """Return PEFT's config with the targets and sizes that fit the model, and whether all linear layers are adapted.

    Raises:
        ConfigError: a target or a size of the user does not fit.
    """
    config = _peft_config(options)
    if options.gives_scores:
        save_head(options, config, model)
    choose_targets(options, config, model)
    all_linear, others = getattr(config, "target_modules", None) == "all-linear", _parts_without_adapter(model)
    if all_linear:
        others += refused_by_peft(config, model)
        spell_out_targets(config, model)
    fit_sizes(options, config, model, others)
    leave_out(config, others, model)
    return config, all_linear


def _add_lora(model: PreTrainedModel, options: TrainOptions, config: Any) -> Any:
    """Add a LoRA, whose first values may be a part of the base's weights, which PEFT would change.

    Raises:
        ConfigError: PEFT cannot, or the experts of a mixture get one under ZeRO-3.
    """
    plain = copy(config)
    plain.init_lora_weights = init_by_peft(config.init_lora_weights)
    wrapped = _add(model, options, plain)
    if strategy() == "zero3" and any(isinstance(module, ParamWrapper) for module in wrapped.modules()):
        # PEFT 0.21 adds to the gathered weights, and the gradient comes when ZeRO-3 has given them back: a RuntimeError.
        raise ConfigError(
            "method_options: target_parameters cannot be trained under zero3, which keeps the experts whole for their "
            "own layer only; use ddp.yaml, zero2.yaml or fsdp2.yaml, or name lora_target_modules without the experts."
        )
    give_first_values(wrapped, config.init_lora_weights, compute_dtype(options))
    if options.init_lora_weights == "loftq":
        start_from_rounding(wrapped, compute_dtype(options))
    shorten_lora_forward(wrapped)
    wrapped.peft_config["default"].init_lora_weights = config.init_lora_weights
    return wrapped


def _add(model: PreTrainedModel, options: TrainOptions, config: Any) -> Any:
    """Let PEFT freeze the model and add its layers.

    Raises:
        ConfigError: it cannot, or there is nothing to train in them.
    """
    # PEFT changes the list of targets in the config that it gets, and wraps the layers.
    targets, linear = getattr(config, "target_modules", None), ", ".join(linear_names(model))
    layers = [name for name, _ in model.named_modules()]
    given = f" with method_options {options.method_options}" if options.method_options else ""
    try:
        with Decompositions(options.method, training_device(), decomposition_work(model, config)), unset_as_nan():
            wrapped = get_peft_model(model, deepcopy(config))
            if options.gives_scores:  # PEFT 0.21 adds the names of heads, also of those that the model has not
                wrapped.peft_config["default"].modules_to_save = list(config.modules_to_save)
                leave_out_heads(wrapped.peft_config["default"], layers)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT stumbles over
        # PEFT's own message can have many lines; the first one says enough.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if cannot := re.search(r"ParamWrapper does not work with (\w+)", reason):
            raise ConfigError(
                f"{cannot[1]}: PEFT cannot use it for experts that are one parameter of a layer; leave it out, or name "
                "lora_target_modules without the experts."
            ) from None
        if "target" not in reason.lower():
            raise ConfigError(f"method: {options.method}{given} does not fit the model ({reason}).") from None
        raise ConfigError(
            f"lora_target_modules: {targets!r} does not fit the model ({reason}.); its linear layers are {linear}."
        ) from None
    # OSF of PEFT 0.21 passes over GPT-2's layers without a word, and GLoRA's options can leave nothing.
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ConfigError(
            f"method: {options.method}{given} has nothing to train in the layers {targets!r} of this model; give other "
            "options, or another method."
        )
    save_all_parts(wrapped)
    if options.adapter_name_or_path is None:
        check_values_are_set(wrapped, options)
    return wrapped


def _parts_without_adapter(model: PreTrainedModel) -> list[str]:
    """Return the names of parts that no text passes through, and of linear layers that return more than a product.

    The latter are routers of PhiMoE and Llama 4; PEFT 0.21 takes them for plain linear layers.
    """
    return [*parts_beside_language(model), *_routers(model), *heads_without_adapter(model)]


def _routers(model: PreTrainedModel) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).__module__.startswith("transformers.")
        and type(module).forward is not torch.nn.Linear.forward
    ]


def _peft_config(options: MethodOptions) -> Any:
    """Return the adapter's config; an earlier LoRA's is read as a whole, because not every setting has an option."""
    if options.adapter_name_or_path is None or options.method not in LORA_METHODS:
        return fresh_adapter_config(options)
    config: Any = PeftConfig.from_pretrained(options.adapter_name_or_path)
    # First values do not matter, the earlier weights replace them, unless they are subtracted.
    init = subtracted_init(config.init_lora_weights)
    changes = {"inference_mode": False, "lora_dropout": options.lora_dropout, "init_lora_weights": init or True}
    # Without the name of its base PEFT does not warn of another spelling of the path; the fingerprint is checked instead.
    return replace(config, **changes, base_model_name_or_path=None)


def _train_rows(wrapped: Any, model: PreTrainedModel, options: TrainOptions, new_tokens: range, chosen: Any) -> None:
    """Train the vocabulary rows of `new_tokens` and of `chosen` ones too, and note them in the adapter's config.

    Raises:
        ConfigError: an adapter of this method cannot hold them.
    """
    config, rows = wrapped.peft_config["default"], train_rows(model, new_tokens, chosen)
    if hasattr(config, "trainable_token_indices"):
        config.trainable_token_indices = rows or None
    elif rows:
        raise ConfigError(
            f"add_tokens: PEFT has no place for single rows in an adapter of method {options.method}; name "
            f"{' and '.join(rows)} in modules_to_save, or use method lora."
        )


def _load_weights(model: Any, name: str) -> None:
    """Load an adapter's file into a fresh one: every weight of the file, and every trained weight from it.

    Raises:
        ConfigError: the adapter was trained on another base, names or shapes of the weights do not fit, or some weights
            are not finite.
    """
    folder = Path(name)
    if problem := describe_other_base(folder, model.config._name_or_path):
        raise ConfigError(f"adapter_name_or_path: {name} {problem}; set model_name_or_path to the adapter's own base.")

    # What PEFT itself can load.
    weights = load_file(folder / ADAPTER_WEIGHTS)
    if model.active_peft_config.is_prompt_learning:
        return load_prompt(model, weights, name)
    rows = {key: tensor for key, tensor in weights.items() if key.endswith(PEFT_ROWS)}
    try:
        result = set_peft_model_state_dict(model, {key: tensor for key, tensor in weights.items() if key not in rows})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"adapter_name_or_path: {name} does not fit the model ({reason}).") from None
    except KeyError as error:  # PEFT 0.21 looks for each of its modules_to_save
        raise ConfigError(
            f"adapter_name_or_path: {name} does not fit the model: its file has no {error.args[0]}, a part of its head or "
            "of modules_to_save."
        ) from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = unloaded(parameters, result.missing_keys)
    missing = {key for key in keys if key in parameters and parameters[key].requires_grad}

    # The rows of new tokens are parameters of ours, see model/vocabulary.py.
    for key, tensor in rows.items():
        parameter_name = key.removesuffix(PEFT_ROWS) + NEW_ROWS
        if parameter_name in parameters and parameters[parameter_name].shape == tensor.shape:
            with torch.no_grad():
                parameters[parameter_name].copy_(tensor)
            missing.discard(parameter_name)
        else:
            result.unexpected_keys.append(key)

    # PEFT says nothing about names that do not fit.
    problems = [f"{len(missing)} of its weights are missing ({min(missing)})"] if missing else []
    if result.unexpected_keys:
        problems.append(f"{len(result.unexpected_keys)} have no place in the model ({min(result.unexpected_keys)})")
    if problems:
        raise ConfigError(f"adapter_name_or_path: {name} does not fit the model: {'; '.join(problems)}.")
    check_head(model, name)
    check_own_start(first_and_trained_factors(model), name, "adapter_name_or_path")
    follow_projections(model)
    # The file of a VB-LoRA with save_only_topk_weights: minus infinity stands for the logits that were left out.
    if broken := [key for key, weight in parameters.items() if weight.requires_grad and not weight.isfinite().all()]:
        raise ConfigError(
            f"adapter_name_or_path: {name} cannot be trained further, because {broken[0]} holds NaN or infinity there."
        )
    if process_rank() == 0:
        print(f"the run begins with the adapter {name}", flush=True)


def _check_targets(model: PeftModel, names: list[str], linear: list[str]) -> None:
    """Check that each target is a module or, for PEFT, a part of the experts, and say which modules it is not.

    PEFT 0.21 takes names such as gate_proj for the experts in families whose experts have become one parameter. Layers
    of the same name, those of shared experts and of layers without experts, then get no adapter. `linear` are the names
    of the linear layers before PEFT has wrapped them.

    Raises:
        ConfigError: there is no such module.
    """
    base: Any = model.get_base_model()
    config: Any = model.peft_config["default"]
    modules = {name: module for name, module in base.named_modules()}
    problems, left_out = [], []
    for name in names:
        found = [key for key in modules if key == name or key.endswith(f".{name}")]
        if not found and name in config.target_modules:
            problems.append(
                f"lora_target_modules: the model has no {name!r}; its linear layers are {', '.join(linear)}."
            )
        if name not in config.target_modules and config.target_parameters:
            left_out += [key for key in found if isinstance(modules[key], torch.nn.Linear)]
    raise_problems(problems)
    if left_out and process_rank() == 0:
        print(
            f"lora_target_modules: in this family PEFT takes {', '.join(names)} for the experts ("
            f"{', '.join(sorted(config.target_parameters))}), and leaves {len(left_out)} linear layers of the same names "
            f"without an adapter, such as {min(left_out)}",
            flush=True,
        )


def _say_what_has_no_adapter(model: PeftModel) -> None:
    """Say which share of the weights `all-linear` has left without an adapter, beside embedding, head and other parts.

    PEFT 0.21 knows the experts of some mixtures only, which are one tensor for each layer; of those families it leaves
    out the layers that bear the same names as parts of an expert, such as those of shared experts.
    """
    base: Any = model.get_base_model()
    parts = tuple(f"{part}." for part in parts_beside_language(base))
    trained = BaseTunerLayer | ModulesToSaveWrapper
    adapted = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, trained))
    kinds = Counter()
    for path, module in base.named_modules():
        if path.startswith(parts) or module in (base.get_input_embeddings(), base.get_output_embeddings()):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            is_matrix = isinstance(module, torch.nn.Linear | Conv1D) and parameter.ndim == 2
            is_expert = parameter.ndim == 3 and not isinstance(module, torch.nn.Conv1d)
            if (is_matrix or is_expert) and not name.startswith(adapted):
                kinds[re.sub(r"\.\d+(?=\.)", ".N", name.removesuffix(".weight"))] += parameter.numel()
    if kinds and process_rank() == 0:
        share = kinds.total() / sum(parameter.numel() for parameter in base.parameters())
        print(
            f"lora_target_modules: all-linear leaves {share:.0%} of the weights without an adapter: "
            f"{', '.join(sorted(kinds)[:4])}{' and others' if len(kinds) > 4 else ''}",
            flush=True,
        )
