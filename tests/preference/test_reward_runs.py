"""Runs of launch/reward.py: plain transformers and PEFT give the rewards of the run, before and after merging."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from support import ROOT, Stopped, equal_tensors, metrics, run_json, weights
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.config.tool_options import ChatOptions
from accel_llm.demo.skills import demo_conversations
from accel_llm.errors import ConfigError
from accel_llm.merge.dialogues import open_dialogues
from accel_llm.merge.merge import merge_adapter

STEPS, STOP = 6, 3
Reward = Callable[..., Path]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> tuple[Path, Path]:
    """Pairs of which the chosen answer is right and the rejected one that of another question; some have a margin."""
    folder = tmp_path_factory.mktemp("preferences")
    rows = []
    conversations = [row["messages"] for row in demo_conversations("train")[:40]]
    for k, messages in enumerate(conversations):
        wrong = conversations[k - 1][-1]["content"] + " no"
        row = {"messages": messages, "rejected_response": wrong}
        rows.append(row | ({"margin": 0.5} if k % 2 else {}))
    for name, part in (("train", rows[:28]), ("eval", rows[28:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture
def reward(script, tiny, preferences, tmp_path_factory) -> Reward:
    def run(folder: Path, *more: object) -> Path:
        train, evaluation = preferences
        words = ["--model_name_or_path", tiny, "--train_files", train, "--eval_files", evaluation, "--max_length", 256]
        words += ["--max_steps", STEPS, "--logging_steps", 1, "--save_steps", STOP, "--learning_rate", 1e-2]
        words += ["--cache_dir", tmp_path_factory.getbasetemp() / "preferences", "--output_dir", folder]
        script("reward", *words, *more)
        return folder

    return run


def plain_rewards(model, folder: Path, preferences: tuple[Path, Path]) -> dict[str, float]:
    """What plain transformers gives for the rows to evaluate on, in one padded batch of chosen and of rejected answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in preferences[1].read_text(encoding="utf-8").splitlines()]
    chosen = [row["messages"] for row in rows]
    rejected = [[*row["messages"][:-1], {"role": "assistant", "content": row["rejected_response"]}] for row in rows]
    means, scores = {}, []
    for side in (chosen, rejected):
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in side]
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        assert batch["attention_mask"].min() == 0
        with torch.no_grad():
            scores.append(model.eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, 0].double())
    means = {"chosen": float(scores[0].mean()), "rejected": float(scores[1].mean())}
    return means | {"accuracies": float((scores[0] > scores[1]).double().mean())}


def measured(folder: Path) -> dict[str, float]:
    last = [line for line in metrics(folder) if "eval/loss" in line][-1]
    return {name: last[f"eval/rewards/{name}"] for name in ("chosen", "rejected", "accuracies")}


