"""The defaults of each method: filled in where the user set nothing, from the source that is named, and shown."""

import re
from pathlib import Path
from typing import Any

import pytest
from support import metrics, run_json, tiny_model
from transformers import LlamaConfig

from accel_llm.adapters.defaults import (
    METHOD_DEFAULTS,
    default_rate,
    describe_rate,
    fill_learning_rate,
    fill_method_options,
    method_notes,
)
from accel_llm.adapters.method_options import option_names
from accel_llm.adapters.methods import check_method, config_class_of, peft_methods
from accel_llm.adapters.partial import FreezeOptions
from accel_llm.config.options import SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError


def write_config(folder: Path, model_type: str, width: int, layers: int = 2) -> str:
    """Write the config of a large model, which is never built."""
    config = tiny_model("llama" if model_type == "mistral" else model_type).config
    values = {"hidden_size": width, "num_hidden_layers": layers, "model_type": model_type, "vocab_size": 128_256}
    (folder / "config.json").write_text(__import__("json").dumps(config.to_dict() | values), encoding="utf-8")
    return str(folder)


def filled(**values: Any) -> SftOptions:
    return fill_learning_rate(fill_method_options(SftOptions(**values)))


def test_the_table_names_methods_and_options_that_exist():
    assert METHOD_DEFAULTS.keys() <= {"full", "freeze", "bitfit", *peft_methods()} - {"lora", "qlora"}
    for method, defaults in METHOD_DEFAULTS.items():
        if method == "freeze":
            assert defaults.options.keys() <= vars(FreezeOptions()).keys()
        elif defaults.options:
            assert defaults.options.keys() <= set(option_names(config_class_of(method)))


@pytest.mark.parametrize(
    ("model_type", "width", "values", "rate", "source"),
    [
        # 5e-5 x 10 x (2000 / 4096)^0.781 = 2.86e-4; Tinker's own sweep of Llama 3.1 8B found 3e-4.
        ("llama", 4096, {}, 2.86e-4, "LoRA Without Regret"),
        ("llama", 4096, {"lora_r": 256}, 2.86e-4, "LoRA Without Regret"),
        ("llama", 8192, {}, 1.66e-4, "LoRA Without Regret"),
        ("qwen3", 4096, {}, 4.73e-4, "LoRA Without Regret"),
        # Outside the rule: other families, toys, another scale of the adapter, 4 bits.
        ("mistral", 4096, {}, 2e-4, "QLoRA"),
        ("llama", 64, {}, 2e-4, "QLoRA"),
        ("llama", 4096, {"lora_alpha": 16}, 2e-4, "QLoRA"),
        ("llama", 4096, {"use_rslora": True}, 2e-4, "QLoRA"),
        ("llama", 4096, {"method": "qlora"}, 2e-4, "QLoRA"),
        ("llama", 8192, {"load_in_4bit": True}, 1e-4, "QLoRA"),
        ("llama", 4096, {"init_lora_weights": "pissa"}, 2e-5, "PiSSA"),
        ("llama", 4096, {"method": "ia3"}, 3e-3, "T-Few"),
        ("llama", 4096, {"method": "full"}, 2e-5, "Alpaca"),
        ("llama", 4096, {"method": "randlora"}, 1e-4, "PEFT's comparison"),
    ],
)  # fmt: skip
def test_a_learning_rate_is_that_of_its_source(model_type, width, values, rate, source, tmp_path):
    options = filled(model_name_or_path=write_config(tmp_path, model_type, width), **values)
    assert options.learning_rate == pytest.approx(rate, rel=2e-3)
    assert source in describe_rate(options) and f"the default of method {options.method}" in describe_rate(options)
    # What the user sets is never touched.
    given = filled(model_name_or_path=str(tmp_path), learning_rate=7e-5, **values)
    assert given.learning_rate == 7e-5 and describe_rate(given) == "7e-05, as given"


def test_options_of_a_method_are_filled_in_beside_those_of_the_user():
    def options(method: str, **values: Any) -> dict[str, Any]:
        return fill_method_options(SftOptions(method=method, method_options=values)).method_options

    assert options("prompt") == {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}
    assert options("prompt", num_virtual_tokens=5)["num_virtual_tokens"] == 5
    # Options that mean something together are the user's, or ours.
    assert options("loha", r=4) == {"r": 4}
    assert options("freeze") == {"layers": 2} and options("freeze", norms=True) == {"norms": True}
    assert options("prompt", prompt_tuning_init_text="x").keys() == {"num_virtual_tokens", "prompt_tuning_init_text"}
    assert options("lora") == {}
    earlier = SftOptions(method="prompt", adapter_name_or_path="folder", method_options={"num_virtual_tokens": 7})
    assert fill_method_options(earlier).method_options == {"num_virtual_tokens": 7}


def test_rates_by_pattern_are_filled_in_and_overfit_has_its_own_rate(tiny):
    assert filled(method="vblora").learning_rate_patterns == {"vblora_logits": 1e-2}
    assert filled(method="vblora", learning_rate=1e-4).learning_rate_patterns == {}  # the rate of the user is for all
    assert filled(method="vblora", learning_rate_patterns={"logits": 1}).learning_rate_patterns == {"logits": 1.0}
    options = SftOptions(model_name_or_path=str(tiny), method="ia3", overfit=True).with_defaults(
        {"learning_rate": 1e-3}
    )
    options = fill_learning_rate(options)
    assert (options.learning_rate, describe_rate(options)) == (1e-3, "0.001, the default with overfit")


