"""The config of a fresh model: a folder, a hub id or a family, and fields that the options change."""

import json
from pathlib import Path

import pytest
from support import FAMILIES, character_tokenizer
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from accel_llm.config.command_line import parse_options
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.fresh_config import (
    change_config,
    family_config,
    family_fingerprint,
    fit_to_tokenizer,
    is_family,
)
from accel_llm.model.loading import load_model_config
from accel_llm.model.meta_device import build_on_meta
from accel_llm.model.model_names import model_problems


def options(**values) -> PretrainOptions:
    return PretrainOptions(method="full", tokenizer_name="t", **values)


def settings(config: PreTrainedConfig) -> dict:
    return {
        key: value for key, value in config.to_dict().items() if key not in ("transformers_version", "architectures")
    }


def test_a_family_is_what_transformers_builds_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings(load_model_config(options(config_name="llama"))) == settings(LlamaConfig())
    changed = load_model_config(
        options(config_name="qwen3", config_overrides={"hidden_size": 64, "num_hidden_layers": 3})
    )
    assert settings(changed) == settings(Qwen3Config(hidden_size=64, num_hidden_layers=3))
    assert all(map(is_family, FAMILIES))
    # A folder of this name comes first, but only if it is a model.
    Path("qwen3").mkdir()
    assert is_family("qwen3")
    LlamaConfig(hidden_size=64).save_pretrained("qwen3")
    assert not is_family("qwen3") and load_model_config(options(config_name="qwen3")).model_type == "llama"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_other_sizes_as_its_own_class_does(family):
    config = family_config(family)
    changed = change_config(config, {}, {"vocab_size": 97, "max_position_embeddings": 64})
    assert settings(changed) == settings(type(config)(vocab_size=97, max_position_embeddings=64))
    deeper = change_config(config, {}, {"num_hidden_layers": 3})
    assert settings(deeper) == settings(type(config)(num_hidden_layers=3))


def test_a_file_keeps_what_it_says_and_derived_fields_are_computed_anew(tmp_path):
    Qwen2Config(hidden_size=96, num_hidden_layers=4, rope_theta=5e5, num_attention_heads=6).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["layer_types"]) == 4
    overrides = {"num_hidden_layers": 2, "rope_theta": "1e6", "rms_norm_eps": 1, "num_key_value_heads": 3}
    changed = load_model_config(options(config_name=str(tmp_path), config_overrides=overrides))
    expected = Qwen2Config(
        hidden_size=96,
        num_hidden_layers=2,
        rope_theta=1e6,
        num_attention_heads=6,
        rms_norm_eps=1.0,
        num_key_value_heads=3,
    )
    assert settings(changed) == settings(expected) and len(changed.layer_types) == 2
    # The old name of a setting in an old file.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "rope_theta": 1e6}))
    changed = load_model_config(options(config_name=str(tmp_path), config_overrides={"rope_theta": 5}))
    assert changed.rope_parameters["rope_theta"] == 5.0


def test_parts_and_other_names_of_fields():
    gemma = change_config(family_config("gemma3"), {}, {"hidden_size": 64, "text_config.num_hidden_layers": 7})
    assert gemma.text_config.hidden_size == 64 and len(gemma.text_config.layer_types) == 7
    gpt2 = change_config(family_config("gpt2"), {"n_embd": 48, "n_head": 4}, {"hidden_size": 64, "n_layer": 3})
    assert (gpt2.n_embd, gpt2.num_hidden_layers) == (64, 3)
    # The class of this family does not declare the field, but its model reads it.
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixture = change_config(family_config("qwen3_moe"), {}, sizes | {"num_hidden_layers": 1})
    layer = build_on_meta(mixture).model.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (4 * 32, 64)