def load_peft(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    assert config.pad_token_id == AutoTokenizer.from_pretrained(folder).pad_token_id and config.num_labels == 1
    settings = {"num_labels": 1, "pad_token_id": config.pad_token_id}
    return AutoPeftModelForSequenceClassification.from_pretrained(folder, **settings)


def test_an_adapter_gives_the_same_rewards_in_plain_peft_and_merged(reward, preferences, script, tiny, tmp_path, capfd):
    run = reward(tmp_path / "run", "--method", "lora", "--per_device_train_batch_size", 2)
    ours, screen = measured(run), capfd.readouterr().out
    assert re.search(r"head: score new, with first values by the seed \(1 score for a text\)", screen)
    # The command names the pad token: the base may pad with the token that texts end with, and have another score taken.
    pad = AutoTokenizer.from_pretrained(run / "adapter").pad_token_id
    assert re.search(rf"AutoPeftModelForSequenceClassification.*num_labels=1, pad_token_id={pad}\)", screen)
    assert "chat.py" not in screen
    assert plain_rewards(load_peft(run / "adapter"), run / "adapter", preferences) == pytest.approx(ours, abs=1e-5)
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert run_json(run)["export"]["logits"]["relative_error"] < 1e-4

    merged = merge_adapter(run, tmp_path / "merged", verify="logits").folder
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert (model.config.num_labels, model.config.problem_type, model.config.id2label) == (
        1,
        "regression",
        {0: "reward"},
    )
    assert plain_rewards(model, merged, preferences) == pytest.approx(ours, abs=1e-5)
    score = pipeline("text-classification", str(merged))("Hi")
    assert score[0]["label"] == "reward"
    with pytest.raises(ConfigError, match=r"adapter_name_or_path: .*whose head gives scores and no answers"):
        script("sft", "--adapter_name_or_path", run, "--model_name_or_path", tiny, "--train_files", preferences[0])
    for place in (run, merged):
        with pytest.raises(ConfigError, match="gives scores and no answers"):
            open_dialogues(ChatOptions(model=str(place), prompt="Hi"))


@pytest.mark.long
def test_a_base_that_pads_with_the_token_of_every_end(reward, preferences, make_model, tmp_path):
    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.eos_token
    tokenizer.pad_token = end
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + end + "' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}), encoding="utf-8")

    run = reward(tmp_path / "run", "--model_name_or_path", base, "--method", "lora")
    assert AutoConfig.from_pretrained(run / "adapter").pad_token_id != tokenizer.eos_token_id
    ours = pytest.approx(measured(run), abs=1e-5)
    assert plain_rewards(load_peft(run / "adapter"), run / "adapter", preferences) == ours
    # With the base's own pad token the reward is taken one token too early.
    other = AutoPeftModelForSequenceClassification.from_pretrained(run / "adapter", num_labels=1)
    assert other.config.pad_token_id == tokenizer.eos_token_id
    assert plain_rewards(other, run / "adapter", preferences) != ours


@pytest.mark.long
def test_a_whole_model_gives_the_same_rewards_and_keeps_its_head(reward, preferences, script, tmp_path, capfd):
    run = reward(tmp_path / "run", "--method", "full", "--learning_rate", 1e-3, "--packing", "false")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert plain_rewards(model, run / "model", preferences) == pytest.approx(measured(run), abs=1e-5)
    assert not (run / "model" / "generation_config.json").exists()

    # Trained further: the head is kept.
    capfd.readouterr()
    again = reward(tmp_path / "again", "--model_name_or_path", run / "model", "--eval_on_start", "--max_steps", 1)
    assert "head: score of the model's files" in capfd.readouterr().out
    first = next(line for line in metrics(again) if "eval/loss" in line)
    assert first["eval/rewards/chosen"] == pytest.approx(measured(run)["chosen"], abs=1e-5)

    with pytest.raises(ConfigError, match="model is a reward model or a classifier"):
        script("sft", "--model_name_or_path", run / "model", "--train_files", preferences[0], "--max_steps", 1)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_a_resumed_run_is_bit_equal_with_its_head(reward, tmp_path, monkeypatch, method):
    rate = ("--method", method, "--learning_rate", 1e-3 if method == "full" else 1e-2, "--save_total_limit", 9)
    whole = reward(tmp_path / "whole", *rate)
    when_due = Checkpoints.when_due

    def stop(self, meter, evaluation, bad_steps, step):
        when_due(self, meter, evaluation, bad_steps, step)
        if step == STOP:
            raise Stopped("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "when_due", stop)
        with pytest.raises(Stopped):
            reward(tmp_path / "run", *rate)
    resumed = reward(tmp_path / "run", *rate)
    assert equal_tensors(weights(resumed), weights(whole))
    file = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    head = next(name for name in load_file(whole / file) if "score" in name)
    assert torch.equal(load_file(resumed / file)[head], load_file(whole / file)[head])
    assert measured(resumed) == measured(whole)


@pytest.mark.long
def test_an_adapter_on_a_4_bit_base_gives_the_same_rewards_merged(reward, preferences, tmp_path):
    run = reward(tmp_path / "run", "--method", "qlora")
    merged = merge_adapter(run, tmp_path / "merged", merge_base="dequantized").folder
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert plain_rewards(model, merged, preferences) == pytest.approx(measured(run), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", ["ia3", "oft", "vera", "ln_tuning", "freeze"])
def test_other_methods_train_the_head_too(reward, preferences, tmp_path, method):
    more = ("--method_options", "layers=1") if method == "freeze" else ()
    run = reward(tmp_path / "run", "--method", method, *more)
    assert run_json(run)["status"] == "done"
    folder = run / ("model" if method == "freeze" else "adapter")
    load = AutoModelForSequenceClassification.from_pretrained if method == "freeze" else load_peft
    assert plain_rewards(load(folder), folder, preferences) == pytest.approx(measured(run), abs=1e-4)


@pytest.mark.long
def test_two_processes_train_as_one_under_every_launch_yaml(tmp_path):
    command = [sys.executable, "tests/proofs/rewards.py", "--work", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    assert process.stdout.count(": same") == 20
