"""A method that cannot compute on a model, or with its options, is refused before weights are read."""

from contextlib import nullcontext
from typing import Any

import pytest
from support import tiny_model
from transformers import LlamaConfig, PreTrainedConfig

from accel_llm.adapters.defaults import fill_method_options
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.training.memory_estimate import estimate_memory
from accel_llm.training.method_tryout import check_method_computes


def refusal(family: str, method: str, **options: Any) -> str:
    """Return the sentence with which a method is refused; nothing if it is not."""
    settings = fill_method_options(TrainOptions(method=method, max_length=32, packing=True, **options))
    config = tiny_model(family).config

    def estimate(changed: TrainOptions, config: PreTrainedConfig) -> Any:
        return estimate_memory(changed, config, 1, "cpu")

    try:
        estimate(settings, config)
    except Exception as error:
        try:
            check_method_computes(error, settings, config, estimate)
        except ConfigError as refused:
            return str(refused)
    return ""


@pytest.mark.long
def test_options_that_stop_the_first_step_are_refused():
    assert refusal("llama", "oft", method_options={"num_cayley_neumann_terms": 1}).startswith(
        "method_options: {'num_cayley_neumann_terms': 1} of method oft cannot be trained (element 0 of tensors"
    )


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        # OFT takes the four dimensions in DeepSeek-V3's attention for those of an image, and GraLoRA wants three.
        pytest.param("oft", "invalid for input of size 0", marks=pytest.mark.long),
        ("gralora", "too many values to unpack (expected 3)"),
    ],
)
def test_a_method_that_cannot_compute_on_a_model_is_refused(method, reason):
    sentence = refusal("deepseek_v3", method)
    assert sentence.startswith(f"method: {method} cannot compute on DeepseekV3") and reason in sentence


@pytest.mark.parametrize("method", ["boft", "shira", "unilora", "frod"])
def test_an_error_that_is_only_for_lack_of_data_refuses_nothing(method):
    assert not refusal("llama", method)
    assert not refusal("llama", "qlora", use_dora=True)  # which reads the 4-bit weights


@pytest.mark.long
def test_layers_on_which_it_computes_are_not_refused():
    assert not refusal("deepseek_v3", "oft", lora_target_modules=["q_a_proj", "down_proj"])
    assert not refusal("deepseek_v3", "lora")


def test_without_lora_working_the_model_is_at_fault():
    def estimate(*_: Any) -> None:
        raise RuntimeError("broken")

    check_method_computes(RuntimeError("broken"), TrainOptions(method="oft"), tiny_model("llama").config, estimate)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("oft", {"method_options": {"oft_block_size": 7}}, "method_options: oft_block_size 7 does not divide"),
        ("lora", {"lora_target_modules": ["nothing"]}, "lora_target_modules: the model has no 'nothing'"),
        ("lora", {"method_options": {"layers_to_transform": [99]}}, "method_options: layers_to_transform has 99"),
        ("freeze", {"method_options": {"parameters": ["nothing"]}}, "method_options: parameters 'nothing' matches no"),
        ("bitfit", {}, "method: bitfit trains biases, and LlamaForCausalLM has no biases"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_weights_are_read(method, options, sentence):
    assert refusal("llama", method, **options).startswith(sentence)


def test_a_layer_that_the_estimate_leaves_out_is_not_refused():
    """The estimate builds a few layers and works out the rest."""
    config = LlamaConfig(
        num_hidden_layers=12, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=99
    )
    for layer, fits in ((11, True), (12, False)):
        options = TrainOptions(method="lora", max_length=32, method_options={"layers_to_transform": [layer]})
        with pytest.raises(ConfigError, match="layers_to_transform has") as error:
            estimate_memory(options, config, 1, "cpu")
        with nullcontext() if fits else pytest.raises(ConfigError, match="has 12, but the model has layers 0 to 11"):
            check_method_computes(error.value, options, config, lambda *_: None)
