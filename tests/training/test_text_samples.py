"""Samples of a pretraining: plain transformers continues the same texts in the same way; what is shown and kept."""

import json

import pytest
import torch
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_llm.config.command_line import parse_options
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError

STORIES = ROOT.parent / "shared" / "data" / "weights" / "stories260K_hf"


def test_samples_are_the_greedy_texts_of_plain_transformers(script, tmp_path, capsys):
    if not STORIES.is_dir():
        pytest.skip("no ../shared")
    (tmp_path / "t.jsonl").write_text('{"text": "Once upon a time there was a dog."}\n' * 20, encoding="utf-8")
    prompts = ("One day, a little", "Once upon a time, there was a")
    words = ("--model_name_or_path", STORIES, "--train_files", tmp_path / "t.jsonl", "--max_length", 64)
    words += ("--max_steps", 4, "--learning_rate", 1e-3, "--sample_text", *prompts, "--sample_steps", 2)
    script("pretrain", *words, "--sample_tokens", 20, "--output_dir", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4]

    # After the last step the export has the weights.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    for prompt, answer in zip(prompts, lines[1]["answers"], strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        text = tokenizer.decode(whole[0], skip_special_tokens=True)
        assert answer["prompt"] == prompt and prompt + answer["generated"].removesuffix("</s>") == text
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Once upon a time, there was a" in page and "step 2" in page
    said = capsys.readouterr().out
    assert said.count("text at 2:") == said.count("text at 4:") == 2


def test_the_beginning_of_a_text_may_be_empty(script, tiny, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Some text to learn."}\n' * 8, encoding="utf-8")
    words = ("--model_name_or_path", tiny, "--train_files", tmp_path / "t.jsonl", "--max_length", 64)
    script("pretrain", *words, "--max_steps", 1, "--sample_text", "", "--output_dir", tmp_path / "out")
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text("utf-8").splitlines()]
    assert line["step"] == 1 and [answer["prompt"] for answer in line["answers"]] == [""]
    assert line["answers"][0]["generated"]


def test_how_often_without_what_is_refused():
    words = ["--config_name", "x", "--train_files", "x.txt", "--sample_steps", "5"]
    with pytest.raises(ConfigError, match=r"^sample_steps: 5 has no text to continue; give sample_text too\.$"):
        parse_options(PretrainOptions, words, PretrainOptions.script_defaults)
