"""GGUF files compute what the model computes; what they cannot say is refused; nothing half-written is left."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import need_serving_packages
from support import ROOT, moved_adapter, relative_distance, scaled_model, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ExportOptions, MergeOptions
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError
from accel_llm.merge import gguf_file, gguf_model, served
from accel_llm.merge.export import export
from accel_llm.merge.gguf_file import read_words, write_gguf
from accel_llm.merge.merge import merge
from accel_llm.merge.serve import modelfile, quantize
from accel_llm.merge.served import (
    LARGEST_DIVERGENCE,
    ServedModel,
    divergence,
    load_served,
    served_logits,
)

pytestmark = pytest.mark.usefixtures("quiet")
IDS = torch.randint(3, 600, (48,), generator=torch.Generator().manual_seed(7)).tolist()
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama wide heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama yarn": ("llama", {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2 tied yarn": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied yarn": ("qwen3", {"tie_word_embeddings": True, "rope_parameters": YARN, "head_dim": 16}),
}


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Save a model with the demo's tokenizer, its weights rounded as in the GGUF file."""
    model.to(dtype).save_pretrained(folder)
    build_demo_tokenizer().save_pretrained(folder)
    return folder


def small(family: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny_model(family, **{"vocab_size": 606, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0, **options})


def expected_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]


def gguf_logits(folder: Path) -> torch.Tensor:
    write_gguf(folder, folder / "model.gguf", read_words(folder))
    return served_logits(load_served(folder / "model.gguf"), IDS)


@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_computes_the_logits_of_transformers(tmp_path, case):
    need_serving_packages()
    family, options = MODELS[case]
    folder = save_model(small(family, **options), tmp_path / "model")
    actual, expected = gguf_logits(folder), expected_logits(folder)
    # llama.cpp rounds the inputs of each product, keys and values to float16.
    assert relative_distance(actual, expected) < 5e-3
    assert divergence(actual, expected.log_softmax(-1)).mean() < LARGEST_DIVERGENCE


def test_a_wrong_order_of_rows_is_noticed(tmp_path, monkeypatch):
    need_serving_packages()
    folder = save_model(small(), tmp_path / "model")
    expected = expected_logits(folder)
    monkeypatch.setattr(gguf_file, "pair_neighbours", lambda weight, heads: weight)
    actual = gguf_logits(folder)
    assert relative_distance(actual, expected) > 0.1
    assert divergence(actual, expected.log_softmax(-1)).mean() > 10 * LARGEST_DIVERGENCE


@pytest.mark.parametrize("name", ["llama llama3", "llama linear", "llama yarn"])
def test_a_scaling_of_positions_that_is_left_out_is_noticed(tmp_path, monkeypatch, name):
    need_serving_packages()
    folder = save_model(small(MODELS[name][0], **MODELS[name][1]), tmp_path / "model")
    expected = expected_logits(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000.0}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert relative_distance(gguf_logits(folder), expected) > 0.1


