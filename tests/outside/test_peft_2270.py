"""peft 2270: several PiSSA adapters, loaded one after the other on one base, answer otherwise than each one alone.

The right value: the answers do not depend on what was loaded before.
"""

import torch
from peft import PeftModel
from support import moved_adapter, relative_distance
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def test_the_third_adapter_answers_as_if_it_were_alone(tiny, tmp_path, quiet, recwarn):
    for k, init in enumerate(("pissa", "olora", "pissa")):
        moved_adapter(tiny, tmp_path / str(k), seed=k, init_lora_weights=init, lora_r=4)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    together: PeftModel = PeftModel.from_pretrained(base, tmp_path / "0", "0")
    for k in (1, 2):
        together.load_adapter(str(tmp_path / str(k)), str(k))
    for k in (2, 0, 1):
        together.set_adapter(str(k))
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / str(k))
        expected = alone.eval()(input_ids=IDS).logits
        assert relative_distance(together.eval()(input_ids=IDS).logits, expected) < 1e-6
