"""Every LoRA option reaches PEFT's config and the model, and a saved adapter loads with the same weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support import materialize, random_rows, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.saved import read_adapter_config, save_adapter
from accel_llm.backend.strategy import PRECISION_DTYPES
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_padded
from accel_llm.errors import ConfigError
from accel_llm.model.loading import configure_for_training, load_model
from accel_llm.model.loss import next_token_loss

pytestmark = pytest.mark.usefixtures("quiet")
IDS = torch.randint(600, (2, 20), generator=torch.Generator().manual_seed(3))
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load_with_adapter(base: Path, **options) -> PeftModel:
    settings = TrainOptions(model_name_or_path=str(base), packing=False, **options)
    torch.manual_seed(0)
    return materialize(attach_adapter(load_model(settings), settings), settings)


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted_modules(model: torch.nn.Module) -> list[str]:
    """Names, in the base model, of the modules that have a LoRA."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_rank_alpha_and_dropout(tiny):
    model = load_with_adapter(tiny, lora_r=4, lora_alpha=6, lora_dropout=0.25)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert (layer.r, layer.scaling) == ({"default": 4}, {"default": 1.5})
    assert layer.lora_dropout["default"].p == 0.25
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((4, 32), (64, 4))
    rescaled = load_with_adapter(tiny, lora_r=4, lora_alpha=6, use_rslora=True)
    assert rescaled.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling == {"default": 3.0}


def test_targets_all_linear_a_list_and_a_pattern(tiny):
    everywhere = adapted_modules(load_with_adapter(tiny))
    assert {name.rsplit(".", 1)[1] for name in everywhere} == LINEAR and len(everywhere) == 14
    two = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert adapted_modules(load_with_adapter(tiny, lora_target_modules="q_proj")) == two
    names = ["layers.1.self_attn.q_proj", "1.mlp.up_proj"]
    assert adapted_modules(load_with_adapter(tiny, lora_target_modules=names)) == [two[1], "model.layers.1.mlp.up_proj"]
    pattern = r".*\.1\..*(q|up)_proj"
    assert adapted_modules(load_with_adapter(tiny, lora_target_modules=pattern)) == [
        two[1],
        "model.layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize("bias, count", [("none", 0), ("all", 6), ("lora_only", 2)])
def test_biases_are_trained_as_asked(make_model, tmp_path, bias, count):
    base = make_model(tmp_path, attention_bias=True)
    model = load_with_adapter(base, lora_bias=bias, lora_target_modules=["q_proj"])
    names = [name for name in trainable_state(model) if name.endswith("bias")]
    # q, k, v and o in two layers
    assert len(names) == {0: 0, 6: 8, 2: 2}[count]


def test_dora_learns_magnitudes(tiny):
    model = load_with_adapter(tiny, use_dora=True, lora_target_modules=["q_proj"])
    vectors = [p for name, p in trainable_state(model).items() if "lora_magnitude_vector" in name]
    assert [v.shape for v in vectors] == [(32,)] * 2
    base = load_file(tiny / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(vectors[0], base.norm(dim=1))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "olora", "pissa"])
