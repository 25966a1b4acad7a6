"""Adapters through PEFT: attach to a base model, and save."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.saved import ADAPTER_WEIGHTS, read_adapter_config, read_base_fingerprint
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.vocabulary import NEW_ROWS, PEFT_ROWS, train_new_rows
from accel_llm.system.launcher import process_rank

# Options, and what adapter_config.json calls them
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


def lora_config(options: MethodOptions) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type] # PEFT divides it by r, whole or not
        lora_dropout=options.lora_dropout,
        bias=options.lora_bias,
        target_modules=options.lora_target_modules,
        modules_to_save=options.modules_to_save or None,
        init_lora_weights=options.init_lora_weights,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
    )


def adopt_adapter_options(options: MethodOptions) -> Any:
    """The options with the settings of the adapter that `adapter_name_or_path` names, if it names one.

    Raises:
        ConfigError: it is no LoRA with weights in safetensors, or the person gives other settings than it has.
    """
    name = options.adapter_name_or_path
    if name is None:
        return options
    folder = Path(name).expanduser()
    found = read_adapter_config(folder)
    if found.get("peft_type") != "LORA":
        raise ConfigError(
            f"adapter_name_or_path: {name} is a {found.get('peft_type')} adapter; only LORA can go on here."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"adapter_name_or_path: {name} has no {ADAPTER_WEIGHTS}; only safetensors are read.")
    values = {ours: found[theirs] for ours, theirs in ADOPTED_OPTIONS.items() if found.get(theirs) is not None}
    given = {key: getattr(options, key) for key in values.keys() & options.model_fields_set - {"lora_dropout"}}
    raise_problems(
        [
            f"{key}: {value!r} is given, the adapter {name} has {values[key]!r}; leave it out."
            for key, value in sorted(given.items())
            if _comparable(value) != _comparable(values[key])
        ]
    )
    return options.with_defaults({key: value for key, value in values.items() if key not in given})


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def attach_adapter(model: PreTrainedModel, options: MethodOptions, new_tokens: range = range(0)) -> PeftModel:
    """Freeze `model` and add a trainable LoRA to it; what is trained is float32 whatever the base's dtype.

    Of the vocabulary that the base shares with others, the rows of `new_tokens` alone are trained as well. It begins with
    the weights of `adapter_name_or_path`, where that is given.

    Raises:
        ConfigError: targets or modules_to_save that the model does not have, or that leave no way to train those rows; or
            the weights of the named adapter do not fit.
    """
    _check_names(model, options)
    try:
        wrapped = get_peft_model(model, _config(options))
    except ValueError as error:
        raise ConfigError(
            f"lora_target_modules: {options.lora_target_modules!r} does not fit the model ({str(error).splitlines()[0]}); "
            f"its linear layers are {_linear_layers(model)}."
        ) from None
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # PEFT 0.21 does so for the LoRA itself, but not for biases and modules_to_save: at usual learning rates a
            # step is smaller than what bfloat16 can tell apart.
            parameter.data = parameter.data.float()
    trained: Any = wrapped.peft_config["default"]
    trained.trainable_token_indices = train_new_rows(model, new_tokens) or None
    if options.adapter_name_or_path is not None:
        _load(wrapped, options.adapter_name_or_path)
    return wrapped  # type: ignore[return-value]


def _config(options: MethodOptions) -> Any:
    """The LoRA's settings; those of a named adapter in full, for not all of them have an option here."""
    if options.adapter_name_or_path is None:
        return lora_config(options)
    found = PeftConfig.from_pretrained(str(Path(options.adapter_name_or_path).expanduser()))
    changed = {"inference_mode": False, "lora_dropout": options.lora_dropout, "init_lora_weights": True}
    return replace(found, **changed, trainable_token_indices=None)


def _load(model: Any, name: str) -> None:
    """Give a fresh LoRA the weights of an adapter's file, all of them and no others."""
    folder, base = Path(name).expanduser(), model.config._name_or_path
    expected = read_base_fingerprint(folder)
    if expected and expected != (found := model_fingerprint(base)):
        raise ConfigError(
            f"adapter_name_or_path: {name} was trained on another base model (fingerprint {expected}) than {base} ({found})."
        )
    weights = load_file(folder / ADAPTER_WEIGHTS)
    rows = {key: tensor for key, tensor in weights.items() if key.endswith(PEFT_ROWS)}
    try:
        result = set_peft_model_state_dict(model, {key: tensor for key, tensor in weights.items() if key not in rows})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"adapter_name_or_path: {name} does not fit the model ({reason}).") from None
    parameters = dict(model.named_parameters())
    missing = {key for key in result.missing_keys if key in parameters and parameters[key].requires_grad}
    for key, tensor in rows.items():
        ours = key.removesuffix(PEFT_ROWS) + NEW_ROWS
        if ours in parameters and parameters[ours].shape == tensor.shape:
            with torch.no_grad():
                parameters[ours].copy_(tensor)
            missing.discard(ours)
        else:
            result.unexpected_keys.append(key)
    problems = [f"{len(missing)} of its weights are missing ({min(missing)})"] if missing else []
    if result.unexpected_keys:
        problems.append(f"{len(result.unexpected_keys)} have no place ({min(result.unexpected_keys)})")
    if problems:
        raise ConfigError(f"adapter_name_or_path: {name} does not fit the model: {'; '.join(problems)}.")
    if process_rank() == 0:
        print(f"going on from the adapter {name}; optimizer, schedule and data begin anew", flush=True)


def _check_names(model: PreTrainedModel, options: MethodOptions) -> None:
    """PEFT passes over a name that no module has as long as another one fits."""
    modules = [name for name, _ in model.named_modules()]
    problems = []
    for field, names in (
        ("lora_target_modules", options.lora_target_modules),
        ("modules_to_save", options.modules_to_save),
    ):
        for name in names if isinstance(names, list) else []:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                problems.append(f"{field}: the model has no {name!r}; its linear layers are {_linear_layers(model)}.")
    raise_problems(problems)


def _linear_layers(model: torch.nn.Module) -> str:
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
