"""Adapters through PEFT: attach to a base model, and save."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm.checkpoint import pieces
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError, check
from accel_llm.model import fingerprint, vocabulary

WEIGHTS = "adapter_model.safetensors"
BASE = "base_fingerprint"
# Options, and what adapter_config.json calls them
TAKEN_OVER = {
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


def taken_over(options: MethodOptions) -> Any:
    """The options with the settings of the adapter that `adapter_name_or_path` names, if it names one.

    Raises:
        ConfigError: it is no LoRA with weights in safetensors, or the person gives other settings than it has.
    """
    name = options.adapter_name_or_path
    if name is None:
        return options
    folder = Path(name).expanduser()
    found = read_config(folder)
    if found.get("peft_type") != "LORA":
        raise ConfigError(
            f"adapter_name_or_path: {name} is a {found.get('peft_type')} adapter; only LORA can go on here."
        )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"adapter_name_or_path: {name} has no {WEIGHTS}; only safetensors are read.")
    values = {ours: found[theirs] for ours, theirs in TAKEN_OVER.items() if found.get(theirs) is not None}
    given = {key: getattr(options, key) for key in values.keys() & options.model_fields_set - {"lora_dropout"}}
    check(
        [
            f"{key}: {value!r} is given, the adapter {name} has {values[key]!r}; leave it out."
            for key, value in sorted(given.items())
            if _comparable(value) != _comparable(values[key])
        ]
    )
    return options.with_defaults({key: value for key, value in values.items() if key not in given})


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def attach(model: PreTrainedModel, options: MethodOptions, new_tokens: range = range(0)) -> PeftModel:
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
    trained.trainable_token_indices = vocabulary.train_rows(model, new_tokens) or None
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
    expected = base_fingerprint(folder)
    if expected and expected != (found := fingerprint.of_model(base)):
        raise ConfigError(
            f"adapter_name_or_path: {name} was trained on another base model (fingerprint {expected}) than {base} ({found})."
        )
    weights = load_file(folder / WEIGHTS)
    rows = {key: tensor for key, tensor in weights.items() if key.endswith(vocabulary.PEFT_ROWS)}
    try:
        result = set_peft_model_state_dict(model, {key: tensor for key, tensor in weights.items() if key not in rows})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"adapter_name_or_path: {name} does not fit the model ({reason}).") from None
    parameters = dict(model.named_parameters())
    missing = {key for key in result.missing_keys if key in parameters and parameters[key].requires_grad}
    for key, tensor in rows.items():
        ours = key.removesuffix(vocabulary.PEFT_ROWS) + vocabulary.ROWS
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
    if os.environ.get("RANK", "0") == "0":
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
    check(problems)


def _linear_layers(model: torch.nn.Module) -> str:
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))


def save(model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base: str, of_base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors from gathered trainable weights `state`.

    `base` is recorded as the base model, an absolute path where it is a folder, so the adapter can be used from anywhere.
    The fingerprint `of_base` goes into the header of the weights, where no other program minds it.
    """
    local = Path(base).expanduser()
    model.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False)
    new_rows = {
        name.removesuffix(vocabulary.ROWS) + vocabulary.PEFT_ROWS: tensor
        for name, tensor in state.items()
        if name.endswith(f".{vocabulary.ROWS}")
    }
    path = folder / WEIGHTS
    # Not as a map of the file that is about to be replaced.
    written = {name: tensor.clone() for name, tensor in load_file(path).items()}
    pieces.write(
        path, dict(sorted((written | new_rows).items())), {"format": "pt"} | ({BASE: of_base} if of_base else {})
    )


def base_fingerprint(folder: Path) -> str | None:
    """`fingerprint.of_model` of the base that an adapter was trained on, if its file says so."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get(BASE)
    except (FileNotFoundError, SafetensorError):  # for who reads the weights to say
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's adapter_config.json.

    Raises:
        ConfigError: the folder is no adapter.
    """
    path = folder / "adapter_config.json"
    if not folder.exists():
        raise ConfigError(f"adapter: {folder} does not exist; name the adapter's folder, or the run's output_dir.")
    if not path.is_file():
        kind = "a full model" if (folder / "config.json").is_file() else "no adapter"
        raise ConfigError(f"adapter: {folder} is {kind}: it has no adapter_config.json.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"adapter: {path} is not JSON (line {error.lineno}: {error.msg}).") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"adapter: {path} holds a {type(settings).__name__}, not the settings of an adapter.")
    return settings
