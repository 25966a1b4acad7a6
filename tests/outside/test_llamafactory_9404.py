"""LLaMA-Factory 9404 (also 6331, 4992): the conversion of a PiSSA to a LoRA at the end of a run fails.

Rank 8 and alpha 16 become 16 and 32, once in the config and once in the weights, and they do not fit each other; the
weights are the last thing that such a run has. The right value: config, weights and the scaling of each layer agree, as
PEFT itself finds when it loads them.
"""

import json

from peft import PeftModel
from safetensors.torch import load_file
from support import moved_adapter
from transformers import AutoModelForCausalLM

from accel_llm.adapters.saved import check_saved_adapter


def test_rank_and_alpha_of_the_converted_adapter_fit_its_weights(tiny, tmp_path, quiet):
    trained = moved_adapter(tiny, tmp_path, init_lora_weights="pissa", lora_r=8, lora_alpha=16)
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (16, 32, True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(weight) for name, weight in weights.items() if ".lora_A." in name} == {16}
    assert {weight.shape[1] for name, weight in weights.items() if ".lora_B." in name} == {16}
    check_saved_adapter(trained, tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    assert loaded.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling == {"default": 2.0}
