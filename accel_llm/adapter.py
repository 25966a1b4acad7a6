"""Adapters through PEFT: attach to a base model, and save."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from accel_llm import vocabulary
from accel_llm.errors import ConfigError, check
from accel_llm.options import MethodOptions


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


def attach(model: PreTrainedModel, options: MethodOptions, new_tokens: range = range(0)) -> PeftModel:
    """Freeze `model` and add a trainable LoRA to it; what is trained is float32 whatever the base's dtype.

    Of the vocabulary that the base shares with others, the rows of `new_tokens` alone are trained as well.

    Raises:
        ConfigError: targets or modules_to_save that the model does not have, or that leave no way to train those rows.
    """
    _check_names(model, options)
    try:
        wrapped = get_peft_model(model, lora_config(options))
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
    return wrapped  # type: ignore[return-value]


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


def save(model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors from gathered trainable weights `state`.

    `base` is recorded as the base model, an absolute path where it is a folder, so the adapter can be used from anywhere.
    """
    local = Path(base).expanduser()
    model.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False)
    new_rows = {
        name.removesuffix(vocabulary.ROWS) + vocabulary.PEFT_ROWS: tensor
        for name, tensor in state.items()
        if name.endswith(f".{vocabulary.ROWS}")
    }
    if new_rows:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path) | new_rows, path, metadata={"format": "pt"})


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