def test_initialisations(tiny, init):
    model = load_with_adapter(tiny, init_lora_weights=init, lora_r=4)
    assert model.peft_config["default"].init_lora_weights == init
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert bool((a != 0).any()) and bool((b != 0).any()) == (init not in (True, "gaussian"))
    change = (logits(model) - logits(AutoModelForCausalLM.from_pretrained(tiny))).abs().max()
    # Only False, with both factors random, begins elsewhere than the base.
    assert (change > 1e-2) if init is False else (change < 1e-5)
    if init == "gaussian":
        assert abs(float(a.detach().std()) * 4 - 1) < 0.2  # deviation 1 / r


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_that_is_trained_is_float32(make_model, tmp_path, dtype):
    base = make_model(tmp_path, attention_bias=True)
    more = {"lora_bias": "all", "modules_to_save": ["lm_head"], "use_dora": True}
    model = load_with_adapter(base, precision=dtype, **more)
    kinds = {name.rsplit(".", 1)[1] if "lora" not in name else "lora" for name in trainable_state(model)}
    assert kinds == {"lora", "bias", "weight"}
    assert {tensor.dtype for tensor in trainable_state(model).values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {PRECISION_DTYPES[dtype]}
    head = model.get_submodule("base_model.model.lm_head.modules_to_save.default")
    assert torch.equal(
        head.weight.to(PRECISION_DTYPES[dtype]), model.get_submodule("base_model.model.lm_head.original_module").weight
    )


def test_a_float32_head_on_a_bf16_base_trains_under_autocast(make_model, tmp_path):
    model = load_with_adapter(make_model(tmp_path), precision="bf16", modules_to_save=["embed_tokens", "lm_head"])
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(gradients) == 2
    assert all(g is not None and g.dtype == torch.float32 and float(g.norm()) > 0 for g in gradients.values())


def test_names_missing_in_the_model_are_reported_together(tiny):
    layers = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError) as error:
        load_with_adapter(tiny, lora_target_modules=["q_proj", "query"], modules_to_save=["lm_head", "head"])
    assert error.value.problems == [
        f"lora_target_modules: the model has no 'query'; its linear layers are {layers}.",
        f"modules_to_save: the model has no 'head'; its linear layers are {layers}.",
    ]
    with pytest.raises(ConfigError) as error:
        load_with_adapter(tiny, lora_target_modules=r".*\.query")
    assert str(error.value) == (
        r"lora_target_modules: '.*\\.query' does not fit the model (Target modules .*\.query not found in the base "
        f"model. Please check the target modules and try again.); its linear layers are {layers}."
    )
    with pytest.raises(ConfigError, match=r"Target module LlamaRMSNorm\(.*is not supported"):
        load_with_adapter(tiny, lora_target_modules=["input_layernorm"])


def test_the_linear_layers_of_gpt2_are_named_too(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"its linear layers are c_attn, c_fc, c_proj, lm_head\.$"):
        load_with_adapter(tmp_path, lora_target_modules=["q_proj"])
    assert len(adapted_modules(load_with_adapter(tmp_path))) == 4


