"""peft 2184: loading a PiSSA adapter changes the base's weights in silence, so every other adapter answers garbage.

The right value: an adapter beside ours computes what it computes alone. With an adapter that PEFT saved itself it does
not, which the last line keeps in mind.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import moved_adapter, relative_distance
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 40)[None]


def answers_beside(tiny: Path, other: Path, pissa: Path) -> float:
    """How far the answers of `other` move once `pissa` is loaded beside it."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), other, "other")
    alone = model.eval()(input_ids=IDS).logits
    model.load_adapter(pissa, "pissa")
    model.set_adapter("other")
    return relative_distance(model.eval()(input_ids=IDS).logits, alone)


@torch.no_grad()
def test_another_adapter_on_the_same_base_stays_what_it_is(tiny, tmp_path, quiet, recwarn):
    moved_adapter(tiny, tmp_path / "other")
    moved_adapter(tiny, tmp_path / "pissa", init_lora_weights="pissa", lora_r=4)
    assert answers_beside(tiny, tmp_path / "other", tmp_path / "pissa") < 1e-6
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(str(tmp_path / "peft"))
    assert answers_beside(tiny, tmp_path / "other", tmp_path / "peft") > 0.1
