"""Tries whether a method computes with a base in 4 or 8 bits as with the numbers that the base stands for.

A layer of bitsandbytes is a subclass of torch's Linear, so PEFT attaches any method to it. But some methods read the
base's weight, and find packed bytes there: they raise an error in the first step, or compute with other numbers. No
list of methods can know that of the next release of PEFT, so each run tries it on a model of two small layers.
"""

import warnings
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.adapters.methods import LORA_METHODS, config_class_of
from accel_llm.config.method import PROMPT_METHODS
from accel_llm.config.options import MethodOptions
from accel_llm.model.loading import short_reason
from accel_llm.model.placement import quantize_layers
from accel_llm.model.quantization import nf4_config, prepare_4bit_layers

# Sizes that the defaults of all methods of PEFT 0.21 fit.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 1, "vocab_size": 32, "initializer_range": 0.05}
CPU = torch.device("cpu")  # on a GPU too: the small model has tensors that are not moved there
LAYERS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
STEP = 0.05  # the adapter's first values may do nothing, so they are moved by so much at random
# In 8 bits the inputs of a layer are rounded too, by less than 1%. A packed weight makes an error of about 100%.
TOLERANCE = 0.1


def problem_on_quantized_base(options: MethodOptions, stored_in_4_bits: bool) -> str | None:
    """Return why the method cannot train on a base in 4 or 8 bits; None if it can.

    `stored_in_4_bits`: the model's files hold 4-bit weights.
    """
    if options.method in (*LORA_METHODS, *PROMPT_METHODS):  # PEFT has its own layers for LoRA; prompts touch none
        return None
    unset_hf_deepspeed_config()  # otherwise transformers shards the small model under ZeRO-3
    # Whoever loads the adapter attaches it to packed layers. In a run that packs the weights itself it is attached
    # before (see model/placement.py).
    orders = (True,) if stored_in_4_bits or options.load_in_8bit else (True, False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return next(filter(None, (_problem(options, packed_before) for packed_before in orders)), None)
        except Exception as error:  # whatever PEFT's code for another base stumbles over
            return f"PEFT's layers do not take quantized weights ({short_reason(error)})"


def _problem(options: MethodOptions, packed_before: bool) -> str | None:
    """Compare the method on quantized layers with the same on layers with the numbers that these stand for."""
    quantized = _attach(_quantize(_small_model(), options.load_in_8bit, packed_before), options)
    quantize_layers(quantized, torch.float32, CPU)
    plain = _attach(_dequantize(_quantize(_small_model(), options.load_in_8bit, packed=True)), options)
    if _adapter_differs(quantized, plain):
        return "PEFT takes the adapter's first values from the base's weights, and cannot read quantized ones"
    if _error(quantized, plain) > TOLERANCE:
        return "PEFT computes with the packed bytes of the weights as if they were the weights"
    return None


def _small_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def _quantize(model: PreTrainedModel, in_8_bits: bool, packed: bool) -> PreTrainedModel:
    """Replace the linear layers by those of bitsandbytes; 4-bit ones are not yet quantized without `packed`."""
    if not in_8_bits:
        prepare_4bit_layers(model, nf4_config(torch.float32))
        if packed:
            quantize_layers(model, torch.float32, CPU)
        return model
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            new = Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=6.0)
            new.load_state_dict(layer.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.model.get_submodule(parent), last, new.to("cpu").requires_grad_(False))
    model.is_loaded_in_8bit = True  # type: ignore[assignment]
    return model


def _dequantize(model: nn.Module) -> Any:
    """Replace the quantized layers of `model` by plain ones with the numbers that they stand for."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit | Linear8bitLt):
            weight: Any = layer.weight
            values: torch.Tensor
            if isinstance(layer, Linear4bit):
                values = dequantize_4bit(weight.data, weight.quant_state)
            else:
                values = weight.CB.float() * weight.SCB.float()[:, None] / 127
            new = nn.Linear(layer.in_features, layer.out_features, bias=False)
            new.weight = nn.Parameter(values.float(), requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    # transformers and PEFT look at these to know that a model is quantized.
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # type: ignore[union-attr, operator]
    return model


def _attach(model: PreTrainedModel, options: MethodOptions) -> Any:
    """Attach the method with those of its options that are no numbers, which fit the user's model and not this one."""
    config_class: Any = config_class_of(options.method)
    given = {name: value for name, value in options.method_options.items() if name != "layers_pattern"}
    values = {name: value for name, value in given.items() if isinstance(value, bool | str)}
    values |= {"total_step": 100} if options.method == "adalora" else {}
    values |= {"token_indices": [1]} if options.method == "trainable_tokens" else {"target_modules": LAYERS}
    values |= {"target_modules": ["input_layernorm"]} if options.method == "ln_tuning" else {}
    values |= {"feedforward_modules": ["down_proj"]} if options.method == "ia3" else {}
    torch.manual_seed(1)
    return get_peft_model(model, config_class(task_type="CAUSAL_LM", **values))


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that the method has added, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if ".default" in name}


def _adapter_differs(quantized: nn.Module, plain: nn.Module) -> bool:
    """Return whether the method's first values differ: they depend on the base's weights."""
    ours, theirs = _adapter_tensors(quantized), _adapter_tensors(plain)
    return ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours)


def _error(quantized: nn.Module, plain: nn.Module) -> float:
    """Return the largest relative error of logits and gradients beside the same adapter on the dequantized layers."""
    theirs = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            if parameter.requires_grad:
                parameter += STEP * torch.randn_like(parameter)
                theirs[name].copy_(parameter)
    pairs = zip(_logits_and_gradients(quantized), _logits_and_gradients(plain), strict=True)
    return max(float((ours - right).norm() / right.norm().clamp(min=1e-12)) for ours, right in pairs)


def _logits_and_gradients(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(3, 27).view(2, 12)
    torch.manual_seed(2)
    output = model.eval()(input_ids=ids, labels=ids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.logits.detach(), *torch.autograd.grad(output.loss, trained)]