@pytest.mark.parametrize(
    ("values", "width", "start"),
    [
        ({"method": "full", "learning_rate": 2e-4}, 4096, "learning_rate: 0.0002 is far above the usual rate of method full"),
        ({"learning_rate": 2e-5}, 4096, "learning_rate: 2e-05 is far below the usual rate of method lora, 0.000286"),
        ({"learning_rate": 1e-4}, 4096, None),
        ({"method": "ia3", "learning_rate": 3e-3}, 4096, None),
        ({"learning_rate": 3e-3}, 64, None),  # the demo's recipe: a toy
        ({"method": "prompt"}, 2048, "method prompt: on a model of less than a billion parameters a prompt"),
        ({"method": "prompt"}, 8192, None),
        ({"method": "p_tuning_v2"}, 64, None),
    ],
)  # fmt: skip
def test_a_choice_that_disappoints_is_noted(values, width, start, tmp_path):
    options = filled(model_name_or_path=write_config(tmp_path, "llama", width), **values)
    config = tiny_model("llama").config
    config.hidden_size, config.vocab_size = width, 128_256
    notes = method_notes(options, config)
    assert [note[: len(start or "")] for note in notes] == ([start] if start else [])


def test_random_weights_have_a_rate_of_their_own(tiny):
    fresh, further = (
        PretrainOptions(config_name=str(tiny), method="full"),
        PretrainOptions(model_name_or_path=str(tiny), method="full"),
    )
    assert default_rate(fresh) == (3e-4, "random weights: LLaMA, 7B")
    assert default_rate(further)[0] == 2e-5
    # A usual rate of pretraining is not called too large.
    wide = LlamaConfig(hidden_size=2048)
    usual = PretrainOptions(config_name=str(tiny), method="full", learning_rate=6e-4)
    assert not method_notes(usual, wide)


def test_pretraining_with_a_part_of_the_weights_is_noted(tiny):
    config = tiny_model("llama").config
    further = PretrainOptions(model_name_or_path=str(tiny), method="lora")
    fresh = PretrainOptions(config_name=str(tiny), method="freeze")
    assert method_notes(further, config) == [
        "method lora: it learns little new knowledge, so it is not advised for pretraining; use method full."
    ]
    assert method_notes(fresh, config)[0].startswith("method freeze: what it does not train stays random")
    assert not method_notes(PretrainOptions(config_name=str(tiny), method="full"), config)
    # A random base is not exported, so an adapter on it would be lost.
    with pytest.raises(
        ConfigError, match="ia3 trains an adapter beside random weights, which nothing keeps, so it would"
    ):
        check_method(PretrainOptions(config_name=str(tiny), method="ia3"))


def test_a_run_shows_its_rate_and_where_it_comes_from(script, tiny, chats, tmp_path, capsys):
    where = (
        "--model_name_or_path",
        tiny,
        "--train_files",
        chats,
        "--output_dir",
        tmp_path / "out",
        "--max_length",
        128,
    )
    script("sft", *where, "--method", "ia3", "--max_steps", 1, "--warmup_steps", 0, "--logging_steps", 1)
    sentence = "0.003, the default of method ia3 (T-Few's code, arXiv 2205.05638)"
    assert f"learning rate  {sentence}" in capsys.readouterr().out
    record = run_json(tmp_path / "out")
    assert (record["learning_rate"], record["options"]["learning_rate"]) == (sentence, 3e-3)
    assert metrics(tmp_path / "out")[0]["learning_rate"] == 3e-3


def test_the_recipe_of_the_demo_keeps_its_rate():
    assert default_rate(SftOptions(method="ia3", model_name_or_path="x"))[0] == 3e-3
    assert filled(method="lora", learning_rate=3e-3, model_name_or_path="nowhere").learning_rate == 3e-3


@pytest.mark.parametrize(
    ("options_class", "values", "full", "adapter"),
    [
        (DpoOptions, {}, 5e-7, 5e-6),  # Zephyr, and its authors' recipe for QLoRA
        (DpoOptions, {"loss_type": ["simpo", "sft"]}, 5e-7, 5e-6),
        (DpoOptions, {"loss_type": ["orpo"]}, 5e-6, 5e-5),  # the authors' script for Mistral 7B
        (KtoOptions, {}, 5e-7, 5e-6),
        (RewardOptions, {}, 1e-5, 1e-4),  # Llama 2
    ],
)
def test_preferences_take_a_part_of_the_rate_of_fine_tuning(options_class, values, full, adapter, tmp_path):
    name = write_config(tmp_path, "mistral", 4096)
    rates = [
        default_rate(options_class(model_name_or_path=name, method=method, **values)) for method in ("full", "qlora")
    ]
    assert [rate for rate, _ in rates] == [full, adapter]
    assert all(re.match(r"1/\d+ of \S+ for fine-tuning: ", source) for _, source in rates)


def test_a_beta_carried_over_to_a_loss_of_means_is_noted(tmp_path):
    config = tiny_model("llama").config
    (note,) = method_notes(DpoOptions(loss_type=["simpo"], beta=0.1), config)
    assert note == "beta: 0.1 is far below the usual 2 of simpo, whose rewards are means over tokens."
    assert not method_notes(DpoOptions(loss_type=["simpo"]), config)
    assert not method_notes(DpoOptions(beta=0.01), config)
