"""Tokenizers and causal language models: found, checked, loaded for the strategy in force, never half-read."""

import os
import re
import textwrap
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.backend.strategy import PRECISION_DTYPES, resolve_precision, strategy
from accel_llm.config.options import ModelOptions, PretrainOptions, TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss
from accel_llm.model.placement import settle_weights
from accel_llm.model.quantization import build_quantization_config, keep_gradients, quantize_later
from accel_llm.model.untrusted import check_untrusted_config, check_untrusted_weights

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# What loading a model that is not there, not whole or not known ends in.
LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError)
LOADING_ERRORS += (SafetensorError, StrictDataclassError, UnpicklingError)
# A config.json may name any attention or experts, kernels from the hub too; what is taken is chosen here.
OWN_IMPLEMENTATIONS: dict[str, Any] = {"attn_implementation": None, "experts_implementation": None}


def model_problems(options: ModelOptions) -> list[str]:
    """One sentence for each model or tokenizer that is not there or cannot be used so, before anything is read."""
    found = _cannot(options) if isinstance(options, TrainOptions) else []
    names = {"model_name_or_path": options.model_name_or_path}
    if isinstance(options, PretrainOptions):
        names["config_name"] = options.config_name
    elif options.model_name_or_path is None:
        return [*found, "model_name_or_path: is missing; name a model folder or a hub id."]
    for field, name in names.items():
        try:
            if name is not None:
                check_model_name(name, field)
        except ConfigError as error:
            found += error.problems
    return found


def _cannot(options: TrainOptions) -> list[str]:
    """Options of a model that exclude each other, or what the launch YAML asks for."""
    found = []
    if options.load_in_8bit and strategy() in ("zero3", "fsdp2"):
        found.append(
            f"load_in_8bit: {strategy()} cannot shard 8-bit weights, of which bitsandbytes keeps whole copies; use "
            "ddp.yaml, zero1.yaml or zero2.yaml, or method qlora."
        )
    if options.master_weights == "stochastic_rounding":
        if strategy().startswith("zero"):
            found.append("master_weights: DeepSpeed keeps float32 copies in any case; use ddp.yaml or fsdp2.yaml.")
        if resolve_precision(options) != "bf16":
            found.append(
                f"master_weights: stochastic_rounding is for weights in bf16, precision is {resolve_precision(options)} here; "
                "set precision: bf16, or master_weights: float32."
            )
    chosen = options.attn_implementation
    if options.packing and chosen not in ("auto", "sdpa") and not chosen.startswith("flash_attention"):
        found.append(
            f"attn_implementation: {chosen} does not keep packed documents apart; give auto or flash_attention_2, or "
            "set packing: false."
        )
    return found


