"""chat.py asks a model as it was trained: in 4 bits its logits are those of plain PEFT on transformers' own 4-bit base."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT, materialize, moved_adapter, relative_distance, run_json, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.saved import save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.config.tool_options import ChatOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.load import describe_placement, load_to_ask, load_with_adapter
from accel_llm.model.loading import load_model
from accel_llm.model.quantization import keep_gradients
from accel_llm.model.vocabulary import extend_vocabulary

pytestmark = pytest.mark.usefixtures("quiet")

NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
IDS = torch.arange(3, 19).reshape(1, -1)
# Plain layers, Conv1D, tied matrices, experts that transformers and PEFT know, and experts that PEFT does not know.
FAMILIES = ["llama", "gpt2", "gemma", "qwen3_moe", "gpt_oss"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def base_folder(folder: Path, family: str, **options: Any) -> Path:
    tiny_model(family, **options).save_pretrained(folder)
    return folder


def plain_4_bits(base: Path, loader: Any = AutoModelForCausalLM, **sizes: Any) -> Any:
    """Load a base with plain transformers in NF4. It leaves the experts of a mixture, which are rounded here."""
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    model = loader.from_pretrained(base, quantization_config=settings, dtype=torch.float32, **sizes)
    keep_gradients(model)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            packed, state = quantize_4bit(parameter.data, blocksize=64, compress_statistics=True, quant_type="nf4")
            parameter.data = dequantize_4bit(packed, state)
    return model.eval()


def ask(name: Path, **options: Any) -> Any:
    return load_to_ask(str(name), "model", ChatOptions(model=str(name), **options))[0]


def ask_adapter(adapter: Path, base: Path, **options: Any) -> Any:
    return load_with_adapter(adapter, str(base), ChatOptions(model=str(adapter), **options))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_asked_in_4_bits_if_the_options_say_so(family, tmp_path):
    base = base_folder(tmp_path, family)
    expected = logits(plain_4_bits(base))
    model, as_stored = ask(base, load_in_4bit=True), ask(base)
    assert relative_distance(logits(model), expected) < 1e-6
    assert relative_distance(logits(as_stored), expected) > 0.01
    assert describe_placement(model) == "On cpu, 4-bit weights (NF4), computing in float32."
    assert describe_placement(as_stored) == "On cpu, weights in float32."


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_model_with_images_too_is_asked_in_4_bits(family, tmp_path):
    configs = {
        "gemma3": {"text_config": TEXT | {"num_key_value_heads": 2, "head_dim": 8}, "vision_config": VISION},
        "llava": {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
    }
    config = CONFIG_MAPPING[family](**configs[family])
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    moved_adapter(tmp_path / "base", tmp_path / "adapter", method="qlora")
    plain = plain_4_bits(tmp_path / "base", AutoModelForImageTextToText)
    model = ask_adapter(tmp_path / "adapter", tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval())
    assert relative_distance(logits(model), expected) < 1e-6
    assert relative_distance(logits(ask(tmp_path / "base")), expected) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_asked_on_a_base_in_4_bits_if_it_was_trained_on_one(family, use_dora, tmp_path):
    base, adapter = base_folder(tmp_path / "base", family), tmp_path / "adapter"
    options = {
        "use_dora": use_dora,
        "lora_target_modules": ["q_proj"] if family == "qwen3_moe" and use_dora else "all-linear",
    }
    trained = moved_adapter(base, adapter, method="qlora", **options).eval()
    model = ask_adapter(adapter, base)
    expected = logits(PeftModel.from_pretrained(plain_4_bits(base), str(adapter)).eval())
    assert relative_distance(logits(model), expected) < 1e-6
    assert relative_distance(logits(model), logits(trained)) < 1e-6
    assert relative_distance(logits(ask_adapter(adapter, base, load_in_4bit=False)), expected) > 0.01
    moved_adapter(
        base, tmp_path / "other", method="lora", lora_target_modules=["q_proj"] if family != "gpt2" else ["c_attn"]
    )
    assert describe_placement(ask_adapter(tmp_path / "other", base)) == "On cpu, weights in float32."


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [False, True], ids=["rows", "modules_to_save"])
def test_added_tokens_and_whole_matrices_are_those_of_the_training(tied, saved, tmp_path):
    base, new = base_folder(tmp_path / "base", "llama", tie_word_embeddings=tied), range(97, 99)
    saves = {"modules_to_save": ["embed_tokens", "lm_head"]} if saved else {}
    options = TrainOptions(model_name_or_path=str(base), packing=False, method="qlora", **saves)
    model = load_model(options)
    extend_vocabulary(model, new)
    trained = materialize(attach_adapter(model, options, new), options).eval()
    state = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in state.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(trained, tmp_path / "adapter", {name: p.detach().clone() for name, p in state.items()}, str(base))

    ids = torch.tensor([[5, 97, 8, 98, 97, 3]])
    model = ask_adapter(tmp_path / "adapter", base)
    with Operations() as operations:
        actual = logits(model, ids)
    assert relative_distance(actual, logits(trained, ids)) < 1e-6
    # PEFT would copy the whole embedding and the head for each token.
    assert "aten.index_copy.default" not in operations.names


class Operations(TorchDispatchMode):
    """Collects the names of all operations within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_base_in_4_bit_files_stays_in_4_bits(tmp_path):
    base, stored = base_folder(tmp_path / "base", "llama"), tmp_path / "stored"
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)  # of the machine that wrote them
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32).save_pretrained(
        stored
    )
    expected = logits(plain_4_bits(base))
    for options in ({}, {"load_in_4bit": True}):
        model = ask(stored, **options)
        assert relative_distance(logits(model), expected) < 1e-6
        assert describe_placement(model) == "On cpu, 4-bit weights (NF4), computing in float32."
    with pytest.raises(ConfigError) as error:
        ask(stored, load_in_4bit=False)
    assert str(error.value) == (
        f"load_in_4bit: false, but the files of {stored} hold its weights in 4 bits; leave it out, or name the same model "
        "in 16 bits."
    )
    trained = moved_adapter(stored, tmp_path / "adapter").eval()
    assert relative_distance(logits(ask_adapter(tmp_path / "adapter", stored)), logits(trained)) < 1e-6


