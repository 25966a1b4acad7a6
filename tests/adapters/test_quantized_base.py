"""Each method on a base in 4 and 8 bits: as plain PEFT on the numbers that the base stands for, or refused for a reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from peft import get_peft_model
from support import materialize, relative_distance
from transformers import AutoConfig, AutoModelForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.methods import REFUSED_METHODS, peft_methods
from accel_llm.adapters.quantized_base import problem_on_quantized_base
from accel_llm.adapters.refusals import check_quantized_base
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model import placement
from accel_llm.model.loading import load_model

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings(
        "ignore:(?s).*(CUDA ext|butterfly_factor|Unsupported layer|no bias term|inputs will be cast|Sparse inv)"
    ),
]
METHODS = [name for name in peft_methods() if name not in (*REFUSED_METHODS, "qlora")]
# PEFT adds AdaLoRA's penalty in eval mode too.
OPTIONS = {"trainable_tokens": {"token_indices": [5, 9]}, "adalora": {"orth_reg_weight": 1e-12}}
OPTIONS |= {name: {"num_virtual_tokens": 4} for name in ("prefix", "p_tuning_v2", "prompt", "p_tuning")}
# One that works, one with PEFT's own layers, and one for each way to be wrong: packed bytes, lost scales, first values.
CHOSEN = {("ia3", 4), ("vera", 4), ("hra", 8), ("unilora", 4), ("delora", 4)}
CELLS = [
    pytest.param(method, bits, marks=[] if (method, bits) in CHOSEN else pytest.mark.long)
    for method in METHODS
    for bits in (4, 8)
]


@pytest.fixture(scope="module")
def wide(make_model, tmp_path_factory) -> Path:
    """A model that the defaults of all methods fit."""
    return make_model(
        tmp_path_factory.mktemp("wide"),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        initializer_range=0.1,
    )


def options(base: Path, method: str, bits: int) -> TrainOptions:
    settings: dict[str, Any] = {f"load_in_{bits}bit": True, "method_options": OPTIONS.get(method, {})}
    return TrainOptions(model_name_or_path=str(base), packing=False, precision="fp32", method=method, **settings)


def stands_for(weight: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 4:
        return dequantize_4bit(*quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))
    rows, scales, _ = int8_vectorwise_quant(weight.half())
    return rows.float() * scales[:, None] / 127


def plain_peft(base: Path, bits: int, model: Any) -> Any:
    """Return the same adapter as `model` has, with the same weights, by plain PEFT on the dequantized numbers."""
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    for module in plain.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = stands_for(module.weight.data, bits)
    wrapped = get_peft_model(plain, model.peft_config["default"])
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[name])
    return wrapped


def gradients(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(3, 35)[None]
    torch.manual_seed(1)
    loss = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def error(base: Path, method: str, bits: int) -> float:
    """Return the relative error of the loss and the gradients of our run."""
    chosen = options(base, method, bits)
    torch.manual_seed(2)
    model = materialize(attach_adapter(load_model(chosen), chosen), chosen)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    expected = plain_peft(base, bits, model)
    return max(relative_distance(a, b) for a, b in zip(gradients(model), gradients(expected), strict=True))


@pytest.mark.parametrize(("method", "bits"), CELLS)
def test_a_method_computes_with_the_numbers_of_the_base_or_is_refused(method, bits, wide):
    chosen = options(wide, method, bits)
    if reason := problem_on_quantized_base(chosen, stored_in_4_bits=False):
        with pytest.raises(ConfigError, match=f"load_in_{bits}bit: method {method} cannot be trained on") as caught:
            check_quantized_base(chosen, AutoConfig.from_pretrained(wide))
        assert reason in str(caught.value) and len(str(caught.value)) < 550
    else:
        assert error(wide, method, bits) < (1e-4 if bits == 4 else 0.1)


# What happens without the refusal. The first three are silent.
@pytest.mark.parametrize(
    ("method", "bits", "why"),
    [
        ("hra", 8, "packed bytes"),
        pytest.param("peanut", 8, "packed bytes", marks=pytest.mark.long),
        pytest.param("unilora", 8, "first values", marks=pytest.mark.long),
        pytest.param("hra", 4, "mat1 and mat2", marks=pytest.mark.long),
        pytest.param("lokr", 4, "invalid for input", marks=pytest.mark.long),
        pytest.param("gralora", 8, "view", marks=pytest.mark.long),
    ],
)
def test_what_is_refused_is_still_wrong_in_peft(method, bits, why, wide):
    assert why in str(problem_on_quantized_base(options(wide, method, bits), stored_in_4_bits=False))
    try:
        wrong = error(wide, method, bits)
    except (RuntimeError, ConfigError):
        return
    assert wrong > 0.1


def test_the_trial_needs_no_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(placement, "training_device", lambda: torch.device("meta"))
    assert problem_on_quantized_base(TrainOptions(method="ia3", load_in_4bit=True), stored_in_4_bits=False) is None