def check_model_name(name: str, field: str = "model_name_or_path") -> None:
    """Refuse what is no model before anything is read.

    Raises:
        ConfigError: a path that does not exist, a folder without config.json, an adapter folder.
    """
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        # transformers 5 would load base + LoRA from it with nothing trainable, silently.
        raise ConfigError(
            f"{field}: {name} is an adapter, not a model; merge it first with "
            f"launch/merge.py --adapter {name} --output_dir MODEL, or name its base model."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ConfigError(
                f"{field}: the folder {name} has no config.json (it holds {found}); a model folder has one."
            )
    elif path.exists():
        raise ConfigError(f"{field}: {name} is a file; a model folder or a hub id (owner/name) is allowed.")
    elif not HUB_ID.match(name) or name.startswith("."):
        raise ConfigError(f"{field}: {name} does not exist; a model folder or a hub id (owner/name) is allowed.")


def _source(options: ModelOptions) -> str:
    """The model folder or hub id that a run starts from, be it weights or a config alone."""
    name = (
        options.config_name
        if isinstance(options, PretrainOptions) and options.config_name
        else options.model_name_or_path
    )
    if name is None:
        raise ConfigError("model_name_or_path: is missing; name a model folder or a hub id.")
    return name


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights as they lie in the model folder."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def load_model_config(options: ModelOptions, max_length: int | None = None) -> PreTrainedConfig:
    """The model's config alone, for the checks that must come before any weight is read.

    Raises:
        ConfigError: no model was named, it is not one, or `max_length` is beyond its positions.
    """
    name = _source(options)
    arguments = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    check_untrusted_config(_located(name), "model_name_or_path", **arguments)
    config = _read(AutoConfig.from_pretrained, name, "model_name_or_path", **arguments)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and isinstance(limit, int) and 0 < limit < max_length:
        raise ConfigError(
            f"max_length: {max_length} is beyond the model's {limit} positions; set max_length to {limit} or less."
        )
    return config


def load_model(options: TrainOptions) -> PreTrainedModel:
    """The causal LM as memory maps of its files: `shards.place` reads, casts, quantises and shards them layer by layer.

    An 8-bit base is read here, quantised while it is read.

    Raises:
        ConfigError: it cannot be loaded, its weights do not fill it, or it cannot keep packed documents apart.
    """
    compute = PRECISION_DTYPES[resolve_precision(options)]
    # Only weights that are loaded in the dtype that they are stored in can be maps.
    arguments: dict[str, Any] = {"dtype": compute if options.load_in_8bit else "auto"}
    quantization = build_quantization_config(options, compute, strategy() in ("zero3", "fsdp2"))
    if options.load_in_8bit:
        arguments["quantization_config"] = quantization
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    arguments |= {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    arguments["allow_pickle"] = options.allow_pickle
    # Under its spell transformers would share out an empty model first, and read the whole checkpoint on rank 0.
    unset_hf_deepspeed_config()
    model = load_complete_model(str(options.model_name_or_path), **arguments)
    model.unread = True  # type: ignore[assignment]
    if quantization and not options.load_in_8bit:
        quantize_later(model, quantization)
        if options.use_dora or isinstance(options.init_lora_weights, str):
            # Their first values are made from the quantised weights.
            settle_weights(model, list(model.modules()), compute, torch.device("cpu"))
    return configure_for_training(model, options)


def load_complete_model(
    name: str, field: str = "model_name_or_path", allow_pickle: bool = False, **arguments: Any
) -> PreTrainedModel:
    """A causal LM whose every weight comes from its files, whatever `from_pretrained` takes in `arguments`.

    Weights that are a pickle are read with `allow_pickle` alone, and where there are no safetensors.

    Raises:
        ConfigError: it cannot be loaded, or its weights do not fill the model; transformers would draw the rest.
    """
    revision, trusted = arguments.get("revision", "main"), arguments.get("trust_remote_code", False)
    check_untrusted_config(_located(name), field, revision, trusted)
    check_untrusted_weights(_located(name), field, revision, allow_pickle)
    arguments = OWN_IMPLEMENTATIONS | arguments
    # transformers 5.23 takes safetensors first where None is given; what is left goes to torch.load with weights_only.
    arguments |= {"use_safetensors": None if allow_pickle else True, "weights_only": True}
    # Beside a pickle of the hub it asks a service in the background to convert it.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    # Given beside a config that is loaded already they win over what it names; else `_attn_implementation` in it would.
    given = {"revision": revision, "trust_remote_code": trusted}
    arguments |= given | {"config": _read(AutoConfig.from_pretrained, name, field, **given)}
    # With mismatched shapes transformers raises without saying which; in its report they have names.
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _read(AutoModelForCausalLM.from_pretrained, name, field, **arguments)
    _check_filled(report, name, field)
    keep_gradients(model)
    return model


def configure_for_training(model: PreTrainedModel, options: TrainOptions) -> PreTrainedModel:
    """What training needs of a freshly loaded or built model: isolation of documents, checkpointing, the loss.

    Raises:
        ConfigError: packing with a family that cannot keep documents apart, or no exact loss could be had.
    """
    if options.packing and options.attn_implementation in ("auto", "sdpa"):
        enable_packing(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = [n * options.max_length for n in (options.per_device_train_batch_size, options.per_device_eval_batch_size)]
    attach_loss(model, *tokens, label_smoothing=options.label_smoothing_factor, z_loss_coef=options.z_loss_coef)
    return model.train()


def build_model(config: PreTrainedConfig, options: TrainOptions) -> PreTrainedModel:
    """A causal LM with fresh weights (float32; seeded by the caller)."""
    chosen = dict(OWN_IMPLEMENTATIONS)
    if options.attn_implementation != "auto":
        chosen["attn_implementation"] = options.attn_implementation
    # Not said, transformers 5.23 asks at the terminal.
    trusted = options.trust_remote_code
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted, **chosen)
    return configure_for_training(model, options)


def _read(loader: Any, name: str, field: str, **arguments: Any) -> Any:
    try:
        return loader(_located(name), **arguments)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{field}: {name} cannot be loaded ({short_reason(error)}).") from None


def _located(name: str) -> str:
    """`~` stands for the home folder in a recipe as well, where no shell replaces it."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _check_filled(report: dict[str, Any], name: str, field: str) -> None:
    problems = []
    if missing := sorted(report["missing_keys"]):
        problems.append(f"{len(missing)} weights are missing ({', '.join(missing[:3])})")
    if mismatched := sorted(
        f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
    ):
        problems.append(f"{len(mismatched)} have another shape ({', '.join(mismatched[:3])})")
    if problems:
        raise ConfigError(f"{field}: {name} does not fill the model: {'; '.join(problems)}.")


def short_reason(error: Exception) -> str:
    """A library's message on one line, short enough to stand in a sentence."""
    if isinstance(error, UnpicklingError):
        return "its pickle holds more than tensors"  # torch's own advice is to unpickle it all the same
    return textwrap.shorten(str(error).rstrip(". \n"), 300, placeholder=" ...") or type(error).__name__
