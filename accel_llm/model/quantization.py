"""Weights in 4 and 8 bits."""

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


def quantize_later(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Make the linear layers of a loaded model 4-bit layers whose weights `settle` will quantise.

    transformers itself quantises while it loads, so that every rank holds the whole 4-bit model before it is sharded.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or []))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    replace_with_bnb_linear(model, kept, config)
    for name, old in linears.items():
        new: Any = model.get_submodule(name)
        if new is not old:
            weight = old.weight.data.T if isinstance(old, Conv1D) else old.weight.data
            new.weight = Params4bit(weight, requires_grad=False, **vars(new.weight))
            new.bias = old.bias
    keep_gradients(model)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    model.config.quantization_config = config


def keep_gradients(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` on the product that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks the weights of such a layer at its first forward in eval mode.
    From then on it uses a product without a gradient, in bfloat16, which also fails where shapes do not divide. The
    constructor of each layer switches this on, so it is switched off on each layer after it is made.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def build_quantization_config(method: MethodOptions, compute: torch.dtype, sharded: bool) -> BitsAndBytesConfig | None:
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


def quantized_weights(model: PreTrainedModel) -> dict[str, bool]:
    """Names of the weights that are in 4 bits in a QLoRA run, and whether they are stored transposed (GPT-2's)."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or []))
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def round_to_4_bits(weight: torch.Tensor, turned: bool) -> torch.Tensor:
    """What a 4-bit layer of a QLoRA run computes with in place of `weight`: NF4, its scales quantised as well.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; blocks of 64.
    """
    packed, state = quantize_4bit(
        weight.T.contiguous() if turned else weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    whole = dequantize_4bit(packed, state)
    return whole.T.contiguous() if turned else whole
