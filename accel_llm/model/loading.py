"""Loads a model and its config, or builds one with random weights, after checking that everything fits together."""

import os
import textwrap
from collections.abc import Iterable
from copy import deepcopy
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.backend.strategy import compute_dtype, strategy
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import ModelOptions, TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import enable_packing, enable_padding
from accel_llm.model.classifier import attach_scores, check_gives_scores, check_gives_tokens, model_loader, start_head
from accel_llm.model.config_file import correct_tied_embeddings
from accel_llm.model.encoders import head_names
from accel_llm.model.file_weights import compare_with_files
from accel_llm.model.first_weights import FirstWeights
from accel_llm.model.fresh_config import change_config, family_config, is_family
from accel_llm.model.language_part import causal_lm_class, causal_lm_loader, freeze_other_parts
from accel_llm.model.loss import attach_loss
from accel_llm.model.meta_device import OWN_IMPLEMENTATIONS, build_on_meta, without_quantization
from accel_llm.model.model_names import model_source
from accel_llm.model.padding import drop_invalid_pad_ids
from accel_llm.model.placement import quantize_layers
from accel_llm.model.positions import position_limit, scale_by_document
from accel_llm.model.quantization import (
    build_quantization_config,
    keep_gradients,
    prepare_4bit_layers,
    set_compute_dtype,
)
from accel_llm.model.quantized_share import check_quantized_share
from accel_llm.model.recomputation import check_recomputation, recompute_activations
from accel_llm.model.stored_quantization import (
    check_stored_quantization,
    is_stored_in_4_bits,
    stored_quantization,
    unpack_when_loaded,
)
from accel_llm.model.untrusted import check_untrusted_config, check_untrusted_weights
from accel_llm.system.launcher import process_rank

# Errors of transformers, safetensors and torch for a model that is missing, damaged or unknown.
LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError)
LOADING_ERRORS += (SafetensorError, StrictDataclassError, UnpicklingError)


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of the weights in the model folder."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def load_model_config(options: ModelOptions, max_length: int | None = None) -> PreTrainedConfig:
    """Load only the model's config, for the checks that come before any weight is read.

    Raises:
        ConfigError: no model is named, its config cannot be loaded, it has fewer than `max_length` positions, or the
            options cannot train such a model.
    """
    name = model_source(options)
    if isinstance(options, PretrainOptions) and options.config_name:
        config = _fresh_config(options, name)
    else:
        arguments = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        check_untrusted_config(name, "model_name_or_path", **arguments)
        config = _read_config(name, "model_name_or_path", **arguments)
    if isinstance(options, TrainOptions):
        if options.gives_scores:
            check_gives_scores(config, name, rewards=not isinstance(options, ClassifyOptions))
        else:
            check_gives_tokens(config, name, "model_name_or_path")
        _check_trainable(config, options)
    limit = position_limit(config)
    if max_length is not None and limit is not None and limit < max_length:
        default = "max_length" not in options.model_fields_set and max_length == getattr(options, "max_length", None)
        raise ConfigError(
            f"max_length: {max_length}{' (the default)' if default else ''} is beyond the model's {limit} positions; set "
            f"max_length to {limit} or less."
        )
    return config


def _fresh_config(options: PretrainOptions, name: str) -> PreTrainedConfig:
    """Read the config of a model with random weights, and change the fields that `config_overrides` names."""
    if is_family(name):
        config, settings = family_config(name), {}
    else:
        arguments = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        check_untrusted_config(name, "config_name", **arguments)
        config = _read_config(name, "config_name", **arguments)
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=options.revision)
    if options.config_overrides:
        config = change_config(config, settings, options.config_overrides)
        drop_invalid_pad_ids(config)
    return config


