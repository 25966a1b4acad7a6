"""A merged model has the logits of base and adapter, or nothing is written and one sentence says why."""

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from support import equal_tensors, materialize
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.saved import save_adapter
from accel_llm.chat.template_source import CHATML
from accel_llm.config.command_line import parse_options
from accel_llm.config.options import TrainOptions
from accel_llm.config.tool_options import MergeOptions
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError
from accel_llm.merge import merge as merge_module
from accel_llm.merge.merge import MergeResult, merge
from accel_llm.merge.write import write_merged
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.loading import load_model

pytestmark = pytest.mark.usefixtures("quiet")
IDS = torch.randint(600, (3, 40), generator=torch.Generator().manual_seed(7))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def make_adapter(tmp_path) -> Callable[..., Path]:
    """An adapter as a run leaves it, its weights moved far from where they began."""

    def make(base: Path, **options) -> Path:
        settings = TrainOptions(model_name_or_path=str(base), packing=False, **options)
        torch.manual_seed(0)
        model = materialize(attach_adapter(load_model(settings), settings), settings)
        state = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                state[name] = parameter.detach().clone()
        folder = tmp_path / "run" / "adapter"
        save_adapter(model, folder, state, str(base), model_fingerprint(str(base)))
        tokenizer = build_demo_tokenizer()
        tokenizer.chat_template = "{# of the run #}" + str(tokenizer.chat_template)
        tokenizer.save_pretrained(folder)
        GenerationConfig(eos_token_id=[2, 0], pad_token_id=0).save_pretrained(folder)
        return folder

    return make


