"""Options that PEFT accepts and that change nothing: refused as long as the installed PEFT still ignores them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from support import equal_tensors, materialize, moved_adapter, tiny_model

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.methods import check_method, config_class_of, peft_methods
from accel_llm.adapters.refused_options import EFFECTIVE_WITH, WITHOUT_EFFECT
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:(?s).*(fan_in_fan_out|Sparse inv|Unsupported layer type)"),
]
# Sizes that fit the small model.
SIZES = {"oft": {"oft_block_size": 8}, "psoft": {"r": 8}, "waveft": {"n_frequency": 100}, "miss": {"r": 8}}
SIZES |= {"randlora": {"r": 4}, "osf": {"effective_rank": 8}, "lokr": {"decompose_factor": 4}}
# Another value than PEFT's default for each option.
VALUES: dict[str, Any] = {
    "d_initial": 0.5, "eps": 0.5, "fan_in_fan_out": True, "init_scale": 0.5, "init_v_bound": 0.5, "lora_dropout": 0.5,
    "mini_r": 2, "module_dropout": 0.9, "n_frequency_pattern": {"q_proj": 4}, "num_cayley_neumann_terms": 3,
    "random_seed": 7, "rank_dropout_scale": True, "rank_pattern": {"q_proj": 2}, "sparse": True,
    "target_svd_config": {"q_proj": 2}, "use_cayley_neumann": True, "use_effective_conv2d": True,
    "wavelet_family": "db2",
}  # fmt: skip
# The value of the other option with which an option of EFFECTIVE_WITH changes nothing; `None`: PEFT's default.
IDLE = {"oft.use_cayley_neumann": False, "psoft.psoft_orth": False, "randlora.very_sparse": True}
IDLE |= {"vera.init_weights": False, "waveft.proportional_parameters": True, "waveft.use_idwt": False}

FAST = ("miss.mini_r", "tinylora.init_v_bound")  # in the default suite


def everything(method: str, **options: Any) -> list[torch.Tensor]:
    """Return what plain PEFT makes of the options: weights, logits in evaluation and in training, and gradients."""
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    config: Any = config_class_of(method)(task_type="CAUSAL_LM", **{**SIZES.get(method, {}), **targets, **options})
    model: Any = get_peft_model(tiny_model("llama"), config)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found = [tensor.detach().clone() for name, tensor in tensors.items() if ".default" in name]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    for mode in (False, True):
        torch.manual_seed(1)
        found.append(model.train(mode)(input_ids=torch.arange(3, 23)[None]).logits)
    found[-1].square().mean().backward()
    return found + [p.grad for p in model.parameters() if p.grad is not None]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("key", ["vera.fan_in_fan_out", *(key for key in WITHOUT_EFFECT if "." in key)])
def test_an_option_without_effect_is_refused(key):
    method, name = key.split(".")
    assert same(everything(method), everything(method, **{name: VALUES[name]}))
    with pytest.raises(ConfigError, match=f"{name} of method {method} has no effect: .*; leave it out"):
        check_method(TrainOptions(method=method, method_options={name: VALUES[name]}))


@pytest.mark.parametrize("key", [pytest.param(k, marks=[] if k in FAST else pytest.mark.long) for k in EFFECTIVE_WITH])
def test_an_option_is_refused_unless_another_one_lets_it_work(key):
    method, name = key.split(".")
    other, values = EFFECTIVE_WITH[key]
    given = {name: VALUES[name]}
    idle = {other: IDLE[f"{method}.{other}"]} if f"{method}.{other}" in IDLE else {}
    assert same(everything(method, **idle), everything(method, **idle, **given))
    with pytest.raises(ConfigError, match=f"{name} of method {method} has no effect unless {other} has"):
        check_method(TrainOptions(method=method, method_options={**idle, **given}))
    # A control: with the other option both differ, and nothing is refused.
    working = {other: (4 if other == "r" else 0.5) if values[0] is ... else values[0]}
    assert not same(everything(method, **working), everything(method, **working, **given))
    check_method(TrainOptions(method=method, method_options={**working, **given}))


def test_every_method_with_this_option_refuses_it():
    methods = [m for m in peft_methods() if hasattr(config_class_of(m), "fan_in_fan_out")]
    assert len(methods) > 15
    for method in methods:
        with pytest.raises(ConfigError, match="fan_in_fan_out of method"):
            check_method(TrainOptions(method=method, method_options={"fan_in_fan_out": True}))


def attached(folder: Path, method: str, **options: Any) -> Any:
    settings = TrainOptions(model_name_or_path=str(folder), method=method, packing=False, **options)
    return materialize(attach_adapter(load_model(settings), settings), settings)


@pytest.fixture(scope="module")
def without_biases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("lora", {"lora_bias": "all"}, "lora_bias: all has no effect, because the model has no biases; leave it out."),
        ("vera", {"method_options": {"bias": "vera_only"}}, "bias vera_only has no effect, because the adapted layers have"),
        ("glora", {"method_options": {"config_C": "vector"}}, "config_C vector has no effect, because the adapted layers"),
        ("c3a", {"method_options": {"block_size_pattern": {"nope": 4}}}, "block_size_pattern has 'nope', but no adapted"),
        ("vera", {"method_options": {"layers_to_transform": [9]}}, "layers_to_transform has 9, but the model has layers 0 to"),
    ],
)  # fmt: skip
def test_an_option_that_finds_nothing_in_the_model_is_refused(without_biases, method, values, message):
    with pytest.raises(ConfigError) as error:
        attached(without_biases, method, **values)
    assert message in str(error.value)


def test_some_layers_are_adapted_by_any_method(without_biases):
    model = attached(without_biases, "vera", method_options={"layers_to_transform": [1]})
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".layers.1." in name for name in trained)


def test_weights_without_first_values_are_refused(without_biases):
    with pytest.raises(
        ConfigError, match=r"with \{'init_weights': False\} method tinylora leaves .* without first values"
    ):
        attached(without_biases, "tinylora", method_options={"init_weights": False})
    assert not torch.are_deterministic_algorithms_enabled()
    attached(without_biases, "tinylora", method_options={"init_weights": "uniform"})


def test_an_adapter_whose_file_brings_all_weights_needs_no_first_values(without_biases, tmp_path):
    moved_adapter(without_biases, tmp_path, method="tinylora")
    change_settings(tmp_path, init_weights=False)
    options = TrainOptions(model_name_or_path=str(without_biases), adapter_name_or_path=str(tmp_path), packing=False)
    model: Any = attach_adapter(load_model(options), adopt_adapter_options(options))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert model.peft_config["default"].init_weights is False
    assert equal_tensors(get_peft_model_state_dict(model), saved)


@pytest.mark.parametrize(
    ("method", "made_with", "given", "remedy"),
    [
        ("loha", {"module_dropout": 0.1}, {"module_dropout": 0.0}, "write --method_options module_dropout=0.0, whatever "),
        ("pvera", {"generator_seed": 3}, {"generator_seed": None}, "write --method_options generator_seed=null, whatever"),
        ("oft", {"coft": True}, None, "was made with it, so merge it (launch/merge.py) and train a new one on the result."),
        ("hra", {"apply_GS": True}, {}, None),
        ("pvera", {"init_weights": False}, {}, None),
    ],
)  # fmt: skip
def test_an_earlier_adapter_goes_on_or_the_user_hears_how(tmp_path, method, made_with, given, remedy):
    """`given` are the options with which it goes on. The same option of a fresh adapter is to be left out."""
    config_class_of(method)(task_type="CAUSAL_LM", target_modules=["q_proj"], **made_with).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    if remedy:
        with pytest.raises(ConfigError, match=re.escape(remedy)):
            check_method(adopt_adapter_options(TrainOptions(adapter_name_or_path=str(tmp_path))))
    if given is not None:
        asked = TrainOptions(adapter_name_or_path=str(tmp_path), method_options=given)
        options = adopt_adapter_options(asked)
        check_method(options)
        assert options.method_options == {**made_with, **given}
    with pytest.raises(ConfigError, match="leave it out"):
        check_method(TrainOptions(method=method, method_options=made_with))


def change_settings(folder: Path, **settings: Any) -> None:
    """Change the adapter_config.json of an adapter, as if it had been made with these settings."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
