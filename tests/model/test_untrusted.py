"""Untrusted files: each payload would leave a mark if it were run or read; it is refused in one line instead."""

import builtins
import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
from datasets.data_files import resolve_pattern
from safetensors.torch import load_file
from support import materialize
from transformers import AutoModelForCausalLM, Gemma3Config

from accel_llm.config.command_line import parse_options
from accel_llm.config.fields import MAX_YAML_CHARACTERS, Source
from accel_llm.config.options import SftOptions, TrainOptions
from accel_llm.data.hub import file_outside_hub
from accel_llm.data.sources import read_source
from accel_llm.errors import ConfigError, DataError
from accel_llm.model.loading import build_model, load_complete_model, load_model, load_model_config
from accel_llm.model.meta_device import OWN_IMPLEMENTATIONS
from accel_llm.model.tokenizer import configured_tokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("quiet")
SHA = "a" * 40


class Options(SftOptions):
    pass


class Payload:
    """Creates the folder `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def terminal_questions(monkeypatch) -> list[str]:
    """The questions that were asked at the terminal."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return questions


def options(model: Path | str, **more: Any) -> TrainOptions:
    return TrainOptions(model_name_or_path=str(model), packing=False, **more)


def change(path: Path, **values: Any) -> None:
    old_values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(old_values | values), encoding="utf-8")


