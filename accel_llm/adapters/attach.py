"""Attaches a LoRA adapter to a base model with PEFT: a fresh one, or one that was trained before."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.compat import check_first_values
from accel_llm.adapters.initial import (
    check_own_start,
    draw_orthogonal,
    first_and_trained_factors,
    start_from_base,
    subtracted_init,
)
from accel_llm.adapters.locate import describe_other_base, locate_folder
from accel_llm.adapters.lora_forward import shorten_lora_forward
from accel_llm.adapters.methods import LORA_METHODS, fresh_adapter_config
from accel_llm.adapters.saved import ADAPTER_WEIGHTS, read_adapter_config
from accel_llm.backend.strategy import compute_dtype
from accel_llm.config.options import MethodOptions, TrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.experts import unpack_experts_in_forward
from accel_llm.model.language_part import parts_beside_language
from accel_llm.model.vocabulary import NEW_ROWS, PEFT_ROWS, train_new_rows
from accel_llm.system.launcher import process_rank

# Options that are taken over from an earlier adapter, and their keys in adapter_config.json.
ADOPTED_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_bias": "bias",
    "lora_target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
# In the name of a parameter: it has an adapter, or is one.
ADAPTED = re.compile(r"\.(base_layer|lora_[AB])\.")


def adopt_adapter_options(options: MethodOptions) -> Any:
    """Return the options with the folder and the settings of the adapter in `adapter_name_or_path`, if that is set.

    Raises:
        ConfigError: there is no such adapter, it is not a LoRA, its weights are not safetensors, or an option contradicts its settings.
    """
    name = options.adapter_name_or_path
    if name is None:
        return options
    folder = locate_folder(name, "adapter_name_or_path")
    settings = read_adapter_config(folder, "adapter_name_or_path")
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            f"adapter_name_or_path: {name} is a {settings.get('peft_type')} adapter; only a LORA can be trained on."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"adapter_name_or_path: {name} has no {ADAPTER_WEIGHTS}; only safetensors are read.")
    check_first_values(settings, name, "adapter_name_or_path")
    if subtracted_init(init := settings.get("init_lora_weights")) and (
        options.in_4_bits or options.load_in_8bit
    ):
        raise ConfigError(
            f"adapter_name_or_path: {name} was saved by PEFT with init_lora_weights {init}, whose base in 4 or 8 bits "
            "nobody can compute again; train it further with method lora and without load_in_8bit."
        )
    if "init_lora_weights" in options.model_fields_set and options.init_lora_weights is not True:
        raise ConfigError(
            f"init_lora_weights: {options.init_lora_weights} has no effect, because the weights of the adapter {name} "
            "are the first values; leave it out."
        )

    # Options that the user set must agree with the adapter; dropout may differ, it has no weights.
    adopted = {option: settings[key] for option, key in ADOPTED_OPTIONS.items() if settings.get(key) is not None}
    user_values = {
        option: getattr(options, option) for option in adopted.keys() & options.model_fields_set - {"lora_dropout"}
    }
    raise_problems(
        [
            f"{option}: {value!r} is given, but the adapter {name} has {adopted[option]!r}; leave it out."
            for option, value in sorted(user_values.items())
            if _comparable(value) != _comparable(adopted[option])
        ]
    )
    options = options.model_copy(update={"adapter_name_or_path": str(folder)})
    return options.with_defaults({option: value for option, value in adopted.items() if option not in user_values})


def _comparable(value: Any) -> Any:
    """Return a form of `value` for comparison: the order of a list, such as target modules, makes no difference."""
    return sorted(value) if isinstance(value, list) else value


def attach_adapter(model: PreTrainedModel, options: TrainOptions, new_tokens: range = range(0)) -> PeftModel:
    """Freeze `model` and add a trainable LoRA to it, in float32 whatever the dtype of the base is.

    The vocabulary rows of `new_tokens` are trained too. If `adapter_name_or_path` is set, the LoRA starts with the
    weights of that adapter.

    Raises:
        ConfigError: the model does not have the target modules or `modules_to_save`, the new rows cannot be trained
            with them, or the weights of the earlier adapter do not fit.
    """
    _check_module_names(model, options)
    if options.method not in LORA_METHODS:
        return _attach_other_adapter(model, options)
    config = _peft_config(options)
    if (others := [*parts_beside_language(model), *_routers(model)]) and not config.exclude_modules:
        # `all-linear`, and names such as q_proj, also match the layers of a vision tower.
        config.exclude_modules = f"(?:{'|'.join(map(re.escape, others))})(?:\\..*)?"
    # First values that are a part of the base's weights come afterwards: PEFT would change the base.
    init, orthogonal = subtracted_init(config.init_lora_weights), config.init_lora_weights == "orthogonal"
    try:
        wrapped: Any = get_peft_model(model, replace(config, init_lora_weights=True) if init or orthogonal else config)
    except ValueError as error:
        # PEFT's own message can have many lines; the first one says enough.
        raise ConfigError(
            f"lora_target_modules: {options.lora_target_modules!r} does not fit the model "
            f"({str(error).splitlines()[0]}); its linear layers are {_linear_layers(model)}."
        ) from None
    if init:
        start_from_base(wrapped, init, compute_dtype(options))
    elif orthogonal:
        draw_orthogonal(wrapped)
    shorten_lora_forward(wrapped)
    unpack_experts_in_forward(wrapped, recompute=not options.gradient_checkpointing)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # PEFT 0.21 makes the LoRA itself float32, but not biases and modules_to_save. In bfloat16 they would not
            # change: at usual learning rates a step is smaller than the distance to the next number.
            parameter.data = parameter.data.float()

    if options.lora_target_modules == "all-linear":
        _say_what_has_no_adapter(wrapped)
    adapter_config: Any = wrapped.peft_config["default"]
    adapter_config.init_lora_weights = config.init_lora_weights
    adapter_config.trainable_token_indices = train_new_rows(model, new_tokens) or None
    if options.adapter_name_or_path is not None:
        _load_weights(wrapped, options.adapter_name_or_path)
    return wrapped


def _attach_other_adapter(model: PreTrainedModel, options: TrainOptions) -> PeftModel:
    """Add an adapter of a method other than LoRA to `model`; what is trained is float32."""
    config = fresh_adapter_config(options)
    if (others := [*parts_beside_language(model), *_routers(model)]) and hasattr(config, "exclude_modules"):
        config.exclude_modules = f"(?:{'|'.join(map(re.escape, others))})(?:\\..*)?"
    try:
        wrapped: Any = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method: {options.method} does not fit the model ({str(error).splitlines()[0]}).") from None
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _routers(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that return more than a product (PhiMoE, Llama 4); PEFT 0.21 takes them for one."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).__module__.startswith("transformers.")
        and type(module).forward is not torch.nn.Linear.forward
    ]


def _peft_config(options: MethodOptions) -> Any:
    """Return the LoRA's config; an earlier adapter's is read as a whole, because not every setting has an option."""
    if options.adapter_name_or_path is None:
        return fresh_adapter_config(options)
    config: Any = PeftConfig.from_pretrained(options.adapter_name_or_path)
    # First values do not matter, the earlier weights replace them, unless they are subtracted. New rows are handled by
    # train_new_rows.
    init = subtracted_init(config.init_lora_weights)
    changes = {"inference_mode": False, "lora_dropout": options.lora_dropout, "init_lora_weights": init or True}
    # Without the name of its base PEFT does not warn of another spelling of the path; the fingerprint is checked instead.
    return replace(config, **changes, base_model_name_or_path=None, trainable_token_indices=None)


def _load_weights(model: Any, name: str) -> None:
    """Load an adapter's file into a fresh LoRA: every weight of the file, and every trained weight from it.

    Raises:
        ConfigError: the adapter was trained on another base, or names or shapes of the weights do not fit.
    """
    folder = Path(name)
    if problem := describe_other_base(folder, model.config._name_or_path):
        raise ConfigError(f"adapter_name_or_path: {name} {problem}; set model_name_or_path to the adapter's own base.")

    # What PEFT itself can load.
    weights = load_file(folder / ADAPTER_WEIGHTS)
    rows = {key: tensor for key, tensor in weights.items() if key.endswith(PEFT_ROWS)}
    try:
        result = set_peft_model_state_dict(model, {key: tensor for key, tensor in weights.items() if key not in rows})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"adapter_name_or_path: {name} does not fit the model ({reason}).") from None
    parameters = dict(model.named_parameters())
    missing = {key for key in result.missing_keys if key in parameters and parameters[key].requires_grad}

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
    check_own_start(first_and_trained_factors(model), name, "adapter_name_or_path")
    if process_rank() == 0:
        print(f"continuing from the adapter {name}; optimizer, schedule and data start from the beginning", flush=True)


def _check_module_names(model: PreTrainedModel, options: MethodOptions) -> None:
    """Check that each name in the options is a module: PEFT ignores a wrong name as long as another one fits.

    Raises:
        ConfigError: the model does not have one of them.
    """
    modules = [name for name, _ in model.named_modules()]
    problems = []
    for field, names in (
        ("lora_target_modules", options.lora_target_modules),
        ("modules_to_save", options.modules_to_save),
    ):
        if not isinstance(names, list):  # a pattern, or all-linear
            continue
        for name in names:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                problems.append(f"{field}: the model has no {name!r}; its linear layers are {_linear_layers(model)}.")
    raise_problems(problems)


def _say_what_has_no_adapter(model: PeftModel) -> None:
    """Say which share of the weights `all-linear` has left without an adapter, beside embedding, head and other parts.

    PEFT 0.21 knows the experts of some mixtures only, which are one tensor for each layer; of those families it leaves
    out the layers that bear the same names as parts of an expert, such as those of shared experts.
    """
    base: Any = model.get_base_model()
    parts = tuple(f"{part}." for part in parts_beside_language(base))
    kinds = Counter()
    for path, module in base.named_modules():
        if path.startswith(parts) or module in (base.get_input_embeddings(), base.get_output_embeddings()):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            is_matrix = isinstance(module, torch.nn.Linear | Conv1D) and parameter.ndim == 2
            is_expert = parameter.ndim == 3 and not isinstance(module, torch.nn.Conv1d)
            if (is_matrix or is_expert) and not ADAPTED.search(f"{name}."):
                kinds[re.sub(r"\.\d+(?=\.)", ".N", name.removesuffix(".weight"))] += parameter.numel()
    if kinds and process_rank() == 0:
        share = kinds.total() / sum(parameter.numel() for parameter in base.parameters())
        print(
            f"lora_target_modules: all-linear leaves {share:.0%} of the weights without an adapter: "
            f"{', '.join(sorted(kinds)[:4])}{' and others' if len(kinds) > 4 else ''}",
            flush=True,
        )


def _linear_layers(model: torch.nn.Module) -> str:
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
