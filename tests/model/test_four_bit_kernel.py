"""4-bit weights unpacked on a CPU against the definition of NF4: a code for each number times the scale of its block."""

import accel_llm.system.chatter

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from support import tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

from accel_llm.model.quantization import prepare_4bit_layers, round_to_4_bits

# Width 32 modulo 64 is where bitsandbytes 0.50.2 goes wrong on a CPU with AVX-512.
SHAPES = [(96, 96), (64, 224), (48, 32), (3, 160), (16, 172), (31, 40), (7, 8), (96, 64), (64, 128), (5, 33)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def defined_weights(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Unpack by hand: two codes in a byte, the higher one first; a scale for each 64 numbers of the flat matrix."""
    scales = state.absmax
    if state.nested:
        inner = state.state2
        codes = inner.code[state.absmax.long()].view(-1)
        scales = codes * inner.absmax.repeat_interleave(256)[: len(codes)] + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    numbers = state.code[codes][: state.shape.numel()]
    return (numbers * scales.repeat_interleave(state.blocksize)[: len(numbers)]).view(state.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_unpacked_weights_are_the_codes_times_the_scales(shape: tuple[int, int], nested: bool, kind: str) -> None:
    for dtype, rounding in ROUNDING.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        expected = defined_weights(packed, state)
        assert (dequantize_4bit(packed, state).float() - expected).norm() <= rounding * expected.norm()


@pytest.mark.parametrize("width", [96, 128])
def test_rounding_to_4_bits_loses_no_more_than_nf4_does(width: int) -> None:
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    for transposed in (False, True):
        # 0.092 for normally distributed weights; 0.2 with the scales of other blocks
        assert (round_to_4_bits(weight, transposed) - weight).norm() < 0.1 * weight.norm()


def test_a_4_bit_layer_multiplies_by_the_weights_that_its_codes_stand_for() -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=224)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    prepare_4bit_layers(model, config)
    layer: nn.Module = model.get_submodule("model.layers.0.mlp.gate_proj").to("cpu")
    layer.weight = layer.weight.to("cpu")
    inputs = torch.randn(5, 96, requires_grad=True)
    expected = F.linear(inputs, defined_weights(layer.weight.data, layer.weight.quant_state))
    result = layer(inputs)
    assert torch.allclose(result, expected, atol=1e-5)
    result.sum().backward()
    (by_hand,) = torch.autograd.grad(expected.sum(), inputs)
    assert torch.allclose(inputs.grad, by_hand, atol=1e-5)
