"""peft 3009 (and unsloth 6936): `all-linear` does not reach the experts of a mixture, which are one tensor each layer.

PEFT 0.21 knows the experts of some families. Of those it then leaves out every other layer that bears the name of a part
of an expert: the shared experts and the dense layers of DeepSeek-V3 and GLM-4.5. Nothing says so. Right is that the run
names what has no adapter, with its share; here the share is counted from the parameters that PEFT has not touched.
"""

import re

import pytest
from peft import LoraConfig, get_peft_model
from support import tiny_model

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21.2
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
LEFT_OUT = {
    "gpt_oss": {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"},
    "deepseek_v3": {f"mlp.{owner}{part}_proj" for owner in ("", "shared_experts.") for part in ("down", "gate", "up")},
}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_layers_without_an_adapter_are_said(family: str, capsys) -> None:
    model = tiny_model(family)
    total = sum(parameter.numel() for parameter in model.parameters())
    ends = tuple(f"{name}{end}" for name in LEFT_OUT[family] for end in ("", ".weight"))
    adapted = get_peft_model(tiny_model(family), LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    frozen = sum(p.numel() for name, p in adapted.named_parameters() if re.split(r"layers\.\d+\.", name)[-1] in ends)
    assert frozen > 0.1 * total  # PEFT itself says nothing about them

    attach_adapter(model, TrainOptions(output_dir="unused", lora_r=1))
    line = capsys.readouterr().out
    assert line.startswith("lora_target_modules: all-linear leaves ")
    assert abs(int(re.search(r"(\d+)%", line)[1]) / 100 - frozen / total) < 0.02  # the adapter itself counts a little
    assert set(re.findall(r"layers\.N\.([\w.]+)", line)) <= LEFT_OUT[family]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nothing_is_said_where_all_layers_have_one(family: str, capsys) -> None:
    attach_adapter(tiny_model(family), TrainOptions(output_dir="unused", lora_r=1))
    assert not capsys.readouterr().out


def test_nothing_is_said_about_a_list_of_names(capsys) -> None:
    attach_adapter(tiny_model("llama"), TrainOptions(output_dir="unused", lora_r=1, lora_target_modules=["q_proj"]))
    assert not capsys.readouterr().out
