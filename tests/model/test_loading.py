"""Models and tokenizers: the texts of refusals, and the dtypes of loaded weights."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from support import materialize, reset
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GenerationConfig

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.batches import collate_packed
from accel_llm.errors import ConfigError
from accel_llm.model import placement
from accel_llm.model.attention import PACKED_ATTENTION, PADDED_ATTENTION
from accel_llm.model.generation import saveable_generation_config
from accel_llm.model.loading import build_model, load_model, load_model_config, stored_dtype
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.model_names import model_problems
from accel_llm.model.placement import place_weights
from accel_llm.model.quantization import build_quantization_config
from accel_llm.model.tokenizer import check_token_ids, configured_tokenizer, load_tokenizer, pad_token_id
from accel_llm.system import hub

pytestmark = pytest.mark.usefixtures("quiet")
DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch):
    """No test here depends on a network: names of the hub are taken as they are."""
    monkeypatch.setattr(hub, "ask_hub", lambda: "")


def options(model: Path | str | None = None, **more) -> TrainOptions:
    return TrainOptions(model_name_or_path=None if model is None else str(model), **more)


def copy(tiny: Path, folder: Path) -> Path:
    return shutil.copytree(tiny, folder / "copy")


# Names that are not a model, before any file is read


def test_folders_that_hold_no_model_are_reported(tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    advice = "a model folder or a hub id (owner/name) is allowed."
    assert model_problems(options(bare)) == [
        f"model_name_or_path: the folder {bare} has no config.json (it holds nothing); a model folder has one."
    ]
    (bare / "model.safetensors").touch()
    assert model_problems(options(bare)) == [
        f"model_name_or_path: the folder {bare} has no config.json (it holds model.safetensors); a model folder has one."
    ]
    missing = tmp_path / "missing"
    assert model_problems(options(missing)) == [f"model_name_or_path: {missing} does not exist; {advice}"]
    assert model_problems(options("./missing")) == [f"model_name_or_path: ./missing does not exist; {advice}"]
    assert model_problems(options("a/b/c")) == [f"model_name_or_path: a/b/c does not exist; {advice}"]
    weights = bare / "model.safetensors"
    assert model_problems(options(weights)) == [f"model_name_or_path: {weights} is a file; {advice}"]
    assert model_problems(options()) == ["model_name_or_path: is missing; name a model folder or a hub id."]
    assert model_problems(options("owner/name")) == model_problems(options(tiny)) == []


@pytest.mark.parametrize("config", ['{"base_model_name_or_path": "b"}', "{broken"])
def test_an_adapter_is_no_model(tiny, tmp_path, config):
    folder = copy(tiny, tmp_path)
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    assert model_problems(options(folder)) == [
        f"model_name_or_path: {folder} is an adapter, not a model; merge it first with `python launch/merge.py "
        f"--adapter {folder} --output_dir MODEL`, or name its base model."
    ]


def test_a_pretraining_config_is_checked_under_its_own_name(tmp_path):
    class Options(PretrainOptions):
        pass

    missing = tmp_path / "missing"
    assert model_problems(Options(config_name=str(missing))) == [
        f"config_name: {missing} does not exist; a model folder or a hub id (owner/name) is allowed."
    ]


def test_a_hub_id_without_a_network_is_a_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for read in (load_model_config, configured_tokenizer, load_model):
        with pytest.raises(ConfigError) as error:
            read(options("nobody/nothing"))
        sentence = str(error.value)
        assert sentence.startswith(
            ("model_name_or_path: nobody/nothing cannot be", "tokenizer_name: no tokenizer could")
        )
        assert "\n" not in sentence and len(sentence) < 400


def test_conflicting_options_are_reported_together_before_files_are_read(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert model_problems(options("missing/", load_in_8bit=True, attn_implementation="eager")) == [
        "load_in_8bit: fsdp2 cannot shard 8-bit weights, of which bitsandbytes keeps whole copies; use ddp.yaml, zero1.yaml or "
        "zero2.yaml, or load_in_4bit.",
        "attn_implementation: eager does not keep packed documents apart; give auto or flash_attention_2, or set "
        "packing: false.",
        "model_name_or_path: missing/ does not exist; a model folder or a hub id (owner/name) is allowed.",
    ]
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert model_problems(options("o/n", load_in_8bit=True, attn_implementation="eager", packing=False)) == []
    assert model_problems(options("o/n", method="qlora", attn_implementation="flash_attention_2")) == []


@pytest.mark.parametrize("settings", [{"method": "qlora"}, {"load_in_8bit": True}])
def test_biases_of_quantized_layers_are_not_trained(settings):
    """bitsandbytes 0.50.2 casts such a bias in place to the dtype of the products, where small steps are lost."""
    (sentence,) = model_problems(options("o/n", lora_bias="all", **settings))
    name = "method qlora" if "method" in settings else "load_in_8bit"
    assert sentence.startswith(f"lora_bias: all does not train with {name}, because bitsandbytes rounds the biases")
    assert model_problems(options("o/n", lora_bias="all")) == model_problems(options("o/n", **settings)) == []


# Configs and weights


@pytest.mark.parametrize(
    "config, reason",
    [
        ("{bad", "is not a valid JSON file"),
        ("{}", "Should have a `model_type` key in its config.json"),
        ('{"model_type": "nonsense"}', "has model type `nonsense` but Transformers does not recognize"),
        ('{"model_type": "llama", "hidden_size": "x"}', "Field 'hidden_size' expected int, got str"),
    ],
)
def test_a_broken_config_is_a_sentence(tiny, tmp_path, config, reason):
    folder = copy(tiny, tmp_path)
    (folder / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_model_config(options(folder))
    assert str(error.value).startswith(f"model_name_or_path: {folder} cannot be loaded (")
    assert reason in str(error.value) and str(error.value).endswith(").") and "\n" not in str(error.value)


def test_max_length_is_held_against_the_positions(tiny):
    assert load_model_config(options(tiny), 256).max_position_embeddings == 256
    with pytest.raises(ConfigError) as error:
        load_model_config(options(tiny), 257)
    assert str(error.value) == ("max_length: 257 is beyond the model's 256 positions; set max_length to 256 or less.")


@pytest.mark.parametrize("how", ["missing", "shape", "both", "truncated", "empty", "none"])
def test_weights_that_do_not_fill_the_model_are_refused(tiny, tmp_path, how):
    folder = copy(tiny, tmp_path)
    path, gone, bent = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    state = load_file(path)
    if how in ("missing", "both"):
        del state[gone]
    if how in ("shape", "both"):
        state[bent] = torch.zeros(3)
    save_file(state, path, metadata={"format": "pt"})
    if how == "none":
        path.unlink()
    elif how in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: 3000 if how == "truncated" else 0])
    expected = {
        "missing": f"does not fill the model: 1 weights are missing ({gone}).",
        "shape": f"does not fill the model: 1 weights have another shape, such as {bent} (3,), the model needs (32,).",
        "both": f"does not fill the model: 1 weights are missing ({gone}); 1 weights have another shape, such as {bent} (3,), the model needs (32,).",
        "none": "cannot be loaded (Error no file named model.safetensors",
    }.get(how, "cannot be loaded (Error while deserializing header")
    with pytest.raises(ConfigError) as error:
        load_model(options(folder))
    assert str(error.value).startswith(f"model_name_or_path: {folder} {expected}")


def test_every_weight_is_the_one_in_the_file(tiny):
    state, model = load_file(tiny / "model.safetensors"), load_model(options(tiny))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name, why", [("nonsense", "is not supported"), ("flash_attention_2", "FlashAttention2")])
def test_an_attention_that_is_not_there_is_a_sentence(tiny, name, why):
    with pytest.raises(ConfigError, match=why) as error:
        load_model(options(tiny, attn_implementation=name, packing=False))
    assert str(error.value).startswith(f"model_name_or_path: {tiny} cannot be loaded (")


def test_token_ids_beyond_the_vocabulary_are_refused(tiny):
    config, tokenizer = load_model_config(options(tiny)), configured_tokenizer(options(tiny))
    check_token_ids([np.array([0, 605], dtype=np.int32)], config, tokenizer)
    config.vocab_size = 300
    with pytest.raises(ConfigError) as error:
        check_token_ids([np.array([0], dtype=np.int32), np.array([5, 300, 299], dtype=np.int32)], config, tokenizer)
    token = tokenizer.convert_ids_to_tokens(300)
    assert str(error.value) == (
        f"tokenizer_name: the data holds token id 300 ({token!r}), but the model's vocabulary has 300 rows; "
        "use the model's own tokenizer."
    )


# Tokenizers


def test_truncation_and_padding_of_a_saved_tokenizer_are_stripped(tiny, tmp_path):
    folder = copy(tiny, tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=6, pad_id=0)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a long text").ids) == 6
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer("a long text")["input_ids"]) == len("a long text")
    tokenizer.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert settings["truncation"] is None and settings["padding"] is None


@pytest.mark.parametrize("name", ["smollm", "llama2", "mistral-7b", "phi-3-mini", "qwen3", "happy-llm_tokenizer_k"])
def test_real_tokenizers_are_whole_and_have_a_pad_token(name):
    folder = DATA / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None
    assert isinstance(pad_token_id(tokenizer), int)
    assert len(tokenizer("word " * 5000)["input_ids"]) >= 5000


def test_a_missing_pad_token_is_the_end_token(tiny, tmp_path):
    folder = copy(tiny, tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"pad_token": None}), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    path.write_text(json.dumps(settings | {"pad_token": None, "eos_token": None}), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eos_token, pad_token_id(tokenizer)) == (None, 0)


def test_a_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value) == (
        f"tokenizer_name: {tmp_path} is not a fast tokenizer (no tokenizer.json); exact masks need its offsets."
    )


def test_a_folder_without_a_tokenizer_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=f"^tokenizer_name: no tokenizer could be loaded from {tmp_path} "):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_its_own_comes_before_the_models(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    assert "<new>" in configured_tokenizer(options(tiny, tokenizer_name=str(tmp_path))).get_vocab()
    assert "<new>" not in configured_tokenizer(options(tiny)).get_vocab()


def test_a_recipe_can_use_the_home_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copy(tiny, tmp_path)
    home_options = options("~/copy")
    assert model_problems(home_options) == [] and load_model_config(home_options).vocab_size == 606
    assert configured_tokenizer(home_options) and load_model(home_options)


# Loaded weights and configs


@pytest.mark.parametrize(
    "stored, method, precision, expected",
    [
        (torch.bfloat16, "full", "bf16", torch.float32),  # masters
        (torch.bfloat16, "full", "auto", torch.float32),
        (torch.bfloat16, "lora", "bf16", torch.bfloat16),
        (torch.float32, "lora", "bf16", torch.bfloat16),
        (torch.float32, "lora", "fp16", torch.float16),
        (torch.bfloat16, "lora", "auto", torch.float32),  # on a CPU
    ],
)
def test_weights_are_masters_when_trained_and_in_the_compute_dtype_when_frozen(
    make_model, tmp_path, stored, method, precision, expected
):
    train_options = options(make_model(tmp_path, stored), method=method, precision=precision)
    model = load_model(train_options).requires_grad_(method == "full")
    assert {p.dtype for p in materialize(model, train_options).parameters()} == {expected}
    assert stored_dtype(load_model_config(train_options)) == stored


@pytest.mark.parametrize(
    "strategy, master_weights, expected",
    [
        ("single", "float32", torch.float32),
        ("zero2", "float32", torch.bfloat16),  # DeepSpeed keeps masters of its own
        ("single", "stochastic_rounding", torch.bfloat16),
    ],
)
def test_who_keeps_the_masters_of_full_training_in_bf16(tiny, monkeypatch, strategy, master_weights, expected):
    monkeypatch.setattr(placement, "strategy", lambda: strategy)
    train_options = options(tiny, method="full", precision="bf16", master_weights=master_weights)
    reset()
    model = load_model(train_options)
    place_weights(Accelerator(cpu=True, mixed_precision="bf16"), model, train_options)
    reset()
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_the_4_bit_base_is_nf4_doubly_quantized(tiny, make_model, tmp_path):
    train_options = options(tiny, method="qlora", precision="bf16")
    model = materialize(load_model(train_options), train_options)
    settings = model.config.quantization_config
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
    assert (settings.bnb_4bit_compute_dtype, settings.bnb_4bit_quant_storage) == (torch.bfloat16, torch.uint8)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Params4bit" and weight.numel() == 64 * 32 // 2
    assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
    # A sharded tensor must look like the floats that it is flattened with.
    sharded = build_quantization_config(options(method="qlora"), torch.bfloat16, sharded=True)
    assert sharded is not None and sharded.bnb_4bit_quant_storage == torch.bfloat16
    assert build_quantization_config(options(method="lora"), torch.bfloat16, sharded=True) is None


def test_the_8_bit_base_is_in_8_bits(tiny):
    model = load_model(options(tiny, load_in_8bit=True))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def gradients(tiny: Path, method: str, checkpointing: bool) -> dict[str, torch.Tensor]:
    train_options = options(tiny, method=method, gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    model = load_model(train_options)
    assert model.is_activation_checkpointing == checkpointing and model.training
    attach_loss(model, 64)
    model_to_train = model if method == "full" else attach_adapter(model, train_options)
    rows = [np.arange(5, 30), np.arange(40, 50)]
    batch = {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in collate_packed([(row, row) for row in rows]).items()
    }
    next_token_loss(model_to_train, batch).backward()
    return {name: p.grad for name, p in model_to_train.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activation_checkpointing_leaves_the_gradients_as_they_are(tiny, method):
    plain, checkpointed = gradients(tiny, method, False), gradients(tiny, method, True)
    assert plain.keys() == checkpointed.keys() and len(plain) == (21 if method == "full" else 28)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert any(float(gradient.norm()) > 0 for gradient in plain.values())


def test_packing_switches_attention_only_where_it_was_left_to_us(tiny):
    assert load_model(options(tiny)).config._attn_implementation == PACKED_ATTENTION
    assert load_model(options(tiny, packing=False)).config._attn_implementation == PADDED_ATTENTION
    eager = options(tiny, packing=False, attn_implementation="eager")
    assert load_model(eager).config._attn_implementation == "eager"


def test_fresh_weights_are_float32_and_seeded(tiny):
    config = load_model_config(options(tiny))
    models = [build_model(config, options(tiny, seed=seed)) for seed in (5, 5, 6)]
    assert all(parameter.is_meta for model in models for parameter in model.parameters())  # until they are placed
    for model in models:
        model.first_weights.draw(model.modules())
    first, second, third = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert first.dtype == torch.float32 and models[0].config._attn_implementation == PACKED_ATTENTION
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_weights_that_a_family_does_not_explain_are_drawn_whole(tiny, capsys):
    """The activation of Apertus has weights that its `_init_weights` leaves out."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = CONFIG_MAPPING["apertus"](**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(5)
    model = build_model(config, options(tiny))
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_config(config)
    assert "apertus does not say how each weight begins: each process draws all of them" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_generation_config_that_cannot_be_saved_is_mended(tmp_path):
    greedy = GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=2, repetition_penalty=1.1)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        greedy.save_pretrained(tmp_path)
    saveable_generation_config(greedy).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.temperature, config.top_p, config.eos_token_id, config.repetition_penalty) == (None, None, 2, 1.1)
    sampling = saveable_generation_config(GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9))
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.6, 0.9)
    assert saveable_generation_config(None).to_dict() == GenerationConfig().to_dict()