def test_an_fp8_base_is_unpacked_and_held_in_4_bits(tmp_path):
    """As method qlora trains on it. The oracle is the same base, unpacked in its files."""
    base, unpacked = base_folder(tmp_path / "base", "llama"), tmp_path / "unpacked"
    shutil.copytree(base, unpacked)
    tensors, plain = load_file(base / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and "layers" in name:
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.float().expand(*(-(-size // 32) for size in tensor.shape)).contiguous()
            plain[name] = tensors[name].float() * scale
    save_file(load_file(unpacked / "model.safetensors") | plain, unpacked / "model.safetensors", {"format": "pt"})
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert relative_distance(logits(ask(base, load_in_4bit=True)), logits(plain_4_bits(unpacked))) < 1e-6


def test_where_4_bits_cannot_be_had_a_sentence_says_so(tmp_path):
    def sentence(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            ask(base, load_in_4bit=True) if not options else ask_adapter(tmp_path / "adapter", base, **options)
        return str(error.value)

    base = base_folder(tmp_path / "flat", "llama", num_hidden_layers=0)
    assert sentence() == f"load_in_4bit: {base} has no layer that can be held in 4 bits; set it to false."
    base = base_folder(tmp_path / "base", "llama")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoKrConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    assert (said := sentence(load_in_4bit=True)).startswith(
        f"load_in_4bit: PEFT cannot compute the adapter {tmp_path / 'adapter'} on weights in 4 bits ("
    ) and said.endswith("); set load_in_4bit to false, with a base in 16 bits.")
    for init in ("pissa", "olora"):
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=init)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
        assert sentence(load_in_4bit=True) == (
            f"load_in_4bit: PEFT computes init_lora_weights {init} of {tmp_path / 'adapter'} only from a base in 16 bits; "
            "set it to false."
        )
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert sentence() == (
        f"load_in_4bit: the weights of {base} are quantized already (GPTQ); set it to false, or name the same model in 16 "
        "bits."
    )


def test_the_file_of_an_adapter_says_how_it_was_trained_or_else_the_record_of_its_run(tmp_path):
    base, run = base_folder(tmp_path / "base", "llama"), tmp_path / "run"
    moved_adapter(base, run / "adapter", method="qlora")
    path = run / "adapter" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["base_bits"] == "4"
    in_4_bits = "On cpu, 4-bit weights (NF4), computing in float32."
    assert describe_placement(ask_adapter(run / "adapter", base)) == in_4_bits
    # An adapter of an earlier release, or of another program, has no such entry.
    save_file(load_file(path), path, {"format": "pt"})
    for text, expected in {
        "": False,
        "[]": False,
        "{": False,
        '{"options": {"method": "lora"}}': False,
        '{"options": {"method": "qlora"}}': True,
    }.items():
        (run / "run.json").write_text(text, encoding="utf-8")
        assert (describe_placement(ask_adapter(run / "adapter", base)) == in_4_bits) == expected


@pytest.mark.long
def test_chat_answers_as_the_run_did_in_its_last_evaluation(script, make_model, tmp_path, capsys):
    base, rows = make_model(tmp_path / "base"), tmp_path / "rows.jsonl"
    # Weights so large that each answer differs, and that rounding to 4 bits changes it.
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            parameter.normal_(std=0.3)
    model.save_pretrained(base)
    questions = ["What is 3 + 4?", "Where is Delhi?"]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in questions]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    words = ("--model_name_or_path", base, "--train_files", rows, "--eval_files", rows, "--eval_generate", 2)
    script("sft", *words, "--method", "qlora", "--max_steps", 2, "--max_length", 64, "--output_dir", tmp_path / "out")
    right = [sample["generated"] for sample in run_json(tmp_path / "out")["samples"]]

    def answers(*more: object) -> list[str]:
        texts = []
        for question in questions:
            capsys.readouterr()
            script("chat", "--model", tmp_path / "out", "--prompt", question, "--max_new_tokens", 6, *more)
            printed = capsys.readouterr()
            texts.append(printed.out.strip())
            assert f" On cpu, {'weights' if more else '4-bit weights (NF4), computing'} in float32. " in printed.err
        return texts

    in_4_bits, as_stored = answers(), answers("--load_in_4bit", "false")
    assert all(len(text) > 5 and whole.strip().startswith(text) for whole, text in zip(right, in_4_bits, strict=True))
    assert not any(whole.strip().startswith(text) for whole, text in zip(right, as_stored, strict=True))


PEAK = """
import re, sys
from pathlib import Path
import accel_llm.system.chatter
from accel_llm.config.tool_options import ChatOptions
from accel_llm.merge.load import load_to_ask

def kilobytes(name):
    return int(re.search(name + r":\\s+([0-9]+)", Path("/proc/self/status").read_text())[1])

def load(folder):
    return load_to_ask(folder, "model", ChatOptions(model="-", load_in_4bit=True, precision="bf16"))[0]

load(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kilobytes("VmRSS")
model = load(sys.argv[2])
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives the pages of a file back")
def test_the_peak_is_the_model_in_4_bits_and_a_weight(make_model, tmp_path):
    small = make_model(tmp_path / "small", torch.bfloat16)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10, "num_attention_heads": 8}
    large = make_model(tmp_path / "large", torch.bfloat16, **sizes, num_key_value_heads=8)
    stored = (large / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout.splitlines()[-1]) < 0.6 * stored  # a quarter, and what bitsandbytes needs for one weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_the_device_is_the_model_in_4_bits_and_a_weight(make_model, tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
    base = make_model(tmp_path / "base", torch.bfloat16, **sizes, num_key_value_heads=16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = ask(base, load_in_4bit=True)
    peak, after = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    stored = (base / "model.safetensors").stat().st_size
    assert after < 0.3 * stored and peak < after + 4 * 2048 * 8192 * 2
    ids = IDS.to("cuda")
    plain = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=model.dtype), dtype=model.dtype
    )
    assert relative_distance(logits(model, ids).cpu(), logits(plain.eval(), ids).cpu()) < 1e-3
    assert describe_placement(model).startswith("On cuda, 4-bit weights (NF4), computing in ")
