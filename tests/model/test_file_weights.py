"""Models whose files do not fit their config: further weights, quantized weights, other formats; families and parts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import materialize, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.language_part import parts_beside_language
from accel_llm.model.loading import load_model, load_model_config
from accel_llm.model.model_names import model_problems

pytestmark = pytest.mark.usefixtures("quiet")
LAYER = "model.layers.0.self_attn.q_proj"
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def options(folder, **more) -> TrainOptions:
    return TrainOptions(model_name_or_path=str(folder), max_length=32, packing=False, **more)


def change(folder, weights=lambda tensors: tensors, **config) -> None:
    path = folder / "model.safetensors"
    changed = weights(dict(load_file(path)))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("bias", torch.ones(32)), ("lora_A.weight", torch.ones(8, 32)), ("weight_scale_inv", torch.ones(1))],
)
def test_a_further_weight_of_a_layer_is_refused(tmp_path, name, tensor):
    """transformers leaves it out and logs that; the model then computes something else than its files say."""
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors | {f"{LAYER}.{name}": tensor})
    with pytest.raises(ConfigError, match=rf"hold 1 weights \({LAYER}\.{name}\) of layers that the model computes"):
        load_model(options(tmp_path))


def test_weights_without_a_place_are_named_with_their_share(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors | {"v_head.summary.weight": torch.ones(1, 32)}, num_hidden_layers=1)
    load_model(options(tmp_path))
    said = capsys.readouterr().out
    assert "10 tensors of its files (model.layers.1." in said and "have no place in this model" in said
    assert "% of their bytes" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_numbers_without_their_meaning_are_refused(tmp_path, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors | {f"{LAYER}.weight": tensors[f"{LAYER}.weight"].to(dtype)})
    with pytest.raises(ConfigError, match=rf"{LAYER}.weight of .* is stored as \w+, but its config.json has no quant"):
        load_model(options(tmp_path))


def test_rounding_to_the_dtype_in_the_config_is_said(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    load_model(options(tmp_path))
    assert capsys.readouterr().out == ""
    change(tmp_path, dtype="bfloat16")
    load_model(options(tmp_path))
    assert "21 of 21 weights, such as " in (said := capsys.readouterr().out) and "rounded to bfloat16" in said


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("quantization", ["gptq", "awq", "compressed-tensors", "foo", "bitsandbytes"])
def test_formats_that_cannot_be_trained_are_one_sentence_before_loading(tmp_path, quantization, method):
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path, quantization_config={"quant_method": quantization, "load_in_8bit": True})
    with pytest.raises(ConfigError, match=r"the weights of .* are quantized \(.*\), and only bitsandbytes 4-bit, FP8"):
        load_model_config(options(tmp_path, method=method))


def test_a_4_bit_checkpoint_trains_an_adapter_in_this_runs_dtype(tmp_path):
    """The oracle: the same 4-bit weights, unpacked, in plain transformers."""
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    stored.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"method: full trains weights of the model itself, but those of .*4-bit\); give a method with an adapter",
    ):
        load_model_config(options(tmp_path, method="full"))

    plain = stored.dequantize(torch.float32).eval()
    ids = torch.arange(3, 30)[None]
    for method in ("lora", "qlora"):
        run = options(tmp_path, method=method)
        load_model_config(run)
        model = materialize(attach_adapter(load_model(run), run), run).eval()
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-3)


def test_fp8_weights_are_unpacked_and_trained_with_every_method(tmp_path):
    tiny_model("llama", **SIZES).save_pretrained(tmp_path)
    right = {}

    def to_fp8(tensors):
        stored = {}
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and "layers" in name:
                scale = tensor.abs().max() / 448
                tensor = (tensor / scale).to(torch.float8_e4m3fn)
                blocks = [-(-size // 32) for size in tensor.shape]
                stored[f"{name}_scale_inv"] = scale.float().expand(*blocks)
                right[name] = tensor.float() * scale
            stored[name] = tensor
        return stored

    change(tmp_path, to_fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    run = options(tmp_path, method="full")
    load_model_config(run)
    model = load_model(run)
    assert right and not hasattr(model.config, "quantization_config")
    for name, tensor in right.items():
        torch.testing.assert_close(model.get_parameter(name).data, tensor, rtol=0, atol=0)


def test_a_family_that_cannot_recompute_activations_is_refused(tmp_path):
    CONFIG_MAPPING["jetmoe"]().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="gradient_checkpointing: JetMoeForCausalLM of transformers does not recomp"):
        load_model_config(options(tmp_path, gradient_checkpointing=True))
    load_model_config(options(tmp_path))


def test_dora_on_sharded_4_bit_weights_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("accel_llm.model.option_problems.strategy", lambda: "zero3")
    problems = model_problems(options("o/n", method="qlora", use_dora=True))
    assert [text for text in problems if text.startswith("use_dora: PEFT reads whole 4-bit weights")]


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
VISION_LANGUAGE = {
    "gemma3": {"text_config": TEXT | {"num_key_value_heads": 2, "head_dim": 8}, "vision_config": VISION},
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
}


@pytest.mark.parametrize("family", VISION_LANGUAGE)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_text_trains_the_language_part_alone(tmp_path, capsys, family, method):
    """PEFT's all-linear would adapt the vision tower too, which gets no gradient from text."""
    config = CONFIG_MAPPING[family](**VISION_LANGUAGE[family])
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    run = options(tmp_path, method=method)
    load_model_config(run)
    model = load_model(run)
    assert "only its language part is trained; model.vision_tower, model.multi_modal_proj" in capsys.readouterr().out
    model = attach_adapter(model, run) if method == "lora" else model
    assert list(parts_beside_language(model)) == ["model.vision_tower", "model.multi_modal_projector"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and not [name for name in trained if "vision" in name or "projector" in name]

    # Everything that is trained gets a gradient.
    ids = torch.arange(3, 30)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