def merge_adapter(folder: Path, target: Path, **options) -> MergeResult:
    return merge(MergeOptions(adapter=str(folder), output_dir=str(target), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype, bound, options",
    [
        pytest.param(torch.float32, 1e-5, {}, id="float32"),
        pytest.param(torch.bfloat16, 3e-2, {}, id="bfloat16"),
        pytest.param(torch.float16, 5e-3, {}, id="float16"),
        pytest.param(torch.float32, 1e-5, {"use_dora": True}, id="dora"),
        pytest.param(torch.bfloat16, 3e-2, {"use_dora": True}, id="dora-bfloat16"),
        pytest.param(torch.float32, 1e-5, {"use_rslora": True, "lora_r": 4}, id="rslora"),
        pytest.param(torch.float32, 1e-5, {"lora_target_modules": "all-linear", "lora_bias": "all"}, id="bias"),
        pytest.param(torch.float32, 1e-5, {"init_lora_weights": "pissa"}, id="pissa"),
        pytest.param(torch.float32, 1e-5, {"init_lora_weights": "olora"}, id="olora"),
        pytest.param(torch.float32, 1e-5, {"lora_target_modules": ["q_proj", "lm_head"]}, id="head"),
        pytest.param(torch.float32, 1e-5, {"lora_target_modules": ["q_proj", "embed_tokens"]}, id="embedding"),
        pytest.param(torch.float32, 1e-5, {"modules_to_save": ["embed_tokens", "lm_head"]}, id="modules_to_save"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_has_the_logits_of_base_and_adapter(
    make_model, make_adapter, tmp_path, dtype, bound, options, tied
):
    base = make_model(tmp_path / "base", dtype, tie_word_embeddings=tied, attention_bias=True)
    folder = make_adapter(base, **options)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    assert distance(logits(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.3

    result = merge_adapter(folder, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(loaded), expected) <= bound
    assert result.largest_error is not None and result.largest_error <= bound
    assert result.dtype == dtype and {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert not any("lora" in name or "base_layer" in name for name in stored)


def test_tokenizer_template_and_generation_config_are_written(tiny, make_adapter, tmp_path):
    folder = make_adapter(tiny)
    # The folder of the run that holds adapter/ will do as well, and so will a target below folders yet to be made.
    target = tmp_path / "some" / "where" / "merged"
    assert merge_adapter(folder.parent, target).folder == target
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert str(tokenizer.chat_template).startswith("{# of the run #}")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"
    settings = GenerationConfig.from_pretrained(target)
    assert (settings.eos_token_id, settings.pad_token_id) == ([2, 0], 0)
    assert [path.name for path in target.parent.iterdir()] == ["merged"]


def test_an_adapter_alone_takes_tokenizer_and_generation_config_of_its_base(make_model, make_adapter, tmp_path):
    base = make_model(tmp_path / "base")
    # Values that many published models carry and that transformers 5 refuses to save once anything was changed.
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 5}')
    folder = make_adapter(base)
    for path in folder.iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    merge_adapter(folder, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == 5


def test_a_chosen_dtype_is_written(tiny, make_adapter, tmp_path):
    assert merge_adapter(make_adapter(tiny), tmp_path / "merged", dtype="bfloat16").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_an_adapter_of_a_4_bit_base_merges_into_the_original_weights(make_model, make_adapter, tmp_path):
    base = make_model(tmp_path / "base", torch.bfloat16)
    folder = make_adapter(base, method="qlora")
    result = merge_adapter(folder, tmp_path / "merged")
    assert result.dtype == torch.bfloat16 and result.base == str(base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(loaded.config, "quantization_config")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    assert distance(logits(loaded), expected) <= 3e-2


def refusal(target: Path, folder: Path, **options) -> str:
    """The sentence of a merge that must leave nothing behind."""
    with pytest.raises(ConfigError) as error:
        merge_adapter(folder, target, **options)
    assert not target.exists() and not target.with_name(f".{target.name}.partial").exists()
    return str(error.value)


def test_adapters_that_cannot_be_merged_are_refused_in_one_sentence(tiny, make_model, make_adapter, tmp_path):
    target = tmp_path / "merged"
    nowhere = tmp_path / "nowhere"
    advice = "name the adapter's folder, or the run's output_dir."
    assert refusal(target, nowhere) == f"adapter: {nowhere} does not exist; {advice}"
    assert refusal(target, tiny) == f"adapter: {tiny} is a full model, not an adapter; it is used as it is."
    folder = make_adapter(tiny)
    assert refusal(target, folder, base=str(nowhere)) == (
        f"base: {nowhere} does not exist; a model folder or a hub id (owner/name) is allowed."
    )
    assert refusal(target, folder, base=str(folder)).startswith(f"base: {folder} is an adapter, not a model")
    wider = make_model(tmp_path / "wider", hidden_size=64)
    other = {"allow_other_base": True}
    assert refusal(target, folder, base=str(wider), **other) == (
        f"adapter: {folder} does not fit its base (22 weights have another shape, such as "
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight (32, 16), the model needs (64, 16))."
    )
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    first = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    assert refusal(target, folder, base=str(shallow), **other) == (
        f"adapter: {folder} does not fit its base (14 of its weights have no place in the model, such as {first})."
    )
    deep = make_model(tmp_path / "deep", num_hidden_layers=3)
    folder = make_adapter(tiny, lora_target_modules=["q_proj"])
    assert refusal(target, folder, base=str(deep), **other) == (
        f"adapter: {folder} does not fit its base (2 weights of its layers are missing in the file, such as "
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight)."
    )
    hollow = make_model(tmp_path / "hollow")
    state = load_file(hollow / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, hollow / "model.safetensors", metadata={"format": "pt"})
    assert refusal(target, folder, base=str(hollow), **other) == (
        f"base: {hollow} does not fill the model: 1 weights are missing (model.norm.weight)."
    )


def test_an_adapter_of_another_base_is_recognised_by_its_fingerprint(
    make_model, make_adapter, script, tmp_path, capsys
):
    base, other = make_model(tmp_path / "base"), make_model(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file(state | {"model.norm.weight": torch.ones(32) * 2}, other / "model.safetensors", metadata={"format": "pt"})
    folder, target = make_adapter(base), tmp_path / "merged"
    own, fingerprint = model_fingerprint(str(base)), model_fingerprint(str(other))
    sentence = (
        f"base: {folder} was trained on another base model (fingerprint {own}) than {other} ({fingerprint}); name its own base "
        "with --base, or set allow_other_base if this is the same model, stored in another way."
    )
    assert own != fingerprint and refusal(target, folder, base=str(other)) == sentence
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        script("chat", "--model", folder, "--base", other, "--prompt", "?")
    assert merge_adapter(folder, target, base=str(other), allow_other_base=True).base == str(other)
    assert f"| base `other`, fingerprint | {fingerprint} |" in (target / "README.md").read_text()
    base.rename(tmp_path / "moved")  # the same model wherever it lies
    assert merge_adapter(folder, tmp_path / "again", base=str(tmp_path / "moved")).modules


def test_a_missing_base_must_be_named(make_model, make_adapter, tmp_path):
    base = make_model(tmp_path / "base")
    folder = make_adapter(base)
    base.rename(tmp_path / "moved")
    assert refusal(tmp_path / "merged", folder) == (
        f"base: {base} does not exist; a model folder or a hub id (owner/name) is allowed; {folder} names it as its "
        "base, say where it is with --base."
    )
    assert merge_adapter(folder, tmp_path / "merged", base=str(tmp_path / "moved")).base == str(tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert refusal(tmp_path / "again", folder) == f"base: {folder} does not name its base model; say where it is."


@pytest.mark.parametrize("how", ["empty", "nan", "not json", "task"])
def test_a_broken_adapter_is_refused(tiny, make_adapter, tmp_path, how):
    folder = make_adapter(tiny)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "empty":
        weights.write_bytes(b"")
        expected = f"adapter: the weights of {folder} cannot be read (Error while deserializing header: "
    elif how == "nan":
        state = load_file(weights)
        state["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = float("nan")
        save_file(state, weights)
        expected = f"adapter: {folder} cannot be merged, 1 of its weights hold NaN or infinity, such as base_model."
    elif how == "not json":
        config.write_text('{\n"r": 8,,\n}')
        expected = f"adapter: {config} is not JSON (line 2: "
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_CLS"}))
        expected = (
            f"base: neither {tiny} nor the adapter {folder} has the weights score.weight, so predictions would be"
        )
    assert refusal(tmp_path / "merged", folder).startswith(expected)


def test_a_method_that_looks_at_the_weights_of_its_base_gets_them(tiny, make_adapter, tmp_path, monkeypatch):
    """A merge first tries to attach an adapter to a base without weights; a method may then fail in any way."""
    folder, update = make_adapter(tiny), Linear.update_layer
    expected = load_file(merged_weights(folder, tmp_path / "plain"))

    def look(layer: Any, *arguments: Any, **settings: Any) -> None:
        if layer.get_base_layer().weight.is_meta:
            raise ValueError("the weight has no norm")
        update(layer, *arguments, **settings)

    monkeypatch.setattr(Linear, "update_layer", look)
    assert equal_tensors(load_file(merged_weights(folder, tmp_path / "looked")), expected)


def merged_weights(folder: Path, target: Path) -> Path:
    merge_adapter(folder, target)
    return target / "model.safetensors"


def test_a_used_output_dir_is_refused_and_only_a_model_is_replaced(tiny, make_adapter, tmp_path):
    folder, target = make_adapter(tiny), tmp_path / "merged"
    target.mkdir()
    merge_adapter(folder, target)  # an empty folder will do
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError) as error:
        merge_adapter(folder, target)
    assert str(error.value) == (f"output_dir: {target} is not empty; name another folder, or set overwrite_output_dir.")
    (target / "stale.txt").write_text("of the old model")
    merge_adapter(folder, target, overwrite_output_dir=True)
    assert not (target / "stale.txt").exists() and (target / "model.safetensors").read_bytes() == before

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for name, reason in (
        (home, "holds files that are not a model; name another folder."),
        (home / "thesis.txt", "is a file; name a folder."),
        (folder, "holds the adapter that is read; name another folder."),
        (folder.parent, "holds the adapter that is read; name another folder."),
        (tiny, "holds the base that is read; name another folder."),
    ):
        with pytest.raises(ConfigError) as error:
            merge_adapter(folder, name, overwrite_output_dir=True)
        assert str(error.value) == f"output_dir: {name} {reason}"
    assert (home / "thesis.txt").exists() and (folder / "adapter_config.json").exists() and tiny.is_dir()


@pytest.mark.long
def test_a_merge_that_differs_is_not_written(tiny, make_adapter, tmp_path, monkeypatch):
    folder, target = make_adapter(tiny), tmp_path / "merged"
    merge_adapter(folder, target)
    before = (target / "model.safetensors").read_bytes()

    def write_badly(plan, partial, options, progress):
        specs = write(plan, partial, options, progress)
        state = load_file(partial / "model.safetensors")
        state["model.layers.0.mlp.up_proj.weight"] *= 1.01
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        return specs

    write = write_merged
    monkeypatch.setattr(merge_module, "write_merged", write_badly)
    assert refusal(tmp_path / "new", folder) == (
        "verify: model.layers.0.mlp.up_proj.weight in model.safetensors is not what was written; nothing was kept."
    )
    monkeypatch.setattr(merge_module, "read_back", lambda partial, sums: {})
    sentence = r"^verify: the merged model's logits differ from .* \(allowed for torch\.float32: 1e-04\); nothing was written\.$"
    with pytest.raises(ConfigError, match=sentence):
        merge_adapter(folder, target, overwrite_output_dir=True, verify="logits")
    assert (target / "model.safetensors").read_bytes() == before
    # The same damage goes through where nobody looks.
    assert merge_adapter(folder, tmp_path / "blind", verify="none").largest_error is None


@pytest.mark.long
def test_logits_are_compared_in_a_fresh_process(tiny, make_adapter, tmp_path):
    result = merge_adapter(make_adapter(tiny), tmp_path / "merged", verify="logits")
    assert result.differences.keys() == {"merged"} and 0 <= result.differences["merged"] < 1e-5
    facts = (tmp_path / "merged" / "README.md").read_text()
    assert "logits compared with those of base and adapter: relative difference" in facts


def test_an_interrupted_merge_leaves_no_files(tiny, make_adapter, tmp_path):
    folder = make_adapter(tiny)
    options = MergeOptions(adapter=[str(folder)], output_dir=str(tmp_path / "merged"))

    def interrupted(written_bytes: int, total: int) -> None:
        if written_bytes > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(options, interrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_model_card_names_what_was_merged(tiny, make_adapter, tmp_path):
    folder = make_adapter(tiny)
    result = merge_adapter(folder, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"| adapter `run/adapter`, adapter_model.safetensors | {digest} |" in text
    digest = hashlib.sha256((tmp_path / "merged" / "model.safetensors").read_bytes()).hexdigest()
    assert result.hashes == {"model.safetensors": digest} and f"| model.safetensors | {digest} |" in text
    assert "# merged" in text and "14 modules merged in float32" in text and f"peft {peft.__version__}" in text
    assert str(tmp_path) not in text  # of the paths of this machine only the last names go out
    assert text.startswith("---\nlibrary_name: transformers\n") and "base_model:" not in text


def test_the_tokenizer_comes_from_the_adapter_or_else_from_the_base(tiny, make_adapter, tmp_path):
    folder = make_adapter(tiny)
    assert merge_adapter(folder, tmp_path / "a").notes == (f"tokenizer: of the adapter ({folder})",)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert merge_adapter(folder, tmp_path / "b").notes == (f"tokenizer: of the base ({tiny})",)
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(bare)
    result = merge_adapter(folder, tmp_path / "c", base=str(bare))
    assert result.notes == ("tokenizer: neither the adapter's folder nor the base's has one",)


def test_nothing_is_uploaded_unless_asked(script, tiny, make_adapter, tmp_path, monkeypatch):
    folder = make_adapter(tiny)
    pushed: list[str] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pushed.append("connected"))
    script("merge", "--adapter", folder, "--output_dir", tmp_path / "a")
    assert not pushed


@pytest.mark.parametrize("name", ["owner/adapter", "owner/base"])
def test_a_hub_id_that_cannot_be_reached_is_refused(tiny, make_adapter, tmp_path, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    field = name.split("/")[1]
    with pytest.raises(
        ConfigError,
        match=rf"^{field}: {name} is not a folder and not in the cache of the hub, and the hub cannot be reached \(",
    ):
        if field == "adapter":
            merge(MergeOptions(adapter=[name], output_dir=str(tmp_path / "merged")))
        else:
            merge_adapter(make_adapter(tiny), tmp_path / "merged", base=name)


def test_options_that_exclude_each_other_are_refused():
    def problems(*flags: str) -> str:
        with pytest.raises(ConfigError) as error:
            parse_options(MergeOptions, ["--output_dir", "out", *flags])
        return str(error.value)

    assert "adapter_weights: 1 are given for 2 adapters" in problems("--adapter", "a", "b", "--adapter_weights", "0.5")
    assert "density: only several adapters use it" in problems("--adapter", "a", "--density", "0.5")
    assert "unmerge: it removes one adapter from a merged model; give base" in problems("--adapter", "a", "--unmerge")
    options = parse_options(
        MergeOptions, ["--output_dir", "o", "--adapter", "a", "b", "--adapter_weights", "0.5", "-1"]
    )
    assert options.adapter_weights == [0.5, -1.0] and options.max_shard_size == 50 * 10**9
    assert (
        parse_options(MergeOptions, ["--adapter", "a", "--output_dir", "o", "--max_shard_size", "2GiB"]).max_shard_size
        == 2**31
    )


def test_an_adapter_made_by_plain_peft_merges(tiny, tmp_path):
    """The loss-free forward of training, stripped by export, is no part of what merging needs."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    model.save_pretrained(tmp_path / "plain")
    assert merge_adapter(tmp_path / "plain", tmp_path / "merged").base == str(tiny)
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) <= 1e-5


def test_the_script_merges_a_runs_adapter_and_chat_answers(script, tiny, chats, tmp_path, capsys):
    run, target, short = tmp_path / "out", tmp_path / "merged", ("--max_length", 128)
    script("sft", "--model_name_or_path", tiny, "--train_files", chats, "--output_dir", run, "--max_steps", 2, *short)
    script("merge", "--adapter", run, "--output_dir", target)
    capsys.readouterr()
    answers = []
    for model in (run, run / "adapter", target):
        script("chat", "--model", model, "--prompt", "What is 3 + 4?", "--max_new_tokens", 8)
        answers.append(capsys.readouterr().out)
    assert answers[0] and len(set(answers)) == 1
    shutil.rmtree(run / "adapter")
    for model, sentence in ((run, "has no config.json"), (tmp_path / "no", "does not exist")):
        with pytest.raises(ConfigError, match=sentence):
            script("chat", "--model", model, "--prompt", "?")
