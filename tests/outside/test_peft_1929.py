"""peft 1929: a PiSSA with rslora, r 32 and alpha 64 is to become a LoRA on the base itself; the base comes back changed.

The right value: the base under the loaded adapter has the bits of the files, and the answers are those of the training.
"""

import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import moved_adapter, relative_distance
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 40)[None]
OPTIONS = {"init_lora_weights": "pissa", "lora_r": 32, "lora_alpha": 64, "use_rslora": True}


@torch.no_grad()
def test_the_base_of_the_loaded_adapter_is_the_base(tiny, tmp_path, quiet):
    trained = moved_adapter(tiny, tmp_path, lora_target_modules=["q_proj", "v_proj"], **OPTIONS)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    layer = loaded.get_submodule(f"base_model.model.{name}")
    assert torch.equal(
        layer.get_parameter("base_layer.weight"), load_file(tiny / "model.safetensors")[f"{name}.weight"]
    )
    expected = trained.eval()(input_ids=IDS).logits
    assert relative_distance(loaded.eval()(input_ids=IDS).logits, expected) < 1e-6
