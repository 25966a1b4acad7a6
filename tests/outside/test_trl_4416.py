"""trl 4416 (also peft 2892, DeepSpeed 7900): a run ends without an error, and adapter_model.safetensors holds nothing.

Right is an export that holds every trained tensor, or an error. The number of tensors is counted from PEFT's own model.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import tiny_model
from transformers import AutoModelForCausalLM

from accel_llm.adapters.saved import save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.training.read_back import read_export_back, sample_logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2


def test_an_empty_adapter_is_never_exported(accelerator, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2))
    assert isinstance(model, PeftModel)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    options, logits = TrainOptions(model_name_or_path=str(tmp_path / "base")), sample_logits(accelerator, model)

    def export(state: dict[str, torch.Tensor]) -> int:
        folder = tmp_path / f"adapter-{len(state)}"
        save_adapter(model, folder, state, str(tmp_path / "base"))
        base.generation_config.save_pretrained(folder)
        read_export_back(folder, model, trained, logits, options)
        return len(load_file(folder / "adapter_model.safetensors"))

    assert export(trained) == len(trained) > 0
    with pytest.raises(ConfigError, match=rf"{len(trained)} of {len(trained)} weights are missing"):
        export({})
