"""Weights stay memory-mapped until their layer is loaded, cast and quantized; tests/proofs/matrix.py tests sharding."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file
from support import materialize
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from accel_llm.adapters.attach import attach_adapter
from accel_llm.backend.strategy import training_device
from accel_llm.config.options import TrainOptions
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.model import placement
from accel_llm.model.loading import load_complete_model, load_model
from accel_llm.model.placement import materialize_weights
from accel_llm.model.quantization import build_quantization_config, quantized_weights, round_to_4_bits
from accel_llm.system import memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def options(base: Path, **settings) -> TrainOptions:
    return TrainOptions(model_name_or_path=str(base), packing=False, **settings)


def mapped_kb(folder: Path) -> int:
    """Resident pages of the files in `folder`, KiB."""
    total, within = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            within = str(folder) in line
        elif within and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def in_a_map(parameter: torch.Tensor) -> bool:
    return any(low <= parameter.data_ptr() < high for low, high in memory._mapped_weight_files())


@pytest.fixture
def large(make_model, tmp_path) -> Path:
    return make_model(tmp_path / "large", torch.bfloat16, hidden_size=256, intermediate_size=1024, num_hidden_layers=6)


@linux
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_weights_are_read_only_when_placed_and_no_page_of_the_file_stays_in_memory(large, method, quiet):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors")) // 1024
    train_options = options(large, method=method)
    model = load_model(train_options)
    if method != "full":
        model = attach_adapter(model, train_options)
    frozen = [p for p in model.parameters() if method == "full" or not p.requires_grad]
    assert all(in_a_map(parameter) for parameter in frozen)
    materialize(model, train_options)
    assert mapped_kb(large) < size / 5 and size > 10_000
    assert not any(in_a_map(parameter) for parameter in model.parameters())


def test_placed_weights_do_not_depend_on_the_file(make_model, tmp_path):
    base = make_model(tmp_path / "base")
    before = load_file(base / "model.safetensors")
    train_options = options(base, method="full")
    model = materialize(load_model(train_options), train_options)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(load_file(base / "model.safetensors")["lm_head.weight"], before["lm_head.weight"])
    shutil.rmtree(base)
    for name, parameter in model.named_parameters():
        assert name == "lm_head.weight" or torch.equal(parameter, before[name])


def test_tied_weights_stay_one(make_model, tmp_path):
    train_options = options(make_model(tmp_path, tie_word_embeddings=True), method="full")
    model = materialize(load_model(train_options), train_options)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def eager(base: Path) -> torch.nn.Module:
    """transformers' own quantization while loading."""
    config = build_quantization_config(options(base, method="qlora"), torch.float32, sharded=False)
    return load_complete_model(str(base), dtype=torch.float32, quantization_config=config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_late_quantization_equals_that_of_transformers(family, make_model, tmp_path, quiet):
    if family == "llama":
        base = make_model(tmp_path, torch.bfloat16, attention_bias=True)
    else:  # its layers hold their weights transposed
        torch.manual_seed(0)
        base, tokenizer = tmp_path, build_demo_tokenizer()
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    train_options = options(base, method="qlora")
    ours, theirs = materialize(load_model(train_options), train_options), eager(base)
    assert ours.is_loaded_in_4bit and ours.config.quantization_config.load_in_4bit
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert type(parameter) is type(expected[name]) and torch.equal(parameter, expected[name]), name
    ids = torch.arange(12)[None]
    assert torch.equal(ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_4_bit_layers_keep_their_gradient_after_an_evaluation_on_every_cpu(tiny, tmp_path, quiet):
    """Every test fails if a layer is repacked: see `no_product_without_a_gradient` in conftest.py."""
    train_options = options(tiny, method="qlora", lora_dropout=0.0, init_lora_weights="gaussian")
    eager(tiny).save_pretrained(tmp_path / "stored")  # a model whose files are in 4 bits
    model = materialize(attach_adapter(load_model(train_options), train_options), train_options)
    stored = load_complete_model(str(tmp_path / "stored"), dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        model.eval()(input_ids=ids), stored.eval()(input_ids=ids)
    with pytest.raises(AssertionError, match="repacked"):  # a layer that keep_gradients did not change
        Linear4bit(64, 64).to("cpu").eval()(torch.zeros(1, 64))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    plain = load_complete_model(str(tiny), dtype=torch.float32)
    with torch.no_grad():
        for name in quantized_weights(plain):
            weight = plain.get_parameter(name)
            weight.copy_(round_to_4_bits(weight, False))
    reference = attach_adapter(plain, options(tiny, lora_dropout=0.0, init_lora_weights="gaussian"))
    ours = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference_weights = {name: parameter for name, parameter in reference.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in reference_weights.items():
            parameter.copy_(ours[name])
    reference.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in reference_weights.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_no_script_repacks_a_4_bit_layer(script, tiny, chats, tmp_path, capsys):
    """Training with evaluations between the steps, on weights in 16 bits and on stored 4 bits; merge and chat."""
    eager(tiny).save_pretrained(tmp_path / "stored")
    build_demo_tokenizer().save_pretrained(tmp_path / "stored")
    for number, base in enumerate((tiny, tmp_path / "stored")):
        adapter, rows = tmp_path / f"adapter-{number}", ("--train_files", chats, "--eval_share", 0.3)
        words = (
            "--method",
            "qlora",
            "--max_steps",
            3,
            "--eval_steps",
            1,
            "--eval_on_start",
            "true",
            "--eval_generate",
            2,
        )
        script("sft", "--model_name_or_path", base, *rows, *words, "--max_length", 128, "--output_dir", adapter)
        script("chat", "--model", adapter, "--prompt", "What is 3 + 4?", "--max_new_tokens", 4)
        merged = tmp_path / f"merged-{number}"
        script("merge", "--adapter", adapter, "--output_dir", merged, "--merge_base", "dequantized")
    script("chat", "--model", tmp_path / "stored", "--prompt", "What is 3 + 4?", "--max_new_tokens", 4)


@pytest.mark.parametrize("chosen", [{"use_dora": True}, {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_made_from_quantized_weights_finds_them(chosen, tiny, quiet):
    settings = options(tiny, method="qlora", **chosen)
    model = materialize(attach_adapter(load_model(settings), settings), settings)
    assert torch.isfinite(model(input_ids=torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "olora", "pissa"])
def test_a_fresh_adapter_leaves_the_weights_in_the_files(init, make_model, tmp_path, quiet):
    base = make_model(tmp_path, torch.bfloat16)
    settings = options(base, method="qlora", precision="bf16", init_lora_weights=init)
    model = attach_adapter(load_model(settings), settings)
    assert not any(p.bnb_quantized for p in model.parameters() if isinstance(p, Params4bit))
    if sys.platform == "linux":
        assert all(in_a_map(parameter) for parameter in model.parameters() if not parameter.requires_grad)


def test_dora_quantizes_the_layers_once_and_on_the_device(make_model, tmp_path, monkeypatch, quiet):
    """Nothing else is read: embedding, norms and head stay in the files."""
    devices: list[str] = []
    quantize = Params4bit._quantize

    def count(self: Params4bit, device: Any) -> Params4bit:
        devices.append(torch.device(device).type)
        return quantize(self, device)

    monkeypatch.setattr(Params4bit, "_quantize", count)
    base = make_model(tmp_path, torch.bfloat16)
    settings = options(base, method="qlora", precision="bf16", use_dora=True)
    model = attach_adapter(load_model(settings), settings)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert devices == [training_device().type] * len(layers) == [training_device().type] * 14
    frozen = [p for p in model.parameters() if not p.requires_grad and not isinstance(p, Params4bit)]
    assert frozen and (sys.platform != "linux" or all(map(in_a_map, frozen)))
    materialize(model, settings)
    assert len(devices) == 14


@pytest.mark.parametrize(
    ("chosen", "stored"),
    [({"use_dora": True}, False), ({"use_dora": True}, True), ({"init_lora_weights": "olora"}, True), ({}, True)],
)
def test_weights_that_were_quantized_before_move_to_the_device_with_their_scales(chosen, stored, tiny, tmp_path, quiet):
    base = tiny
    if stored:  # a model whose files are in 4 bits
        base = tmp_path / "stored"
        eager(tiny).save_pretrained(base)
        build_demo_tokenizer().save_pretrained(base)
    settings = options(base, method="qlora", **chosen)
    model = attach_adapter(load_model(settings), settings)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    materialize_weights(model, layers, torch.float32, torch.device("meta"))
    assert layers and all(layer.weight.bnb_quantized for layer in layers)
    for layer in layers:
        # FSDP2 replaces the parameter, and the layer then takes the state from itself.
        assert layer.quant_state is layer.weight.quant_state
        state, second = layer.quant_state, layer.quant_state.state2
        tensors = [layer.weight, state.absmax, state.code, state.offset, second.absmax, second.code]
        assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_modules_that_a_family_keeps_in_float32_stay_float32_in_bf16(tiny):
    train_options = options(tiny, precision="bf16")
    model = load_model(train_options).requires_grad_(False)
    model._keep_in_fp32_modules_strict = {"norm"}
    materialize(model, train_options)
    float32_names = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert float32_names == {"model.norm.weight"}


def test_units_cover_every_weight_once_and_parts_come_before_the_whole(tiny):
    model = load_model(options(tiny))
    units = placement._shard_units(model)
    assert [type(unit).__name__ for unit in units] == ["LlamaDecoderLayer"] * 2 + ["Embedding", "LlamaForCausalLM"]
    assert len({id(p) for unit in units for p in unit.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize(("method", "shared"), [("vblora", {"vblora_vector_bank.default"}), ("lora", set())])
def test_a_weight_that_layers_share_belongs_to_no_layer(method, shared, make_model, tmp_path, quiet):
    """FSDP2 would put a shard in its place in the first layer, and the others would miss it."""
    base = make_model(tmp_path, hidden_size=256, intermediate_size=256)
    settings = options(base, method=method)
    model = attach_adapter(load_model(settings), settings)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[weight].rsplit("_proj.")[-1] for weight in placement._shared_by_units(model)} == shared


@pytest.mark.parametrize("method", ["vera", "delora", "tinylora"])
def test_an_adapters_buffers_meet_its_weights_in_one_dtype(tiny, method, quiet):
    """DeepSpeed 0.19.8 casts weights to 16 bits and leaves buffers as they are; PEFT 0.21 makes these float32."""
    train_options = options(tiny, method=method)
    model = attach_adapter(load_model(train_options), train_options)
    buffers = {name for name, buffer in model.named_buffers() if ".default" in name and buffer.is_floating_point()}
    assert buffers
    materialize_weights(model, list(model.modules()), torch.bfloat16, torch.device("cpu"), masters=False)
    assert {model.get_buffer(name).dtype for name in buffers} == {torch.bfloat16}
    ids = torch.arange(12)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_no_weight_of_an_encoder_is_sharded_twice() -> None:
    """The embeddings of BERT are a layer for transformers, and hold the one of tokens."""
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2))
    *units, last = placement._shard_units(model)
    assert {type(unit).__name__ for unit in units} == {"BertEmbeddings", "BertLayer"} and last is model
    weights = [parameter for unit in units for parameter in unit.parameters()]
    assert len(weights) == len(set(weights))