def load_model(options: TrainOptions, scores: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Load the causal LM with its weights still memory-mapped; `place_weights` reads them layer by layer.

    Only an 8-bit base is read here; transformers quantizes it while it loads. With `scores` see `load_complete_model`.

    Raises:
        ConfigError: the model cannot be loaded, weights are missing, or it cannot keep packed documents apart.
    """
    # A weight stays memory-mapped only if it is loaded in the dtype of the file.
    compute = compute_dtype(options)
    arguments: dict[str, Any] = {"dtype": compute if options.load_in_8bit else "auto"}
    quantization = build_quantization_config(options, compute, strategy() in ("zero3", "fsdp2"))
    if options.load_in_8bit:
        if scores and quantization:
            quantization.llm_int8_skip_modules = _head_of(scores)
        arguments["quantization_config"] = quantization
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    arguments |= {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    arguments |= {"allow_pickle": options.allow_pickle, "scores": scores}
    arguments["announce_head"] = options.adapter_name_or_path is None  # else the adapter has the head

    # While Accelerate's DeepSpeed config is set, transformers shards an empty model and reads every file on rank 0.
    unset_hf_deepspeed_config()
    model = load_complete_model(str(options.model_name_or_path), for_training=True, **arguments)
    model.unread = True  # type: ignore[assignment]

    # 4-bit layers wait for `place_weights`, except where PEFT computes DoRA's magnitudes from their weights. Then the
    # device quantizes them, in seconds; a CPU would take minutes.
    if is_stored_in_4_bits(model.config):
        set_compute_dtype(model, compute)
    elif quantization and not options.load_in_8bit:
        prepare_4bit_layers(model, quantization)
        if options.use_dora:
            quantize_layers(model, compute)
    return configure_for_training(model, options)


def load_complete_model(
    name: str,
    field: str = "model_name_or_path",
    allow_pickle: bool = False,
    for_training: bool = False,
    unpack: bool = False,
    scores: PreTrainedConfig | None = None,
    announce_head: bool = False,
    **arguments: Any,
) -> PreTrainedModel:
    """Load a causal LM and check that every weight came from its files; `arguments` go to `from_pretrained`.

    With `scores`, the config of a model that gives scores, a head that the files lack is drawn at random; with
    `announce_head` that is printed.

    A pickle is read only with `allow_pickle`, and only if there are no safetensors. `unpack` and `for_training` unpack
    quantized weights where transformers can; `for_training` also freezes the parts that no text passes through.

    Raises:
        ConfigError: the model cannot be loaded, or a weight is missing or has the wrong shape (transformers would
            initialize it at random).
    """
    # Nothing in the files may run code or lead out of the folder.
    revision, trusted = arguments.get("revision", "main"), arguments.get("trust_remote_code", False)
    check_untrusted_config(name, field, revision, trusted)
    check_untrusted_weights(name, field, revision, allow_pickle)
    arguments = OWN_IMPLEMENTATIONS | arguments
    # With None transformers 5.23 prefers safetensors and reads anything else by torch.load with weights_only.
    arguments |= {"use_safetensors": None if allow_pickle else True, "weights_only": True}
    # For a pickle from the hub transformers 5.23 asks a web service in the background to convert it.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    # Pass the config already loaded: only then do our implementations win over `_attn_implementation` in config.json.
    hub_arguments = {"revision": revision, "trust_remote_code": trusted}
    config = deepcopy(scores) or _read_config(name, field, **hub_arguments)
    if not scores:
        check_gives_tokens(config, name, field)
    if for_training or unpack:
        unpack_when_loaded(config)
    quantized = stored_quantization(config) is not None  # before loading, which removes this if it unpacks
    arguments |= hub_arguments | {"config": config}

    # transformers' own error does not name the weights of a wrong shape; its loading report does.
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load_from(model_loader(config).from_pretrained, name, field, **arguments)
    if scores:
        start_head(model, report["missing_keys"], announce_head)
    _check_complete(report, name, field)
    as_stored = not quantized and arguments.get("dtype") == "auto"
    compare_with_files(model, set(report["unexpected_keys"]), name, field, revision, as_stored)
    correct_tied_embeddings(model)
    if for_training:
        freeze_other_parts(model, config)
    scale_by_document(model)
    keep_gradients(model)
    return model


def configure_for_training(model: PreTrainedModel, options: TrainOptions) -> PreTrainedModel:
    """Prepare a freshly loaded or built model for training: packed attention, gradient checkpointing, our loss.

    Raises:
        ConfigError: the model cannot keep packed documents apart, or our loss does not equal its own.
    """
    # torch never trains the row `padding_idx`. Many models pad with the token that ends a turn, whose row must learn;
    # padding itself has neither attention nor a label, so it changes nothing.
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None
    if options.attn_implementation in ("auto", "sdpa"):
        (enable_packing if options.packing else enable_padding)(model)
    if options.gradient_checkpointing:
        recompute_activations(model, options.adapter_may_draw)
    if options.gives_scores:
        attach_scores(model)
        return model.train()
    tokens = [n * options.max_length for n in (options.per_device_train_batch_size, options.per_device_eval_batch_size)]
    attach_loss(model, *tokens, label_smoothing=options.label_smoothing_factor, z_loss_coef=options.z_loss_coef)
    return model.train()


def build_model(config: PreTrainedConfig, options: TrainOptions) -> PreTrainedModel:
    """Build a causal LM with random float32 weights, which `place_weights` draws layer by layer from the run's seed.

    Code that comes with a model, and a few families, do not say of each weight how it begins. Then all of them are drawn
    here, on each process; the caller sets the seed.
    """
    arguments: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    model = build_on_meta(config, tie=False, **arguments) if causal_lm_class(config) is not None else None
    first_weights = FirstWeights(model, options.seed) if model is not None else None
    if model is not None and first_weights is not None and not first_weights.unknown():
        model.unread, model.first_weights = True, first_weights  # type: ignore[assignment]
    else:
        if process_rank() == 0:
            print(
                f"{config.model_type} does not say how each weight begins: each process draws all of them", flush=True
            )
        unset_hf_deepspeed_config()  # or transformers shards a model under ZeRO-3 while it builds it
        config = without_quantization(config)
        arguments = OWN_IMPLEMENTATIONS | {"dtype": torch.float32} | arguments
        model = causal_lm_loader(config).from_config(config, **arguments)
    freeze_other_parts(model, config)
    scale_by_document(model)
    return configure_for_training(model, options)


def _head_of(config: PreTrainedConfig) -> list[str]:
    """Return the names of the head of a model that gives scores, before it is loaded."""
    with torch.device("meta"):
        return head_names(model_loader(config).from_config(config))


def _read_config(name: str, field: str, **arguments: Any) -> PreTrainedConfig:
    config = _load_from(AutoConfig.from_pretrained, name, field, **arguments)
    drop_invalid_pad_ids(config)
    return config


def _check_trainable(config: PreTrainedConfig, options: TrainOptions) -> None:
    """Check what the config alone tells about how the model can be trained.

    Raises:
        ConfigError: the options do not fit the model's family or the format of its weights.
    """
    sharded = compute_dtype(options) if strategy() in ("zero3", "fsdp2") else None
    if options.gradient_checkpointing:
        check_recomputation(config)
    if not (isinstance(options, PretrainOptions) and options.config_name):
        check_stored_quantization(config, options, sharded)
        check_quantized_share(config, options)


def _load_from(loader: Any, name: str, field: str, **arguments: Any) -> Any:
    try:
        return loader(name, **arguments)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{field}: {name} cannot be loaded ({short_reason(error)}).") from None


def _check_complete(report: dict[str, Any], name: str, field: str) -> None:
    problems = []
    if missing := sorted(report["missing_keys"]):
        problems.append(f"{len(missing)} weights are missing ({', '.join(missing[:3])})")
    if mismatch := describe_shape_mismatch(report["mismatched_keys"]):
        problems.append(mismatch)
    if problems:
        raise ConfigError(f"{field}: {name} does not fill the model: {'; '.join(problems)}.")


def describe_shape_mismatch(mismatches: Iterable[tuple[str, Any, Any]], owner: str = "the model needs") -> str:
    """Say how many weights have a wrong shape, and name the first; return "" if there are none.

    `mismatches` has the name, the shape and the right shape of each. `owner` is the text before the right shape.
    """
    texts = sorted(f"{name} {tuple(shape)}, {owner} {tuple(expected)}" for name, shape, expected in mismatches)
    return f"{len(texts)} weights have another shape, such as {texts[0]}" if texts else ""


def short_reason(error: Exception) -> str:
    """Return a library's error message on one line, short enough to be part of a sentence."""
    if isinstance(error, UnpicklingError):
        return "its pickle holds more than tensors"  # torch's own text advises to unpickle the file anyway
    return textwrap.shorten(str(error).rstrip(". \n"), 300, placeholder=" ...") or type(error).__name__
