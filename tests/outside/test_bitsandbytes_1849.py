"""bitsandbytes 1849: with transformers 5 the experts of a mixture are one parameter, and 4-bit loading skips them.

So QLoRA held most of a mixture in 16 bits, and nothing said so. The right numbers come from the same model in float32
whose weights were rounded to 4 bits and back by bitsandbytes' own functions: loss and gradients must be equal.
"""

import copy

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Params4bit
from peft import LoraConfig, get_peft_model
from support import materialize, tiny_model
from torch import nn

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model, load_model_config
from accel_llm.model.loss import next_token_loss

# PEFT adapts the experts of the first two families as well, with a wrapper around the module.
FAMILIES = {"qwen3_moe": {"moe_intermediate_size": 64}, "mixtral": {}, "gpt_oss": {}}
SIZES = {"hidden_size": 64, "intermediate_size": 64}
pytestmark = pytest.mark.usefixtures("quiet")


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return dequantize_4bit(*quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))


def round_matrices(model: nn.Module) -> None:
    with torch.no_grad():
        for name, module in model.named_modules():
            matrices = (type(module) is nn.Linear and name != "lm_head") or "Experts" in type(module).__name__
            for parameter in module.parameters(recurse=False) if matrices else []:
                if parameter.ndim > 1 and not (parameter.ndim == 2 and "Experts" in type(module).__name__):
                    parameter.copy_(rounded(parameter))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_held_in_4_bits_and_trained_through(tmp_path, family, recomputed):
    plain = tiny_model(family, **SIZES, **FAMILIES[family])
    plain.save_pretrained(tmp_path)
    options = TrainOptions(
        model_name_or_path=str(tmp_path), method="qlora", max_length=64, gradient_checkpointing=recomputed
    )
    model = materialize(attach_adapter(load_model(options), options), options)
    experts = [name for name, p in model.named_parameters() if isinstance(p, Params4bit) and "experts" in name]
    assert len(experts) == 4  # two matrices in each of two layers

    # The oracle: plain transformers and PEFT on the rounded weights.
    round_matrices(plain)
    oracle = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    names = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == names.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.normal_(std=0.1)
            names[name].copy_(parameter)

    ids = np.arange(3, 40)
    loss = next_token_loss(model, collate_packed([(ids, copy.copy(ids))])) / 36
    expected = oracle(input_ids=torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in trained.items():
        grad, right = parameter.grad, names[name].grad
        assert (grad - right).norm() <= 1e-4 * right.norm() + 1e-7, name


@pytest.mark.parametrize("method", ["adalora", "oft", pytest.param("miss", marks=pytest.mark.long)])
def test_other_adapters_are_trained_beside_experts_in_4_bits(tmp_path, method):
    """Fresh ones change nothing yet, so the loss is that of the rounded model."""
    plain = tiny_model("qwen3_moe", **SIZES, **FAMILIES["qwen3_moe"])
    plain.save_pretrained(tmp_path)
    options = TrainOptions(model_name_or_path=str(tmp_path), method=method, load_in_4bit=True, max_length=64)
    model = materialize(attach_adapter(load_model(options), options), options).eval()
    round_matrices(plain)
    ids = np.arange(3, 40)
    loss = next_token_loss(model, collate_packed([(ids, ids.copy())])) / 36
    expected = plain(input_ids=torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_8_bits_would_leave_the_experts_out_and_are_refused(tmp_path):
    tiny_model("mixtral", **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^load_in_8bit: 8\d% of the weights .* stay in 16 bits"):
        load_model_config(TrainOptions(model_name_or_path=str(tmp_path), load_in_8bit=True))
