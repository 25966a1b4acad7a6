"""peft #970: after a training with `torch.compile` the saved adapter is an empty dict.

The right file has each tensor of the adapter under the name that it has without a compiler: PEFT saves what its prefix
matches, and a compiled wrapper puts `_orig_mod.` before all names. The oracle is the same model, saved before.
"""

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from support import tiny_model

from accel_llm.backend.compilation import compile_layers


def test_an_adapter_has_the_same_tensors_with_and_without_a_compiler(monkeypatch, quiet):
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear"))
    names = get_peft_model_state_dict(model).keys()
    wrapped = {f"_orig_mod.{name}" for name in dict(model.named_parameters())}
    assert {name for name, _ in torch.compile(model).named_parameters()} == wrapped, "the fault of the report"

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    compile_layers(model)
    assert get_peft_model_state_dict(model).keys() == names and len(names) == 28
