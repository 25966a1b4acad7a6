"""Weights in 4 and 8 bits (bitsandbytes)."""

from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from accel_llm.config.options import MethodOptions
from accel_llm.model.classifier import has_scores
from accel_llm.model.encoders import head_names
from accel_llm.model.experts import expert_weights, prepare_4bit_experts
from accel_llm.model.four_bit_kernel import correct_cpu_unpacking

# For all that follows: layers of transformers and PEFT unpack their weights themselves.
correct_cpu_unpacking()


def _layers_to_quantize(model: PreTrainedModel) -> tuple[dict[str, Any], list[str]]:
    """Return the linear layers that QLoRA holds in 4 bits, by name, and transformers' patterns of excluded layers."""
    kept = [*(model._keep_in_fp32_modules or []), *(head_names(model) if has_scores(model.config) else [])]
    excluded = HfQuantizer.get_modules_to_not_convert(model, None, kept)
    layers = {
        name: module
        for name, module in model.named_modules()
        # Not subclasses of Linear: transformers does not replace those either.
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, excluded)
    }
    return layers, excluded


def prepare_4bit_layers(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Replace the linear layers and the experts of a loaded model by 4-bit ones; `materialize_weights` quantizes them.

    transformers itself quantizes during loading, so every rank would hold the whole 4-bit model before it is sharded.
    """
    layers, excluded = _layers_to_quantize(model)
    replace_with_bnb_linear(model, excluded, config)

    # The new layers are empty: give each the weight of the layer that it replaces, not yet quantized.
    for name, old in layers.items():
        new: Any = model.get_submodule(name)
        weight = old.weight.data.T if isinstance(old, Conv1D) else old.weight.data
        new.weight = Params4bit(weight, requires_grad=False, **vars(new.weight))
        new.bias = old.bias

    prepare_4bit_experts(model, config)
    keep_gradients(model)
    # transformers and PEFT look at these two to know that the model is quantized.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.config.quantization_config = config


def keep_gradients(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` on the matrix product that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks the weights of a 4-bit layer at its first forward in eval
    mode. After that it uses a product without a gradient, in bfloat16, which also fails for shapes that do not divide.
    The constructor of each layer turns this on, so we turn it off on each layer after it is built.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def set_compute_dtype(model: nn.Module, compute: torch.dtype) -> None:
    """Let 4-bit layers that were stored as such multiply in this run's dtype, not in the one of their config."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = compute, True


def build_quantization_config(method: MethodOptions, compute: torch.dtype, sharded: bool) -> BitsAndBytesConfig | None:
    """Return the quantization that the options ask for: NF4 for QLoRA, 8 bits for `load_in_8bit`, None for neither."""
    if method.in_4_bits:
        # FSDP2 and ZeRO-3 flatten parameters together, so the packed bytes must have the dtype of the float ones.
        return nf4_config(compute, storage=compute if sharded else torch.uint8)
    return BitsAndBytesConfig(load_in_8bit=True) if method.load_in_8bit else None


def nf4_config(compute: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """Return the quantization of QLoRA: NF4, with scales that are quantized too."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
    )


def quantized_weights(model: PreTrainedModel) -> dict[str, bool]:
    """Return the names of the weights that QLoRA holds in 4 bits, and whether each is stored transposed (GPT-2)."""
    layers, _ = _layers_to_quantize(model)
    weights = {f"{name}.weight": isinstance(module, Conv1D) for name, module in layers.items()}
    return weights | {name: False for name, _, _ in expert_weights(model)}


def round_to_4_bits(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Quantize `weight` to NF4 and back: the values that a 4-bit layer of a QLoRA run computes with.

    Blocks of 64 values; their scales are quantized too (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized
    LLMs").
    """
    packed, state = quantize_4bit(
        weight.T.contiguous() if transposed else weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    unpacked = dequantize_4bit(packed, state)
    return unpacked.T.contiguous() if transposed else unpacked
