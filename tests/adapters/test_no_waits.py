"""PEFT's layers without their waits compute the same bits. Which layers wait: tests/model/test_waits.py."""

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import materialize, moved_adapter, random_rows, tiny_model

from accel_llm.adapters import attach
from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.no_waits import WITHOUT_WAITS, source_mark
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model
from accel_llm.model.loss import next_token_loss

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:(?s).*(CUDA ext|butterfly_factor|Sparse inv)"),
]
MENDED: dict[str, dict[str, Any]] = {
    "boft": {},
    "fourierft": {},
    "oft": {"use_cayley_neumann": False},
    "psoft": {},
    "shira": {},
    "trainable_tokens": {"token_indices": [5, 9]},
    "vblora": {},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


def step(base: Path, method: str, precision: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the loss and the gradients of a step with weights that moved, and the names of all that is saved."""
    options = TrainOptions(
        model_name_or_path=str(base), method=method, method_options=MENDED[method], max_length=64, precision=precision
    )
    torch.manual_seed(0)
    model: Any = materialize(attach_adapter(load_model(options), options), options).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = copy.deepcopy(model)  # what replaces a method belongs to its layer
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = next_token_loss(model, collate_packed(random_rows(4, 16)))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return gradients | {"loss": loss.detach()}, list(model.state_dict())


CASES = [(method, precision) for method in MENDED for precision in ("fp32", "bf16")]
DEFAULT = [("boft", "fp32"), ("shira", "bf16"), ("vblora", "fp32")]


@pytest.mark.parametrize(
    ("method", "precision"), [pytest.param(*c, marks=[] if c in DEFAULT else pytest.mark.long) for c in CASES]
)
def test_without_waits_the_bits_are_those_of_peft(base, method, precision, monkeypatch):
    ours, names = step(base, method, precision)
    monkeypatch.setattr(attach, "avoid_waits", lambda _: None)
    theirs, saved = step(base, method, precision)
    assert names == saved and ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_constants_of_the_layers_move_with_the_model(base):
    options = TrainOptions(model_name_or_path=str(base), method="fourierft", max_length=64)
    model = attach_adapter(load_model(options), options)
    assert {buffer.device.type for name, buffer in model.to("meta").named_buffers() if "indices" in name} == {"meta"}


def test_a_file_with_infinite_weights_is_not_trained_further(base, tmp_path):
    """PEFT asks in every forward whether VB-LoRA's logits are infinite; here it is asked once."""
    moved_adapter(base, tmp_path, method="vblora", max_length=64, method_options={"save_only_topk_weights": True})
    options = TrainOptions(model_name_or_path=str(base), adapter_name_or_path=str(tmp_path), max_length=64)
    options = adopt_adapter_options(options)
    with pytest.raises(ConfigError, match=r"cannot be trained further, because .*vblora_logits_A.* NaN or infinity"):
        attach_adapter(load_model(options), options)


@pytest.mark.parametrize("place", WITHOUT_WAITS)
def test_the_installed_peft_is_the_one_that_a_replacement_was_written_for(place):
    """If this fails: compare PEFT's method with the one before, mend the replacement, and note the new mark."""
    module, kind, name = place.rsplit(".", 2)
    assert source_mark(getattr(getattr(importlib.import_module(module), kind), name)) == WITHOUT_WAITS[place][0]


def test_a_method_of_another_source_is_left_alone(base, monkeypatch):
    options = TrainOptions(model_name_or_path=str(base), method="shira", max_length=64)
    place = "peft.tuners.shira.layer.Linear.get_delta_weight"
    layers = []
    for mark in (WITHOUT_WAITS[place][0], "another"):
        monkeypatch.setitem(WITHOUT_WAITS, place, (mark, WITHOUT_WAITS[place][1]))
        model = attach_adapter(load_model(options), options)
        layers.append(next(module for module in model.modules() if hasattr(module, "shira_weight")))
    assert ["get_delta_weight" in vars(layer) for layer in layers] == [True, False]
    dense, sparse = (layer.get_delta_weight("default") for layer in layers)
    assert sparse.is_sparse and not dense.is_sparse
