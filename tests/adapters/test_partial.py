"""Methods freeze and bitfit: exactly what the options name is trained, and the export is the base with that part."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, materialize, random_rows, run_json, tiny_model

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.methods import check_method
from accel_llm.adapters.partial import last_layers, parameters_of_part, train_part
from accel_llm.config.options import MethodOptions, TrainOptions
from accel_llm.data.batches import collate_packed
from accel_llm.errors import ConfigError
from accel_llm.model.attention import enable_packing
from accel_llm.model.loading import load_model
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.training.memory_estimate import Layout, _figures


def options(method: str = "freeze", **values: Any) -> MethodOptions:
    return MethodOptions(method=method, method_options=values)


def trained(family: str, method: str = "freeze", config: dict[str, Any] | None = None, **values: Any) -> set[str]:
    model = tiny_model(family, **(config or {}))
    train_part(model, options(method, **values))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == parameters_of_part(model, options(method, **values))  # the second time too, as in the preflight
    return names


def layer(number: int, *parts: str) -> set[str]:
    model = tiny_model("llama")
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(f"model.layers.{number}.") and (not parts or any(f".{part}." in name for part in parts))
    }


ENDS = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
NORMS = {f"model.layers.{n}.{name}_layernorm.weight" for n in (0, 1) for name in ("input", "post_attention")}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"layers": 1}, lambda: layer(1)),
        ({"layers": 2}, lambda: layer(0) | layer(1)),
        ({"layers": [0]}, lambda: layer(0)),
        ({"layers": 1, "modules": ["mlp"]}, lambda: layer(1, "mlp")),
        ({"modules": "q_proj"}, lambda: layer(0, "q_proj") | layer(1, "q_proj")),
        ({"parameters": ["layers.0.*down", "^lm_head"]}, lambda: layer(0, "down_proj") | {"lm_head.weight"}),
        ({"norms": True}, lambda: NORMS | {"model.norm.weight"}),
        ({"head": True}, lambda: {"lm_head.weight"}),
        ({"layers": [1], "embeddings": True, "head": True, "norms": True}, lambda: layer(1) | ENDS | NORMS),
    ],
)  # fmt: skip
def test_freeze_trains_the_union_of_what_its_options_name(values, expected):
    assert trained("llama", **values) == expected()


def test_a_matrix_that_embedding_and_head_share_is_trained_for_both_and_that_is_said(capsys):
    for values in ({"embeddings": True}, {"head": True}):
        assert trained("llama", config={"tie_word_embeddings": True}, **values) == {"model.embed_tokens.weight"}
        assert "the embedding and the head are one matrix, so both are" in capsys.readouterr().out
    trained("llama", embeddings=True)
    assert capsys.readouterr().out == "method freeze: 3,104 of 21,728 weights are trained\n"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"layers": 3}, "layers 3 is not in the model, which has 2 layers; numbers begin with 0."),
        ({"layers": [0, 2]}, "layers 2 is not in the model, which has 2 layers; numbers begin with 0."),
        ({"layers": 1, "modules": ["mpl"]}, "modules 'mpl' is not in these layers, which have input_layernorm, mlp, "
         "post_attention_layernorm, self_attn."),
        ({"parameters": ["experts"]}, "parameters 'experts' matches no name, such as lm_head.weight."),
        ({"layers": True}, "layers True is not allowed (Input should be a number)."),
        ({"parameters": ["("]}, "parameters '(' is not a regular expression (missing ), unterminated subpattern at position "
         "0)."),
        ({"layer": 1}, "method freeze has no 'layer'; did you mean layers?"),
        ({}, "method freeze trains nothing; give layers, modules, parameters, embeddings, head or norms."),
    ],
)  # fmt: skip
def test_what_freeze_cannot_do_is_a_sentence(values, problem):
    with pytest.raises(ConfigError) as caught:
        check_method(options(**values))
        train_part(tiny_model("llama"), options(**values))
    assert caught.value.problems == [f"method_options: {problem}"]


def test_bitfit_trains_all_biases_and_nothing_else():
    """The paper counts for BERT-base: query, key, value, output and norm 6 x 768, the middle of the MLP 3,072, and so on."""
    names = trained("gpt2", "bitfit")
    assert names == {name for name, _ in tiny_model("gpt2").named_parameters() if name.endswith(".bias")}
    model, width = tiny_model("gpt2"), 32
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
    # A layer: 2 norms, 3 + 1 products of attention, 4 + 1 widths of the MLP; and the norm behind the layers.
    assert count == 2 * (2 + 3 + 1 + 4 + 1) * width + width
    assert trained("qwen2", "bitfit") == {f"model.layers.{n}.self_attn.{p}_proj.bias" for n in (0, 1) for p in "qkv"}
    with pytest.raises(ConfigError, match="bitfit trains biases, and LlamaForCausalLM has no biases; use ln_tuning or"):
        trained("llama", "bitfit")
    with pytest.raises(ConfigError, match="method bitfit has none; remove layers"):
        check_method(options("bitfit", layers=1))


def test_gradients_equal_those_of_the_whole_model_in_float64():
    rows = random_rows(5, 12)
    batch = collate_packed(rows)
    oracle = tiny_model("gpt2").double()
    total = 0.0
    for ids, labels in rows:  # one by one by plain transformers; its loss is the mean over the labels
        tensors = {"input_ids": torch.tensor(ids)[None], "labels": torch.tensor(labels).long()[None]}
        counted = int((tensors["labels"][0, 1:] != -100).sum())
        total = total + oracle(**tensors).loss * counted if counted else total
    total.backward()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for method, values in (("bitfit", {}), ("freeze", {"layers": 1}), ("freeze", {"embeddings": True, "norms": True})):
        model = tiny_model("gpt2").train()
        enable_packing(model)
        attach_loss(model, 64)
        train_part(model, options(method, **values))
        next_token_loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def train(script, chats, tmp_path) -> Callable[..., Path]:
    def run(model: Path, *more: object, name: str = "out") -> Path:
        where = ("--model_name_or_path", model, "--train_files", chats, "--output_dir", tmp_path / name)
        script("sft", *where, "--max_length", 128, "--learning_rate", 1e-2, *more)
        return tmp_path / name

    return run


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_the_base_bit_for_bit_with_the_trained_part(train, make_model, tmp_path, tied):
    """The frozen part computes in bfloat16 here, and is stored in float32."""
    base = make_model(tmp_path / "base", tie_word_embeddings=tied)
    part = ["embeddings=true", "layers=[1]"]
    folder = train(base, "--method", "freeze", "--method_options", *part, "--precision", "bf16", "--max_steps", 2)
    before, after = (load_file(path / "model.safetensors") for path in (base, folder / "model"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert after.keys() == before.keys()
    assert changed == {"model.embed_tokens.weight", *(name for name in before if ".layers.1." in name)}


@pytest.mark.long
def test_a_resumed_run_is_bit_equal_and_layers_below_may_be_recomputed(train, tiny, tmp_path):
    part = ("--method", "freeze", "--method_options", "layers=1", "--max_steps", 4, "--save_steps", 2)
    whole = train(tiny, *part)
    start = ("--resume_from_checkpoint", whole / "checkpoints" / "step-00000002")
    resumed = train(tiny, *part, "--gradient_checkpointing", *start, name="again")
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # Only what is trained is in a checkpoint.
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step-00000002").rglob("*.safetensors"))
    count = sum(tensor.numel() for name, tensor in one.items() if ".layers.1." in name)
    assert 3 * 4 * count < size < 1.2 * 3 * 4 * count  # a weight and two moments


def test_bf16_alone_with_random_rounding_is_for_parts_too(train, make_model, tmp_path):
    base = make_model(tmp_path / "base", torch.bfloat16)
    part = ("--method", "freeze", "--method_options", "layers=1", "--precision", "bf16", "--max_steps", 2)
    folder = train(base, *part, "--master_weights", "stochastic_rounding")
    before, after = (load_file(path / "model.safetensors") for path in (base, folder / "model"))
    assert {name for name in after if not torch.equal(after[name], before[name])} <= {
        n for n in after if ".layers.1." in n
    }
    assert run_json(folder)["accelerate"]["dtypes"]["trained"] == {"bfloat16": 9}


def test_new_tokens_need_trained_rows():
    model = tiny_model("llama")
    with pytest.raises(
        ConfigError, match="method freeze would not train the rows of the new tokens; use method freeze"
    ):
        train_part(model, options(layers=1, embeddings=True), range(95, 97))
    train_part(model, options(layers=1, embeddings=True, head=True), range(95, 97))


@pytest.mark.long
def test_layers_at_the_end_are_followed_by_the_estimate_of_memory():
    """More layers of the model add frozen weights only; the last 5 trained are 5 layers."""
    layout = Layout("single", 1, "cpu", {})
    config = tiny_model("llama", num_hidden_layers=12).config
    for values, layers in (({"layers": 5}, 5), ({"layers": [3, 4, 10]}, 3)):
        settings = TrainOptions(method="freeze", method_options=values, model_name_or_path="model", max_length=32)
        assert last_layers(settings) == {5: 5, 3: None}[layers]
        figures = _figures(settings, config, layout)
        one = sum(p.numel() for n, p in tiny_model("llama").named_parameters() if ".layers.0." in n)
        assert figures["trainable"] == layers * one


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("method", ["bitfit", "lora"])
def test_a_bias_of_a_normalisation_is_trained_in_bfloat16(tmp_path, method):
    """On a CPU torch computes no LayerNorm with a weight in bfloat16 and a bias in float32."""
    tiny_model("gpt2").bfloat16().save_pretrained(tmp_path)
    chosen = TrainOptions(
        model_name_or_path=str(tmp_path),
        method=method,
        precision="bf16",
        **({"lora_bias": "all"} if method == "lora" else {}),
    )
    model: Any = load_model(chosen)
    model = attach_adapter(model, chosen) if method == "lora" else model
    train_part(model, chosen)
    materialize(model, chosen)
    with torch.autocast("cpu", torch.bfloat16):
        next_token_loss(model, collate_packed(random_rows(4, 12))).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())
    assert any("ln_f.bias" in name for name in trained)
    assert not any("ln_f.weight" in name for name in trained)


@pytest.mark.long
def test_a_step_of_two_processes_with_accumulation_follows_float64(tmp_path):
    """The table of tests/proofs/parts.py has all cases and strategies; these are the hardest of each."""
    cells = ("layers-zero2", "norms-fsdp2", "experts-fsdp2", "experts-zero3")
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "proofs" / "parts.py", "--only", ",".join(cells)]
    done = subprocess.run([*command, "--work", tmp_path], capture_output=True, text=True, cwd=ROOT, timeout=300)
    results = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(cells))
    assert [results.get(cell, "").split(":")[0] for cell in cells] == ["same", "same", "same", "refused"], done.stdout
    assert "target_parameters cannot be trained under zero3" in results["experts-zero3"]
