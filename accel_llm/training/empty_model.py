"""Builds the model of a run with weights that have a shape and a dtype, but no data; see empty_step.py."""

import copy
from dataclasses import dataclass
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.partial import train_part
from accel_llm.config.options import TrainOptions
from accel_llm.model.classifier import model_loader
from accel_llm.model.language_part import freeze_other_parts
from accel_llm.model.loading import configure_for_training
from accel_llm.model.meta_device import OWN_IMPLEMENTATIONS, unsharded
from accel_llm.model.quantization import build_quantization_config, prepare_4bit_layers, quantized_weights
from accel_llm.system.quiet import quietly


@dataclass(frozen=True)
class StepSettings:
    """What decides about the memory of a step besides options and config.

    `compute` is the dtype of matrix products. With `masters` trained weights are float32, and autocast computes. With
    `accumulated` the gradients of earlier micro-batches are there already.
    """

    device_type: str
    compute: torch.dtype
    masters: bool = True
    autocast: bool = True
    accumulated: bool = False


def attach_without_weights(options: TrainOptions, config: PreTrainedConfig) -> None:
    """Build the whole model without data, and choose what is trained of it, as the run will.

    Raises:
        ConfigError: the method or its options do not fit the model.
    """
    with quietly(), torch.device("meta"):
        layers = config.get_text_config().num_hidden_layers
        build_empty(options, shorten_config(config, layers), StepSettings("cpu", torch.float32))


def shorten_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a copy of the config with fewer layers, and with rotary embeddings that read no lengths."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    for scaling in (rotary, *rotary.values()):  # one for the model, or one for each kind of layer
        if isinstance(scaling, dict) and scaling.get("rope_type") in ("dynamic", "longrope"):
            scaling["rope_type"] = "default"  # its results have the same sizes
    for owner in (config, text):
        if getattr(owner, "quantization_config", None):  # of the files, which are not read
            del owner.quantization_config  # type: ignore[attr-defined]
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def build_empty(options: TrainOptions, config: PreTrainedConfig, settings: StepSettings) -> tuple[nn.Module, int]:
    """Build the model that is trained, without memory. The second value: the bytes that 8-bit weights take less.

    Layers in 8 bits choose columns by their values, so they are followed as 16-bit ones.
    """
    arguments = OWN_IMPLEMENTATIONS | {"trust_remote_code": options.trust_remote_code}
    with unsharded():
        model: PreTrainedModel = model_loader(config).from_config(config, dtype=settings.compute, **arguments)
    freeze_other_parts(model, config)
    model.unread = True  # type: ignore[assignment]
    saved = 0
    if options.load_in_8bit:
        names = quantized_weights(model)
        saved = sum(p.numel() * (p.itemsize - 1) - 4 * len(p) for n, p in model.named_parameters() if n in names)
    elif quantization := build_quantization_config(options, settings.compute, sharded=False):
        prepare_4bit_layers(model, quantization)
    # First values need weights. They take no further memory in a step.
    kept = [
        each for each in options.modules_to_save if any(f".{n}".endswith(f".{each}") for n, _ in model.named_modules())
    ]
    changes = {"init_lora_weights": True, "adapter_name_or_path": None, "modules_to_save": kept}
    options = options.model_copy(update=changes)
    configure_for_training(model, options)
    if options.has_adapter:
        return attach_adapter(model, options), saved
    train_part(model, options)
    return model, saved


def fill_model(model: nn.Module, settings: StepSettings) -> None:
    """Give all weights and buffers a place on the CPU, in the dtype that they are trained in."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                filled[id(parameter)] = _filled(parameter, settings)
            setattr(module, name, filled[id(parameter)])  # an LSTM also keeps a list of its parameters


def _filled(parameter: nn.Parameter, settings: StepSettings) -> nn.Parameter:
    if isinstance(parameter, Params4bit):
        four_bit: Any = parameter
        packed: Any = nn.Parameter(torch.empty(-(-parameter.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state = four_bit.module.quant_state = _empty_scales(parameter.shape, settings.compute)
        return packed
    dtype = parameter.dtype
    if parameter.is_floating_point():
        dtype = torch.float32 if parameter.requires_grad and settings.masters else settings.compute
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)


def _empty_scales(shape: torch.Size, compute: torch.dtype) -> QuantState:
    """Return the scales of NF4 weights: 8 bits for each 64 weights, and 32 bits for each 256 of those.

    Not by bitsandbytes' own `quantize_4bit`, which would keep tensors without data for later calls.
    """
    blocks = -(-shape.numel() // 64)
    outer = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return QuantState(absmax, shape, torch.empty(16), 64, "nf4", compute, torch.empty(()), outer)