def refusal(act: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        act(*arguments, **keywords)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


# Weights


def as_pickle(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """The weights of `folder` as pytorch_model.bin, or as several with an index, in place of the safetensors."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    places = {name: f"pytorch_model-{k % shards}.bin" for k, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: state[name] for name, place in places.items() if place == file}, folder / file)
    change(folder / "pytorch_model.bin.index.json", metadata={"total_size": 1}, weight_map=places)
    return state


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickle_is_read_with_the_flag_alone(folder, tiny, shards):
    as_pickle(folder, shards)
    sentence = refusal(load_model, options(folder))
    assert sentence == (
        f"model_name_or_path: the weights of {folder} are a pickle (pytorch_model.bin), not safetensors. A pickle is a "
        "program: convert it to safetensors in a safe place, or set allow_pickle: true, which unpickles only tensors."
    )
    pickle_options = options(folder, allow_pickle=True)
    ours, theirs = (
        materialize(load_model(pickle_options), pickle_options),
        materialize(load_model(options(tiny)), options(tiny)),
    )
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_the_flag_prefers_safetensors(folder, mark):
    torch.save({"a": Payload(mark)}, folder / "pytorch_model.bin")
    for allowed in (False, True):
        load_model(options(folder, allow_pickle=allowed))
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_a_program_is_never_run(folder, mark, zipped):
    as_pickle(folder)
    file = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": Payload(mark)}, file, _use_new_zipfile_serialization=zipped)
    refusal(load_model, options(folder))
    sentence = refusal(load_model, options(folder, allow_pickle=True))
    assert sentence == f"model_name_or_path: {folder} cannot be loaded (its pickle holds more than tensors)."
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_a_repository_of_the_hub_is_looked_at_alike(tiny, tmp_path, mark, monkeypatch):
    snapshot = tmp_path / "models--o--n" / "snapshots" / SHA
    shutil.copytree(tiny, snapshot)
    (tmp_path / "models--o--n" / "refs").mkdir()
    (tmp_path / "models--o--n" / "refs" / "main").write_text(SHA, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_model(options("o/n"))
    change(snapshot / "adapter_config.json", base_model_name_or_path=str(tiny))
    assert refusal(load_model_config, options("o/n")) == (
        "model_name_or_path: o/n is an adapter, not a model; name its base model."
    )
    (snapshot / "adapter_config.json").unlink()
    as_pickle(snapshot)
    assert "the weights of o/n are a pickle" in refusal(load_model, options("o/n"))
    assert load_model(options("o/n", allow_pickle=True)).num_parameters()
    payload(snapshot, mark, "config.json", "AutoConfig")
    change(snapshot / "config.json", model_type="strange")
    assert "o/n needs its own Python code" in refusal(load_model_config, options("o/n"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/tmp/x.safetensors",
        "a/../../other.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        7,
    ],
)
def test_a_map_of_weights_stays_in_its_folder(folder, tiny, name):
    shutil.move(folder / "model.safetensors", folder.parent / "other.safetensors")
    weights = dict.fromkeys(load_file(folder.parent / "other.safetensors"), "../other.safetensors")
    index = folder / "model.safetensors.index.json"
    change(index, metadata={"total_size": 1}, weight_map=weights)
    # transformers 5.23 alone follows it.
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    change(index, weight_map={**weights, "model.norm.weight": name})
    for allowed in (False, True):
        assert refusal(load_model, options(folder, allow_pickle=allowed)).startswith(
            f"model_name_or_path: {folder} names "
        )


def test_a_map_of_weights_names_no_pickle(folder, mark):
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    torch.save({"model.norm.weight": Payload(mark)}, folder / "b.bin")
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    index = folder / "model.safetensors.index.json"
    change(index, metadata={"total_size": 1}, weight_map=names)
    assert load_model(options(folder)).num_parameters()
    change(index, weight_map=names | {"model.norm.weight": "b.bin"})
    assert refusal(load_model, options(folder)) == (
        f"model_name_or_path: {folder} names 'b.bin' in its model.safetensors.index.json; only .safetensors is allowed."
    )
    shutil.move(folder / "a.safetensors", folder / "model.safetensors")
    index.unlink()
    for file_name in ("adapter_model.bin", "../model.safetensors", "/model.safetensors"):
        change(folder / "config.json", transformers_weights=file_name)
        assert f"{folder} names {file_name!r} in its config.json" in refusal(load_model, options(folder))
    assert not mark.exists()


@pytest.mark.parametrize("how", ["length", "overlap", "beyond", "text"])
def test_a_safetensors_file_with_a_false_header_is_a_sentence(folder, how):
    file = folder / "model.safetensors"
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    header, body = json.loads(file.read_bytes()[8 : 8 + size]), file.read_bytes()[8 + size :]
    first, second = (header[name]["data_offsets"] for name in list(header)[1:3])
    if how == "overlap":
        second[:] = first
    elif how == "beyond":
        second[1] += 1 << 40
    header_bytes = b"\xff" * 64 if how == "text" else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", 1 << 62 if how == "length" else len(header_bytes)) + header_bytes + body)
    assert refusal(load_model, options(folder)).startswith(f"model_name_or_path: {folder} cannot be loaded (")


# Code that comes with a model


def payload(folder: Path, mark: Path, file: str, *names: str) -> None:
    """Python files in `folder`, which leave a mark, and `file` naming them for each of `names`."""
    (folder / "code.py").write_text(f"import os\nos.makedirs({str(mark)!r})\nclass C:\n    pass\n", encoding="utf-8")
    for inner in ("", "custom_generate"):
        (folder / inner).mkdir(exist_ok=True)
    shutil.copy(folder / "code.py", folder / "custom_generate" / "generate.py")
    tokenizer = [None, "code.C"]
    change(folder / file, auto_map={name: tokenizer if name == "AutoTokenizer" else "code.C" for name in names})


def test_code_that_a_model_needs_is_refused_unasked(folder, mark, terminal_questions):
    payload(folder, mark, "config.json", "AutoConfig", "AutoModelForCausalLM")
    change(folder / "config.json", model_type="strange")
    assert refusal(load_model_config, options(folder)) == (
        f"model_name_or_path: {folder} needs its own Python code (auto_map in config.json), which is not run by default; "
        "read the code, and if you trust it, set trust_remote_code: true."
    )
    refusal(load_model, options(folder))
    # A config of a family that has no causal LM of its own.
    change(folder / "config.json", model_type="clip")
    refusal(load_model_config, options(folder))
    assert not terminal_questions and not mark.exists()
    change(folder / "config.json", model_type="llama", vision_config={"auto_map": {"AutoModel": "code.C"}})
    assert "needs its own Python code" in refusal(load_model_config, options(folder))


def test_code_of_a_family_that_transformers_has_is_passed_over(folder, tiny, mark, terminal_questions):
    """Phi-4-mini, for one, still names its own; to refuse it would be to urge people to run it."""
    payload(folder, mark, "config.json", "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    payload(folder, mark, "tokenizer_config.json", "AutoTokenizer")
    model = load_model(options(folder))
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert build_model(load_model_config(options(folder)), options(folder)).num_parameters()
    assert configured_tokenizer(options(folder)).get_vocab() == configured_tokenizer(options(tiny)).get_vocab()
    assert not terminal_questions and not mark.exists()


def test_code_is_run_with_the_flag(folder, mark):
    payload(folder, mark, "config.json", "AutoConfig")
    change(folder / "config.json", model_type="strange")
    with pytest.raises(ConfigError):
        load_model_config(options(folder, trust_remote_code=True))
    assert mark.exists()


def test_code_that_a_tokenizer_needs_is_refused_unasked(folder, mark, terminal_questions):
    payload(folder, mark, "tokenizer_config.json", "AutoTokenizer")
    change(folder / "tokenizer_config.json", tokenizer_class="StrangeTokenizer")
    change(folder / "config.json", model_type="strange")
    assert refusal(load_tokenizer, str(folder)) == (
        f"tokenizer_name: {folder} needs its own Python code (auto_map in tokenizer_config.json), which is not run by "
        "default; read the code, and if you trust it, set trust_remote_code: true."
    )
    assert not terminal_questions and not mark.exists()


def test_the_class_of_a_tokenizer_is_one(folder, mark, terminal_questions):
    payload(folder, mark, "config.json", "AutoModel")
    change(folder / "config.json", model_type="strange")
    change(folder / "tokenizer_config.json", tokenizer_class="AutoModel")
    assert refusal(load_tokenizer, str(folder)) == (
        f"tokenizer_name: {folder} has 'AutoModel' as its tokenizer_class, which is not a tokenizer."
    )
    change(folder / "tokenizer_config.json", tokenizer_class="utils")
    refusal(load_tokenizer, str(folder))
    change(folder / "tokenizer_config.json", tokenizer_class=None)
    change(folder / "config.json", tokenizer_class="AutoModel")
    refusal(load_tokenizer, str(folder))
    assert not terminal_questions and not mark.exists()


def test_no_other_config_or_tokenizer_outside_is_read(folder):
    for field, file, act in (
        ("configuration_files", "config.json", load_model_config),
        ("fast_tokenizer_files", "tokenizer_config.json", configured_tokenizer),
    ):
        change(folder / file, **{field: ["config.4.0.0.json", "../tokenizer.4.0.json"]})
        assert f"{folder} names '../tokenizer.4.0.json' in its {file};" in refusal(act, options(folder))
        change(folder / file, **{field: []})
    # transformers 5.23 reads no other vocabulary than the folder's, whatever the file says.
    change(folder / "tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/etc/passwd")
    assert configured_tokenizer(options(folder)).get_vocab()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"]
)
def test_a_kernel_that_a_config_names_is_passed_over(folder, key):
    change(folder / "config.json", **{key: "o/kernel"})
    loaded = [
        load_model(options(folder)),
        load_complete_model(str(folder), "model"),
        build_model(load_model_config(options(folder)), options(folder)),
    ]
    assert {model.config._attn_implementation for model in loaded} == {"padded", "sdpa"}
    eager_model = load_model(options(folder, attn_implementation="eager"))
    assert eager_model.config._attn_implementation == "eager"
    if key != "_attn_implementation_internal":
        with pytest.raises((ImportError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_kernel_for_a_part_of_a_model_is_passed_over():
    config = Gemma3Config(attn_implementation={"": "sdpa", "text_config": "o/kernel"})
    assert config.text_config._attn_implementation == "o/kernel"
    # transformers 5.23 does this with an argument that it gets beside a config.
    config._attn_implementation = OWN_IMPLEMENTATIONS["attn_implementation"]
    assert config.text_config._attn_implementation is None


def test_a_broken_config_json_is_reported_in_one_sentence(folder):
    for text in ("[" * 100_000, "[]", "7", '{"auto_map": 7}', '{"model_type": []}', '{"transformers_weights": [1]}'):
        (folder / "config.json").write_text(text, encoding="utf-8")
        refusal(load_model_config, options(folder))
        refusal(load_model, options(folder))


def test_chat_reads_a_pickle_with_the_flag_alone(folder, script, capsys):
    as_pickle(folder)
    asks = ["--model", folder, "--prompt", "Hi", "--max_new_tokens", 2]
    assert "set allow_pickle: true" in refusal(script, "chat", *asks)
    script("chat", *asks, "--allow_pickle")
    assert capsys.readouterr().out


# Recipes


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.mkdir [MARK]",
        "seed: !!python/object/new:os.mkdir [MARK]",
        "seed: !!python/name:os.mkdir",
        "? !!python/object/apply:os.mkdir [MARK]\n: 1",
        "chat_template_kwargs: '{a: !!python/object/apply:os.mkdir [MARK]}'",
    ],
)
def test_a_tag_of_python_in_a_recipe_is_refused(tmp_path, mark, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("MARK", str(mark)), encoding="utf-8")
    sentence = refusal(parse_options, Options, ["--config", str(recipe), "--model_name_or_path", "o/n"])
    assert sentence.startswith(
        (f"config: {recipe}, line 1, is not YAML: could not determine", "chat_template_kwargs: ")
    )
    assert not mark.exists()


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, f"it is more than {MAX_YAML_CHARACTERS:,} characters long"),
        (
            BOMB.replace("[x, x]", "{x: 1}") + "seed: {<<: [*a5, *a5]}",
            f"it is more than {MAX_YAML_CHARACTERS:,} characters long",
        ),
        ("seed: &a [*a]", f"it is more than {MAX_YAML_CHARACTERS:,} characters long"),
        ("seed: 1\n" * (1 << 20), f"it is more than {MAX_YAML_CHARACTERS:,} characters long"),
        ("seed: " + "[" * 5000, "its values are nested too deep"),
        ("seed: 2024-99-99", "month must be in 1..12"),
        ("seed: " + "1" * 5000, "Exceeds the limit"),
    ],
)
def test_a_recipe_out_of_all_proportion_is_refused(tmp_path, text, reason):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    assert refusal(parse_options, Options, ["--config", str(recipe)]).startswith(
        f"config: {recipe} cannot be read: {reason}"
    )


def test_aliases_of_a_sensible_recipe_are_understood(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_files: &files [a.jsonl]\neval_files: *files\nmodel_name_or_path: o/n\n", encoding="utf-8")
    assert parse_options(Options, ["--config", str(recipe)]).eval_files == ["a.jsonl"]


# Data


def test_data_that_is_a_program_is_never_run(tmp_path, mark):
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Payload(mark)))
    (tmp_path / "rows.jsonl").write_bytes(pickle.dumps(Payload(mark), 0))
    script = tmp_path / "code.py"
    script.write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    for name, reason in (
        ("rows.pkl", "is of kind '.pkl'"),
        ("code.py", "is of kind '.py'"),
        ("rows.jsonl", "line 1: not "),
    ):
        assert reason in refusal(lambda name=name: list(read_source(Source(path=str(tmp_path / name)))))
    with pytest.raises(RuntimeError, match=r"Dataset scripts are no longer supported"):
        datasets.load_dataset(str(script))
    assert not mark.exists()


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, '{"a": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_json_that_python_cannot_hold_is_a_sentence(tmp_path, text, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_text(text, encoding="utf-8")
    assert f"{path}, line 1: not JSON (" in refusal(lambda: list(read_source(Source(path=str(path)))))


def test_a_saved_dataset_reads_its_own_files(tmp_path):
    secret, dataset = tmp_path / "secret", tmp_path / "saved"
    datasets.Dataset.from_list([{"text": "secret"}]).save_to_disk(secret)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "own"}])}).save_to_disk(dataset)
    assert [row.fields for row in read_source(Source(path=str(dataset)))] == [{"text": "own"}]
    state = dataset / "train" / "state.json"
    name = json.loads((secret / "state.json").read_text(encoding="utf-8"))["_data_files"][0]["filename"]
    for outside in (f"../../secret/{name}", str(secret / name), f"x/../../../secret/{name}"):
        change(state, _data_files=[{"filename": outside}])
        assert refusal(lambda: list(read_source(Source(path=str(dataset))))) == (
            f"{state} names {outside!r}; only files of its own folder are allowed."
        )
    change(state, _data_files=[{"filename": f"../../secret/{name}"}])
    assert datasets.load_from_disk(str(dataset))["train"][0] == {"text": "secret"}


def test_a_hub_dataset_reads_files_of_the_hub(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("a key", encoding="utf-8")
    # datasets 5.2 resolves a file name in the README of a repository to this URL.
    urls = resolve_pattern(str(own), "hf://datasets/o/n@main")
    assert urls == [str(own)] and file_outside_hub(urls) == str(own)
    inside = ["hf://datasets/o/n@main/a.parquet", "zip://a.csv::hf://datasets/o/n@main/a.zip"]
    assert file_outside_hub(inside) is None
    assert file_outside_hub([*inside, "https://h/a.csv"]) == "https://h/a.csv"
