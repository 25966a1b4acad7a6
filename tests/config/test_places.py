"""Options that are files, folders or names of models: `~` is expanded once, in every script and every spelling."""

import re

import pytest

from accel_llm.config.command_line import parse_options, resolved_options
from accel_llm.config.options import SftOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.config.tool_options import (
    ChatOptions,
    ExportOptions,
    ExtractOptions,
    MergeOptions,
    PredictOptions,
    ShowOptions,
)
from accel_llm.errors import ConfigError


class Show(ShowOptions, SftOptions):
    """Script"""


TRAINING = ["model_name_or_path", "tokenizer_name", "adapter_name_or_path", "output_dir", "resume_from_checkpoint"]
TRAINING += ["train_files", "eval_files", "chat_template", "cache_dir"]
PLACES: dict[type, list[str]] = {
    SftOptions: TRAINING,
    Show: TRAINING,
    PretrainOptions: [*(name for name in TRAINING if name != "chat_template"), "config_name"],
    MergeOptions: ["adapter", "output_dir", "base"],
    ExtractOptions: ["model", "base", "output_dir"],
    ExportOptions: ["model", "base", "output_dir"],
    ChatOptions: ["model", "adapters", "base", "chat_template"],
    PredictOptions: ["model", "base", "chat_template", "input_files", "output_file"],
}
REQUIRED: dict[type, dict[str, str]] = {
    PretrainOptions: {"config_name": "c"},
    MergeOptions: {"adapter": "a", "output_dir": "o"},
    ExtractOptions: {"model": "m", "base": "b", "output_dir": "o"},
    ExportOptions: {"model": "m", "output_dir": "o"},
    ChatOptions: {"model": "m"},
    PredictOptions: {"model": "m", "input_files": "i", "output_file": "o"},
}
CASES = [(script, name) for script, names in PLACES.items() for name in names]


def read(script: type, name: str, *words: str):
    """Parse the option `name`, together with the other required options."""
    others = {other: value for other, value in REQUIRED.get(script, {}).items() if other != name}
    if name == "model_name_or_path":
        others.pop("config_name", None)
    line = [word for other, value in others.items() for word in (f"--{other}", value)]
    options = parse_options(script, [*line, *words])
    value = resolved_options(options)[name]
    return value[0] if isinstance(value, list) else value


def test_every_option_that_is_described_as_a_place_is_tested():
    said = re.compile(r"[Ff]older|\bfiles?\b|hub id|[Aa]dapter to train|Base model of|[Dd]ata:|Evaluation data|\.jinja")
    for script, names in PLACES.items():
        described = {name for name, field in script.model_fields.items() if said.search(str(field.description))}
        others = {"max_shard_size", "allow_pickle", "push_to_hub", "verify", "overwrite_output_dir", "row", "sample_by"}
        others |= {"trust_remote_code", "run_name", "chat_template"}  # pretraining has no turns
        assert described - others <= set(names), script


@pytest.mark.parametrize(("script", "name"), CASES)
@pytest.mark.parametrize("rest", ["/a b/日本#[x].jsonl", "/x/", ""])
def test_the_home_folder_is_expanded_in_every_spelling(script, name, rest, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path) + rest.rstrip("/")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: '~{rest}'\n", encoding="utf-8")
    assert read(script, name, f"--{name}=~{rest}") == expected
    assert read(script, name, f"--{name}", f"~{rest}") == expected
    assert read(script, name, "--config=~/recipe.yaml") == expected


@pytest.mark.parametrize(("script", "name"), CASES)
def test_any_other_name_is_left_as_it_is(script, name):
    for value in ("./~", "a~", "-dash", "$HOME/x", "out/", "x" * 300, "a\nb", "'\"", "%s"):
        assert read(script, name, f"--{name}", value) == value


@pytest.mark.parametrize(("script", "name"), CASES)
@pytest.mark.parametrize("value", ["", "a\0b"])
def test_no_name_and_an_impossible_one_are_refused(script, name, value):
    if name in ("train_files", "eval_files", "input_files") and not value:
        return  # data/sources.py reports it with the kinds of sources
    with pytest.raises(ConfigError) as error:
        read(script, name, f"--{name}={value}")
    (sentence,) = error.value.problems
    assert sentence.startswith(f"{name}: {value!r} ") and sentence.endswith(".") and "\n" not in sentence


def test_a_source_with_settings_is_a_place_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse_options(SftOptions, ["--train_files", "{path: ~/a.jsonl, limit_rows: 3}", "~/b.jsonl"])
    assert [getattr(s, "path", s) for s in options.train_files] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]


def test_words_that_are_no_places_keep_their_meaning():
    assert parse_options(SftOptions, ["--resume_from_checkpoint", "none"]).resume_from_checkpoint == "none"
    assert parse_options(SftOptions, ["--chat_template", "chatml"]).chat_template == "chatml"
    assert parse_options(SftOptions, ["--tokenizer_name", "none"]).tokenizer_name is None
    assert parse_options(SftOptions, ["--train_files", "-"]).train_files == ["-"]
