"""peft 2103: PiSSA on GPT-2 forgot that Conv1D stores its weight transposed (and PEFT 0.21's OLoRA still does).

The right value: at first the adapter changes nothing, and what is saved is loaded as what was trained.
"""

import pytest
import torch
from peft import PeftModel
from support import moved_adapter, relative_distance, tiny_model
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_transposed_weight_has_the_first_values_of_its_transpose(tmp_path, quiet, recwarn, init):
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    options = {"init_lora_weights": init, "lora_r": 4, "lora_target_modules": ["c_attn", "c_proj"]}
    start = moved_adapter(tmp_path / "base", tmp_path / "start", by=0.0, **options)
    assert relative_distance(start.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits) < 1e-6
    trained = moved_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    expected = trained.eval()(input_ids=IDS).logits
    assert relative_distance(plain(input_ids=IDS).logits, expected) > 0.1
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert relative_distance(loaded.eval()(input_ids=IDS).logits, expected) < 1e-6