def test_what_float16_cannot_hold_stays_in_float32(tmp_path):
    need_serving_packages()
    model = small()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = 1e5
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e-3)
    folder = save_model(model, tmp_path / "model", torch.bfloat16)
    notes = write_gguf(folder, folder / "model.gguf", read_words(folder))
    assert notes == [
        "1 matrices stay in float32, since float16 ends at 65,504, such as model.layers.0.mlp.down_proj.weight"
    ]
    assert relative_distance(served_logits(load_served(folder / "model.gguf"), IDS), expected_logits(folder)) < 2e-2


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "family": (lambda: small("gemma", head_dim=8), "the family gemma is not written, only llama, qwen2, qwen3"),
    "window": (lambda: small("qwen2"), "it has a sliding window (use_sliding_window, layer_types)"),
    "dynamic": (lambda: scaled_model("llama dynamic"), "rope_type dynamic is not written for llama"),
    "llama3 of qwen3": (lambda: small("qwen3", rope_parameters=LLAMA3), "rope_type llama3 is not written for qwen3"),
    "yarn": (lambda: small(rope_parameters={**YARN, "beta_fast": 16.0}), "yarn has the settings beta_fast"),
    "silu": (lambda: small(hidden_act="gelu"), "hidden_act is gelu, and llama.cpp computes silu"),
    "bias of qwen3": (lambda: small("qwen3", attention_bias=True), "its attention has a bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_gguf_cannot_say_are_refused(tmp_path, case):
    build, reason = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        gguf_model.check_family(build().config, "m")
    (sentence,) = error.value.problems
    assert sentence.startswith("model: m cannot be written as GGUF: ") and reason in sentence and sentence.endswith(".")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "extra": (lambda w: w.update(score=torch.ones(2)), "holds 1 weights that GGUF has no name for, such as score."),
    "missing": (
        lambda w: w.pop("model.norm.weight"),
        "lacks 1 weights that its config.json promises, such as model.norm",
    ),
    "not a number": (
        lambda w: w["model.norm.weight"].fill_(float("nan")),
        "holds a number that is not finite.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_refused_and_nothing_is_left(tmp_path, case):
    need_serving_packages()
    folder = save_model(small(), tmp_path / "model")
    change, reason = BROKEN[case]
    change_weights(folder, change)
    with pytest.raises(ConfigError) as error:
        export(ExportOptions(model=str(folder), output_dir=str(tmp_path / "out")))
    assert reason in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that trained a LoRA adapter on a small base in bfloat16."""
    base = save_model(small(hidden_size=64), tmp_path / "base", torch.bfloat16)
    moved_adapter(base, tmp_path / "run" / "adapter", lora_r=4)
    build_demo_tokenizer().save_pretrained(tmp_path / "run" / "adapter")
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=0).save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run"


def test_a_run_is_exported_and_proved_in_a_fresh_process(run, tmp_path):
    need_serving_packages()
    phases: list[str] = []
    options = ExportOptions(model=str(run), output_dir=str(tmp_path / "out"), quantize=["f16", "Q8_0", "Q4_K_M"])
    result = export(options, phases.append)
    names = ["Modelfile", "model-f16.gguf", "model-q4_k_m.gguf", "model-q8_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8") == (
        'FROM ./model-f16.gguf\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0\n'
    )
    proof = result.served.proof
    assert proof is not None and proof.stops == ["<|im_end|>", "<|endoftext|>"] and proof.tokens > 1000
    half, eight, four = (proof.files[f"model-{name}.gguf"] for name in ("f16", "q8_0", "q4_k_m"))
    assert 0 < half.divergence < 1e-4 < eight.divergence < four.divergence
    # Where two tokens are nearly as likely, rounding decides, which differs between builds of llama.cpp.
    assert half.divergence < half.largest and 2 <= half.same_answers <= half.answers == 3
    assert phases == [
        "merging",
        "writing",
        "quantizing to q8_0",
        "quantizing to q4_k_m",
        "comparing token ids",
        "asking the model in transformers",
        "asking model-f16.gguf in llama.cpp",
        "asking model-q8_0.gguf in llama.cpp",
        "asking model-q4_k_m.gguf in llama.cpp",
    ]


def test_another_model_than_base_and_adapter_fails_the_proof(run, tmp_path):
    """The reference is not what was merged: a changed weight is noticed."""
    need_serving_packages()
    merged = merge(MergeOptions(adapter=[str(run)], output_dir=str(tmp_path / "merged"))).folder
    change_weights(merged, lambda weights: weights["model.layers.1.mlp.down_proj.weight"].mul_(1.2))
    words = read_words(merged)
    write_gguf(merged, tmp_path / "model.gguf", words)
    settings = {"adapter": [str(run / "adapter")], "output_dir": "-"}
    model = ServedModel(merged, (run / "adapter",), tmp_path / "base", settings)
    with pytest.raises(ConfigError, match=r"^verify: model.gguf tells other probabilities than the model, by a KL "):
        served._prove(model, [tmp_path / "model.gguf"])


def test_merge_writes_and_proves_the_file_beside_the_weights(run, tmp_path, script, capsys):
    need_serving_packages()
    script("merge", "--adapter", run, "--output_dir", tmp_path / "merged", "--verify", "served")
    assert {"model-f16.gguf", "Modelfile", "model.safetensors"} <= {p.name for p in (tmp_path / "merged").iterdir()}
    printed = capsys.readouterr().out
    assert re.search(r"verified: llama.cpp has the same ids for \d+ texts", printed)
    assert re.search(r"verified: model-f16.gguf has a KL divergence of \d\.\de-0\d nats a token", printed)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "model-f16.gguf has a KL divergence of" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # the file beside them disturbs nobody


def test_a_full_model_is_exported_without_a_merge(tmp_path, script, capsys):
    need_serving_packages()
    save_model(small("qwen3"), tmp_path / "run" / "model")
    target = tmp_path / "out"
    script("export", "--model", tmp_path / "run", "--output_dir", target, "--quantize", "q8_0", "--verify", "none")
    assert sorted(path.name for path in target.iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"wrote {target}/model-q8_0.gguf (") and printed[1] == "not verified"
    assert printed[2] == f"made of {tmp_path}/run/model; with Ollama: ollama create NAME -f {target}/Modelfile"
    with pytest.raises(ConfigError, match="is not empty; name another folder, or set overwrite_output_dir"):
        script("export", "--model", tmp_path / "run", "--output_dir", target)


def test_quantizing_changes_the_file_as_llama_cpp_does_it(tmp_path):
    need_serving_packages()
    folder = save_model(small(hidden_size=64, num_attention_heads=4), tmp_path / "model")
    words = read_words(folder)
    write_gguf(folder, tmp_path / "a.gguf", words)
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    assert (tmp_path / "b.gguf").stat().st_size < 0.8 * (tmp_path / "a.gguf").stat().st_size
    expected = expected_logits(folder)
    assert 1e-3 < relative_distance(served_logits(load_served(tmp_path / "b.gguf"), IDS), expected) < 0.3
    with pytest.raises(ConfigError, match=r"^quantize: llama.cpp cannot write missing.gguf as q8_0"):
        quantize(tmp_path / "missing.gguf", tmp_path / "c.gguf", "q8_0")


def test_the_divergence_is_that_of_the_definition():
    first, second = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.0]])
    p, q = second.softmax(-1), first.softmax(-1)
    assert divergence(first, second.log_softmax(-1)).item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert divergence(first, first.log_softmax(-1)).item() == pytest.approx(0, abs=1e-7)


def test_missing_packages_are_named_before_anything_is_read(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    if find("gguf") is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else object())
    sentence = 'serve: llama-cpp-python is not installed; run pip install -e ".[serve]" (it builds llama.cpp'
    with pytest.raises(ConfigError) as error:
        export(ExportOptions(model=str(tmp_path / "no"), output_dir=str(tmp_path / "out")))
    assert str(error.value).startswith(sentence)
    with pytest.raises(ConfigError) as error:
        merge(MergeOptions(adapter=[str(tmp_path / "no")], output_dir=str(tmp_path / "out"), verify="served"))
    assert str(error.value).startswith(sentence)


def test_options_are_checked(tmp_path):
    with pytest.raises(ConfigError) as error:
        parse_options(ExportOptions, ["--model", "m", "--output_dir", "o", "--quantize", "q3", "--verify", "logits"])
    assert error.value.problems == [
        "quantize: 'q3' is not allowed; give any of f16, q8_0, q6_k, q5_k_m, q4_k_m.",
        "verify: 'logits' is not allowed; give served or none.",
    ]
    assert parse_options(ExportOptions, ["--model", "m", "--output_dir", "o", "--quantize", "Q8_0"]).quantize == [
        "q8_0"
    ]


def test_the_modelfile_names_stop_tokens_and_sampling(tmp_path):
    folder = save_model(small(), tmp_path / "model")
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[2, 0]).save_pretrained(folder)
    assert modelfile("x.gguf", read_words(folder)).splitlines() == [
        "FROM ./x.gguf",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
        "PARAMETER top_p 0.95",
    ]


@pytest.mark.long
def test_a_kill_in_the_middle_leaves_nothing(tmp_path):
    need_serving_packages()
    folder = save_model(small(hidden_size=256, num_hidden_layers=24, intermediate_size=1024), tmp_path / "model")
    command = [sys.executable, ROOT / "launch" / "export.py", "--model", folder, "--output_dir", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / ".out.partial" / "model-f16.gguf").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    process.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