OPTIONS = [
    {},
    {"use_dora": True},
    {"init_lora_weights": "pissa", "lora_r": 4},
    {"init_lora_weights": "olora", "lora_r": 4},
    {"modules_to_save": ["lm_head", "norm"], "lora_bias": "all", "lora_target_modules": ["q_proj"]},
    {"use_rslora": True, "lora_target_modules": r".*\.0\..*_proj"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_was_saved_is_what_comes_back(make_model, tmp_path, options, dtype):
    base = make_model(tmp_path / "base", PRECISION_DTYPES[dtype], attention_bias=True)
    model = load_with_adapter(base, precision=dtype, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    state = trainable_state(model)
    save_adapter(model, tmp_path / "adapter", state, str(base))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir() if p.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == len(state) and {tensor.dtype for tensor in weights.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    # A whole module is float32 while it trains, and takes the base's dtype where the adapter is used. And in 16 bits
    # PEFT rounds the sum of base and adapter once more than adapters/lora_forward.py.
    bound = 1e-6 if dtype == "fp32" else 2e-2
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        expected = logits(model)
        assert float((logits(loaded) - expected).norm() / expected.norm()) <= bound
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert float((logits(plain) - expected).norm() / expected.norm()) > 0.1


def test_the_base_is_recorded_where_it_can_be_found_again(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    model = load_with_adapter(Path(tiny.name))
    for name, recorded in ((tiny.name, str(tiny)), ("owner/model", "owner/model")):
        save_adapter(model, tmp_path / "adapter", trainable_state(model), name)
        assert read_adapter_config(tmp_path / "adapter")["base_model_name_or_path"] == recorded


def test_the_saved_config_says_what_was_asked(tiny, tmp_path):
    model = load_with_adapter(
        tiny, lora_r=6, lora_alpha=10.5, lora_dropout=0.1, use_rslora=True, use_dora=True, modules_to_save=["norm"]
    )
    save_adapter(model, tmp_path, trainable_state(model), str(tiny))
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    expected = {"r": 6, "lora_alpha": 10.5, "lora_dropout": 0.1, "use_rslora": True, "use_dora": True, "bias": "none"}
    expected |= {"modules_to_save": ["norm"], "task_type": "CAUSAL_LM", "peft_type": "LORA"}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    "words", [("--lora_r", 4, "--lora_alpha", 16, "--use_rslora"), ("--add_tokens", "--chat_template", "chatml"), ()]
)
def test_training_goes_on_from_an_adapter_with_a_fresh_optimizer(script, tiny, chats, tmp_path, capsys, words):
    common = ("--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--learning_rate", 1e-2)
    script("sft", *common, "--max_steps", 3, "--output_dir", tmp_path / "first", "--modules_to_save", "lm_head", *words)
    first = tmp_path / "first" / "adapter"
    extra = [word for word in words if word in ("--add_tokens", "--chat_template", "chatml")]
    capsys.readouterr()
    # A rate at which nothing moves shows what the run began with.
    still = ("--max_steps", 1, "--learning_rate", 1e-30, "--adapter_name_or_path", first, *extra)
    script("sft", *common, *still, "--output_dir", tmp_path / "second")
    assert f"the run begins with the adapter {first}" in capsys.readouterr().out
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "second" / "adapter")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((p / "adapter_config.json").read_text()) for p in (first, tmp_path / "second" / "adapter")]
    assert all(settings[0][key] == settings[1][key] for key in ("r", "lora_alpha", "use_rslora", "modules_to_save"))
    options = json.loads((tmp_path / "second" / "run.json").read_text())["options"]
    assert options["lora_r"] == settings[0]["r"] and options["modules_to_save"] == ["lm_head"]


def test_an_adapter_that_cannot_go_on_is_refused(script, tiny, chats, tmp_path, make_model):
    common = ("--train_files", chats, "--max_length", 128, "--max_steps", 1)
    script("sft", "--model_name_or_path", tiny, *common, "--lora_r", 4, "--output_dir", tmp_path / "first")
    first = tmp_path / "first" / "adapter"
    words = ("--model_name_or_path", tiny, *common, "--output_dir", tmp_path / "never", "--adapter_name_or_path")
    for more, message in (
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((tiny,), "is a full model, not an adapter"),
        ((first, "--lora_r", 8), f"lora_r: 8 is given, but the adapter {first} has 4; leave it out."),
        ((first, "--method", "full"), "adapter_name_or_path"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            script("sft", *words, *more)
    wider = make_model(tmp_path / "wider", hidden_size=64)
    with pytest.raises(ConfigError, match=r"was trained on another base model \(fingerprint \w{16}\) than .*wider"):
        script("sft", *words, first, "--model_name_or_path", wider)
    path, unknown = first / "adapter_model.safetensors", tmp_path / "first" / "unknown"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    shutil.copytree(first, unknown)
    save_file(weights, unknown / path.name)
    for base in (wider, make_model(tmp_path / "shallower", num_hidden_layers=1)):
        with pytest.raises(ConfigError, match=r"does not fit|the model has no"):
            script("sft", *words, unknown, "--model_name_or_path", base)
    save_file({name: tensor for name, tensor in list(weights.items())[1:]}, path)
    with pytest.raises(ConfigError, match=r"does not fit the model: 1 of its weights are missing \(base_model"):
        script("sft", *words, first)
    (first / "adapter_model.safetensors").rename(first / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"has no adapter_model.safetensors; only safetensors are read"):
        script("sft", *words, first)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
def test_a_router_that_returns_more_than_a_product_gets_no_adapter(family: str) -> None:
    """PEFT takes it for a linear layer, and the first forward would end in a traceback."""
    options = TrainOptions(model_name_or_path="x", packing=False, max_length=32)
    model = attach_adapter(configure_for_training(tiny_model(family), options), options)
    assert not any("router" in name for name, p in model.named_parameters() if p.requires_grad)
    next_token_loss(model.train(), collate_padded(random_rows(3, 9), 0)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
