"""Tokenizers and causal language models: found, checked, loaded for the strategy in force, never half-read."""

import os
import re
import textwrap
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.backend.accelerator import precision_of, strategy
from accel_llm.config.options import MethodOptions, ModelOptions, PretrainOptions, TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model import attention
from accel_llm.model import loss as losses
from accel_llm.model import placement as shards
from accel_llm.model import untrusted as strangers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# What loading a model that is not there, not whole or not known ends in.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError)
UNREADABLE += (SafetensorError, StrictDataclassError, UnpicklingError)
# A config.json may name any attention or experts, kernels from the hub too; what is taken is chosen here.
OWN_CHOICE: dict[str, Any] = {"attn_implementation": None, "experts_implementation": None}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def problems(options: ModelOptions) -> list[str]:
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
        if precision_of(options) != "bf16":
            found.append(
                f"master_weights: stochastic_rounding is for weights in bf16, precision is {precision_of(options)} here; "
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


def tokenizer_of(options: ModelOptions) -> PreTrainedTokenizerFast:
    """The tokenizer that a run names, or its model's own.

    Raises:
        ConfigError: neither is named, or there is none.
    """
    name = options.tokenizer_name or _source(options)
    return load_tokenizer(name, options.revision, options.trust_remote_code)


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


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub id, with no truncation or padding of its own and with a pad token.

    Raises:
        ConfigError: there is none, or it is not a fast tokenizer (masks need offsets).
    """
    strangers.check_tokenizer(_located(name), revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _located(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except UNREADABLE as error:
        raise ConfigError(f"tokenizer_name: no tokenizer could be loaded from {name} ({reason_of(error)}).") from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {name} is not a fast tokenizer (no tokenizer.json); exact masks need its offsets."
        )
    # Files saved in the middle of somebody's training carry truncation and padding that would cut every row.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token_id is None:
        # Labels go by span and attention by length, so sharing the id with eos masks nothing.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    token = tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights as they lie in the model folder."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def load_config(options: ModelOptions, max_length: int | None = None) -> PreTrainedConfig:
    """The model's config alone, for the checks that must come before any weight is read.

    Raises:
        ConfigError: no model was named, it is not one, or `max_length` is beyond its positions.
    """
    name = _source(options)
    arguments = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    strangers.check_config(_located(name), "model_name_or_path", **arguments)
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
    compute = DTYPES[precision_of(options)]
    # Only weights that are loaded in the dtype that they are stored in can be maps.
    arguments: dict[str, Any] = {"dtype": compute if options.load_in_8bit else "auto"}
    quantization = quantization_config(options, compute, strategy() in ("zero3", "fsdp2"))
    if options.load_in_8bit:
        arguments["quantization_config"] = quantization
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    arguments |= {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    arguments["allow_pickle"] = options.allow_pickle
    # Under its spell transformers would share out an empty model first, and read the whole checkpoint on rank 0.
    unset_hf_deepspeed_config()
    model = load_whole(str(options.model_name_or_path), **arguments)
    model.unread = True  # type: ignore[assignment]
    if quantization and not options.load_in_8bit:
        shards.quantize_later(model, quantization)
        if options.use_dora or isinstance(options.init_lora_weights, str):
            # Their first values are made from the quantised weights.
            shards.settle(model, list(model.modules()), compute, torch.device("cpu"))
    return configure(model, options)


def load_whole(
    name: str, field: str = "model_name_or_path", allow_pickle: bool = False, **arguments: Any
) -> PreTrainedModel:
    """A causal LM whose every weight comes from its files, whatever `from_pretrained` takes in `arguments`.

    Weights that are a pickle are read with `allow_pickle` alone, and where there are no safetensors.

    Raises:
        ConfigError: it cannot be loaded, or its weights do not fill the model; transformers would draw the rest.
    """
    revision, trusted = arguments.get("revision", "main"), arguments.get("trust_remote_code", False)
    strangers.check_config(_located(name), field, revision, trusted)
    strangers.check_weights(_located(name), field, revision, allow_pickle)
    arguments = OWN_CHOICE | arguments
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
    shards.keep_gradients(model)
    return model


def quantization_config(method: MethodOptions, compute: torch.dtype, sharded: bool) -> BitsAndBytesConfig | None:
    if method.method == "qlora":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # A sharded parameter must have the dtype of the float parameters that it is flattened with.
            bnb_4bit_quant_storage=compute if sharded else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if method.load_in_8bit else None


def configure(model: PreTrainedModel, options: TrainOptions) -> PreTrainedModel:
    """What training needs of a freshly loaded or built model: isolation of documents, checkpointing, the loss.

    Raises:
        ConfigError: packing with a family that cannot keep documents apart, or no exact loss could be had.
    """
    if options.packing and options.attn_implementation in ("auto", "sdpa"):
        attention.enable(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = [n * options.max_length for n in (options.per_device_train_batch_size, options.per_device_eval_batch_size)]
    losses.attach(model, *tokens, label_smoothing=options.label_smoothing_factor, z_loss_coef=options.z_loss_coef)
    return model.train()


def build_model(config: PreTrainedConfig, options: TrainOptions) -> PreTrainedModel:
    """A causal LM with fresh weights (float32; seeded by the caller)."""
    chosen = dict(OWN_CHOICE)
    if options.attn_implementation != "auto":
        chosen["attn_implementation"] = options.attn_implementation
    # Not said, transformers 5.23 asks at the terminal.
    trusted = options.trust_remote_code
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted, **chosen)
    return configure(model, options)


def check_token_ids(
    parts: list[np.ndarray],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: range = range(0),
) -> None:
    """Raises ConfigError when the data holds an id that the embedding has no row for, nor will get one."""
    rows = max(config.get_text_config().vocab_size, new_tokens.stop if new_tokens else 0)
    largest = max(int(input_ids.max()) for input_ids in parts)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"tokenizer_name: the data holds token id {largest} ({token!r}), but the model's vocabulary has {rows} rows; "
            "use the model's own tokenizer."
        )


def saveable(settings: GenerationConfig | None) -> GenerationConfig:
    """A copy that can be saved: without the sampling values of a model that says it does not sample.

    Many published models hold such values. transformers 5 loads them, and raises when a changed copy is saved.
    """
    copy = GenerationConfig.from_dict(settings.to_dict() if settings else {})
    if not copy.do_sample:
        for name in SAMPLING:
            setattr(copy, name, None)
    return copy


def _read(loader: Any, name: str, field: str, **arguments: Any) -> Any:
    try:
        return loader(_located(name), **arguments)
    except UNREADABLE as error:
        raise ConfigError(f"{field}: {name} cannot be loaded ({reason_of(error)}).") from None


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


def reason_of(error: Exception) -> str:
    """A library's message on one line, short enough to stand in a sentence."""
    if isinstance(error, UnpicklingError):
        return "its pickle holds more than tensors"  # torch's own advice is to unpickle it all the same
    return textwrap.shorten(str(error).rstrip(". \n"), 300, placeholder=" ...") or type(error).__name__
