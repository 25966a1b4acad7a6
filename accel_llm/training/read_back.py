"""Reads an export back as its users will, with plain transformers or PEFT, before it appears under its name."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import psutil
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.adapters.fixed_parts import load_all_parts
from accel_llm.adapters.saved import ADAPTER_WEIGHTS, check_saved_adapter
from accel_llm.backend.accelerator import unwrap_model
from accel_llm.backend.strategy import compute_dtype
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import stock_attention, unwrap_causal_lm
from accel_llm.model.classifier import logits_to_compare, model_loader
from accel_llm.model.evaluating import evaluating
from accel_llm.model.loading import (
    LOADING_ERRORS,
    describe_shape_mismatch,
    short_reason,
)
from accel_llm.model.meta_device import OWN_IMPLEMENTATIONS
from accel_llm.model.padding import drop_invalid_pad_ids
from accel_llm.model.positions import positions_for_tokens
from accel_llm.model.vocabulary import NEW_ROWS
from accel_llm.system.weights import open_weights
from accel_llm.training.preflight import parameter_counts

MAX_PARAMETERS = 2**30  # a larger model is not loaded and computed once more
FLOAT32_BYTES = 4
TOKENS = 32  # of the row whose logits are compared
# Allowed relative error of the logits. 16-bit products and weights round, and may send a token to another expert.
MAX_ERROR_FLOAT32, MAX_ERROR_16_BITS = 0.01, 0.3


def sample_logits(accelerator: Accelerator, model: Any) -> torch.Tensor:
    """Return the trained model's logits of a row of random tokens, float32 [1, tokens, vocabulary], on the CPU.

    Of a model that gives scores they are those of the row's beginnings, [1, texts, labels]. All processes must call it.
    """
    inner = unwrap_model(accelerator, model)
    with evaluating(inner), accelerator.autocast(), stock_attention(inner):
        logits = logits_to_compare(inner, _sample_ids(inner).to(accelerator.device)).cpu()
    if isinstance(inner, FSDPModule):
        # The forward pass leaves the outermost unit whole. Only the main process then writes files, which shards it
        # again there, and the next forward pass would wait for the others.
        inner.reshard()
    return logits


def _sample_ids(model: Any) -> torch.Tensor:
    config = unwrap_causal_lm(model).config
    count = min(TOKENS, positions_for_tokens(unwrap_causal_lm(model)) or TOKENS)
    return torch.randint(config.get_text_config().vocab_size, (1, count), generator=torch.Generator().manual_seed(0))


def read_export_back(
    folder: Path, model: Any, state: dict[str, torch.Tensor], logits: torch.Tensor, options: TrainOptions
) -> dict[str, Any]:
    """Check that plain transformers or PEFT loads from `folder` what was trained. One process is enough.

    `model` comes without the wrappers of DDP or DeepSpeed, `state` are the weights that `folder` should hold, by their
    names in the model, and `logits` those of `sample_logits`.

    Returns:
        What was compared, for run.json.

    Raises:
        ConfigError: the files cannot be loaded, or they hold something else.
    """
    unset_hf_deepspeed_config()  # otherwise transformers would shard what it loads under ZeRO-3
    peft = hasattr(model, "peft_config")
    try:
        if not options.gives_scores:
            GenerationConfig.from_pretrained(str(folder))
        if peft:
            check_saved_adapter(model, folder)
        else:
            _check_model_files(folder, model, state)
        reason = _reason_not_to_compute(model, state)
        if not reason:
            error = _relative_error(
                _load_adapted(folder, model, options) if peft else _load_full(folder, state), model, logits
            )
    except LOADING_ERRORS as error_of_library:
        raise _unusable(folder, f"it cannot be loaded ({short_reason(error_of_library)})") from error_of_library
    if not reason:
        in_16_bits = compute_dtype(options) != torch.float32 or any(t.dtype.itemsize == 2 for t in state.values())
        allowed = MAX_ERROR_16_BITS if in_16_bits else MAX_ERROR_FLOAT32
        if not error <= allowed:
            raise _unusable(folder, f"the logits of a row differ by {error:.1e} (relative; {allowed} is allowed)")
    return {
        "loaded_by": "peft" if peft else "transformers",
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "logits": f"not compared: {reason}" if reason else {"tokens": logits.shape[1], "relative_error": error},
    }


def _unusable(folder: Path, problem: str) -> ConfigError:
    name = folder.name.removeprefix(".").removesuffix(".partial")
    return ConfigError(
        f"output_dir: {folder.with_name(name)} was written and read back, but {problem}; it is removed, and the weights "
        "are in the checkpoints."
    )


def _check_model_files(folder: Path, model: Any, state: dict[str, torch.Tensor]) -> None:
    """Compare the files of a model with the weights they should hold, without reading a weight.

    Raises:
        ConfigError: weights are missing, unknown, or have another shape.
    """
    specs = open_weights(folder).specs
    stored, trained = (sum(torch.Size(t.shape).numel() for t in tensors.values()) for tensors in (specs, state))
    if not stored or stored != trained:
        raise _unusable(folder, f"its files hold {stored:,} numbers in {len(specs)} tensors for {trained:,}")
    # Code that comes with a model may compute in its constructor, which an empty model cannot.
    if _has_own_code(unwrap_causal_lm(model)):
        return
    loaded, report = _load_plain(folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True)
    for what in ("missing", "unexpected"):
        if keys := sorted(map(str, report[f"{what}_keys"])):
            raise _unusable(folder, f"{len(keys)} weights are {what} ({', '.join(keys[:3])})")
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in loaded.named_buffers() if name in state}
    if names := sorted(shapes.keys() ^ state.keys()):
        raise _unusable(folder, f"{len(names)} weights have other names ({', '.join(names[:3])})")
    different = [(name, shapes[name], tuple(t.shape)) for name, t in state.items() if shapes[name] != tuple(t.shape)]
    if problem := describe_shape_mismatch(report["mismatched_keys"] or different):
        raise _unusable(folder, problem)


def _reason_not_to_compute(model: Any, state: dict[str, torch.Tensor]) -> str:
    """Say why the logits cannot be computed from the files; empty if they can."""
    inner, count = unwrap_causal_lm(model), parameter_counts(model)["total"]
    if count > MAX_PARAMETERS:
        return f"the model has {count:,} parameters, and at most {MAX_PARAMETERS:,} are loaded once more"
    if psutil.virtual_memory().available < 2 * FLOAT32_BYTES * count:
        return "there is too little memory to load the model once more"
    if _has_own_code(inner):
        return "the model comes with code of its own"
    if hasattr(model, "peft_config") and getattr(inner.config, "quantization_config", None):
        return "the base is quantized here, but not where the adapter is loaded"
    if any(name.endswith(f".{NEW_ROWS}") for name in state):
        return "the base needs rows for new tokens before the adapter can be loaded"
    return ""


def _has_own_code(model: PreTrainedModel) -> bool:
    # FSDP2 has put a class of its own before the model's.
    model_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    return not model_class.__module__.startswith("transformers.")


def _load_plain(folder: Path | str, **arguments: Any) -> Any:
    config = arguments.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(str(folder), revision=arguments.get("revision", "main"))
        drop_invalid_pad_ids(config)
    return model_loader(config).from_pretrained(str(folder), config=config, **(OWN_IMPLEMENTATIONS | arguments))


def _load_full(folder: Path, state: dict[str, torch.Tensor]) -> Any:
    """Load a model in float32 and check that it has every bit of `state`."""
    loaded = _load_plain(folder, dtype=torch.float32)
    tensors = dict(loaded.named_parameters()) | {name: b for name, b in loaded.named_buffers() if name in state}
    if names := [name for name, tensor in tensors.items() if not torch.equal(tensor, state[name].to(tensor.dtype))]:
        raise _unusable(folder, f"{len(names)} weights have other values ({', '.join(names[:3])})")
    return loaded


def _load_adapted(folder: Path, model: Any, options: TrainOptions) -> Any:
    """Load the base of the run in float32, and the adapter on it. A reward model's base may be a language model."""
    # transformers reads a pickle only if there is nothing else.
    pickles = {"use_safetensors": None if options.allow_pickle else True, "weights_only": True}
    config = deepcopy(unwrap_causal_lm(model).config) if options.gives_scores else None
    arguments = pickles | {"revision": options.revision, "config": config}
    base = _load_plain(str(options.model_name_or_path), dtype=torch.float32, **arguments)
    loaded = PeftModel.from_pretrained(base, str(folder))
    load_all_parts(loaded, load_file(folder / ADAPTER_WEIGHTS))
    return loaded


def _relative_error(loaded: Any, model: Any, logits: torch.Tensor) -> float:
    """Return the norm of the difference from the trained model's logits, divided by the norm of these."""
    with torch.no_grad():
        actual = logits_to_compare(loaded.eval(), _sample_ids(model))
    return float((actual - logits).norm() / logits.norm().clamp(min=1e-6))
