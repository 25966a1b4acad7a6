"""chat.py asks a model as it was trained: in 4 bits its logits are those of plain PEFT on transformers' own 4-bit base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from support import moved_adapter, relative_distance, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from accel_llm.config.tool_options import ChatOptions
from accel_llm.merge.load import describe_placement, load_to_ask, load_with_adapter
from accel_llm.model.quantization import keep_gradients

pytestmark = pytest.mark.usefixtures("quiet")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
NF4.bnb_4bit_compute_dtype = torch.float32
IDS = torch.arange(3, 19).reshape(1, -1)
# Conv1D, tied matrices, grouped experts, and a layer that stays beside experts.
FAMILIES = ["llama", "gpt2", "gemma", "qwen3_moe", "qwen2_moe", "gpt_oss"]


def base_folder(folder: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(folder)
    return folder


def plain_4_bits(base: Path) -> Any:
    """Load a base with plain transformers; of a mixture it leaves the experts, which are rounded to NF4 here."""
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.float32)
    keep_gradients(model)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            packed, state = quantize_4bit(parameter.data, blocksize=64, compress_statistics=True, quant_type="nf4")
            parameter.data = dequantize_4bit(packed, state)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_in_4_bits_a_model_computes_as_plain_transformers_does(family, tmp_path):
    base = base_folder(tmp_path, family)
    model = load_to_ask(str(base), "model", ChatOptions(model=str(base), load_in_4bit=True))
    expected = logits(plain_4_bits(base))
    assert relative_distance(logits(model), expected) < 1e-6
    assert relative_distance(logits(load_to_ask(str(base), "model", ChatOptions(model=str(base)))), expected) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_asked_on_a_base_in_4_bits_if_it_was_trained_on_one(family, use_dora, tmp_path):
    base, adapter = base_folder(tmp_path / "base", family), tmp_path / "adapter"
    trained = moved_adapter(base, adapter, method="qlora", use_dora=use_dora).eval()
    options = ChatOptions(model=str(adapter))
    model = load_with_adapter(adapter, str(base), options)
    assert relative_distance(logits(model), logits(trained)) < 1e-6
    expected = logits(PeftModel.from_pretrained(plain_4_bits(base), str(adapter)).eval())
    assert relative_distance(logits(model), expected) < 1e-6
    in_16_bits = load_with_adapter(adapter, str(base), options.model_copy(update={"load_in_4bit": False}))
    assert relative_distance(logits(in_16_bits), expected) > 0.01
    print(describe_placement(model), describe_placement(in_16_bits))
