"""What a run trains with our defaults merges into the bits of PEFT's own merge: every method that PEFT can merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from support import materialize, relative_distance
from transformers import AutoModelForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.defaults import fill_method_options
from accel_llm.adapters.saved import save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.merge.merge import merge_adapter
from accel_llm.model.loading import load_model
from accel_llm.training.method_facts import recorded_facts

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of what it corrects itself
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # torch's, for FRoD's sparse matrix
]
METHODS = [name for name, facts in recorded_facts().items() if facts.mergeable and name != "qlora"]
IDS = torch.randint(3, 600, (2, 24), generator=torch.Generator().manual_seed(1))


def train(base: Path, folder: Path, method: str) -> Any:
    """Three steps of AdamW at a high rate."""
    needed = {"token_indices": IDS[0, :3].tolist()} if method == "trainable_tokens" else {}
    options = fill_method_options(
        TrainOptions(model_name_or_path=str(base), packing=False, method=method, method_options=needed)
    )
    torch.manual_seed(0)
    model: Any = materialize(attach_adapter(load_model(options), options), options).train()
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(state.values(), lr=0.02)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, folder, {name: parameter.detach().clone() for name, parameter in state.items()}, str(base))
    return model.eval()


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m == "ia3" else pytest.mark.long) for m in METHODS])
def test_a_trained_adapter_merges_into_the_bits_of_peft(tiny, tmp_path, method):
    model = train(tiny, tmp_path / "adapter", method)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "peft")
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "peft"))
    assert merged.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, merged[name])]
    with torch.no_grad():
        loaded, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", tiny))
        actual, trained, untrained = (m.eval()(input_ids=IDS).logits for m in (loaded, model, base))
    assert relative_distance(actual, trained) < 1e-5 < relative_distance(trained, untrained)