@pytest.mark.parametrize(
    ("family", "overrides", "problem"),
    [
        ("llama", {"hidden_sise": 512}, "llama has no field 'hidden_sise'; did you mean hidden_size?"),
        ("llama", {"colour": 1}, "llama has no field 'colour'; see the config.json of such a model."),
        ("llama", {"hidden_size": "big"}, "hidden_size 'big' is not allowed; give a whole number."),
        ("llama", {"hidden_size": 51.2}, "hidden_size 51.2 is not allowed; give a whole number."),
        ("llama", {"hidden_size": True}, "hidden_size true is not allowed; give a whole number."),
        ("llama", {"attention_bias": 1}, "attention_bias 1 is not allowed; give true or false."),
        ("llama", {"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny' is not allowed; give a number."),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0 is not allowed; give a number of at least 1."),
        (
            "qwen3",
            {"num_attention_heads": 4},
            "num_attention_heads 4 is no multiple of num_key_value_heads 32; change one of them.",
        ),
        (
            "llama",
            {"rope_parameters.teta": 1},
            "rope_parameters has no field 'teta'; see the config.json of such a model.",
        ),
        ("gemma3", {"hiden_size": 64}, "text_config has no field 'hiden_size'; did you mean hidden_size?"),
        (
            "gemma3_text",
            {"rope_theta": 1},
            "gemma3_text has no field 'rope_theta'; did you mean rope_parameters.sliding_attention.rope_theta?",
        ),
        ("llama", {"dtype": "bfloat16"}, "dtype is set by an option of its own; write --precision."),
        ("llama", {"model_type": "qwen3"}, "llama has no field 'model_type'; see the config.json of such a model."),
    ],
)
def test_a_field_that_cannot_be_changed_is_named(family, overrides, problem):
    with pytest.raises(ConfigError) as error:
        change_config(family_config(family), {}, overrides)
    assert error.value.problems == [f"config_overrides: {problem}"]


def test_values_that_do_not_fit_together():
    with pytest.raises(
        ConfigError, match=r"^config_overrides: hidden_size=100 cannot be used together \(The hidden size"
    ):
        change_config(family_config("llama"), {}, {"hidden_size": 100})
    # A list with a value for each layer, which the family would not make of the other fields.
    kinds = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    kinds |= {"use_sliding_window": True}
    with pytest.raises(ConfigError) as error:
        change_config(Qwen2Config(**kinds), kinds, {"num_hidden_layers": 4})
    assert error.value.problems == [
        "config_overrides: layer_types of the config has a value for each of 2 layers; give layer_types for 4 layers too."
    ]


def test_names_that_are_no_family_and_a_family_without_a_tokenizer(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert model_problems(options(config_name="lama").model_copy(update={"tokenizer_name": None})) == [
        "config_name: lama is neither a folder nor a family of models; did you mean llama?"
    ]
    (problem,) = model_problems(PretrainOptions(config_name="llama", method="full"))
    assert problem == "tokenizer_name: is missing, and the family llama has no tokenizer; name one."
    (problem,) = PretrainOptions(model_name_or_path="m", config_overrides={"hidden_size": 8}).problems()
    assert problem.startswith("config_overrides: the weights of a model fix its shape; give config_name")


@pytest.mark.parametrize(
    "words",
    [
        ["hidden_size=512", "num_hidden_layers=8", "hidden_act=gelu"],
        ["hidden_size=512,num_hidden_layers=8,hidden_act=gelu"],  # as run_clm.py of transformers takes them
        ["{hidden_size: 512, num_hidden_layers: 8, hidden_act: gelu}"],
    ],
)
def test_how_fields_are_written(words):
    read = parse_options(PretrainOptions, ["--config_name", "llama", "--config_overrides", *words])
    assert read.config_overrides == {"hidden_size": 512, "num_hidden_layers": 8, "hidden_act": "gelu"}


def test_a_fresh_model_gets_the_tokens_of_its_tokenizer(capsys):
    tokenizer = character_tokenizer()
    config = family_config("llama")
    remedy = fit_to_tokenizer(options(config_name="llama"), config, tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert capsys.readouterr().out.startswith("config_name: taken from the tokenizer: ")
    assert remedy == f"set config_overrides: vocab_size={len(tokenizer)}, or use another tokenizer"

    # A given size stays, a file has a size of its own, and the model of weights is not touched.
    config = family_config("llama")
    fit_to_tokenizer(options(config_name="llama", config_overrides={"vocab_size": 32000}), config, tokenizer)
    assert config.vocab_size == 32000 and config.eos_token_id == tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=300, eos_token_id=299)
    fit_to_tokenizer(options(config_name="somewhere/else"), config, tokenizer)
    assert (config.vocab_size, config.eos_token_id) == (300, tokenizer.eos_token_id)
    config = LlamaConfig(vocab_size=300, eos_token_id=299)
    fit_to_tokenizer(PretrainOptions(model_name_or_path="m"), config, tokenizer)
    assert config.eos_token_id == 299


def test_the_fingerprint_of_a_family_is_that_of_its_defaults():
    assert family_fingerprint("llama") == family_fingerprint("llama") != family_fingerprint("qwen3")
    assert AutoConfig.for_model("llama").vocab_size == 32000
