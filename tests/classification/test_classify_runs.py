"""Runs of launch/classify.py: plain transformers and PEFT give the scores of the run; heads survive; bad input is said."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import Stopped, equal_tensors, metrics, run_json, weights
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.errors import ConfigError, DataError

Classify = Callable[..., Path]
LORA = ("--method", "lora", "--lora_target_modules", "query", "value")
NAMES = ["negative", "positive"]


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def plain_scores(model: Any, folder: Path, file: Path) -> torch.Tensor:
    """What plain transformers gives for each text of a file alone, float64 [rows, classes]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        scores = [model.eval()(**tokenizer(row["sentence"], return_tensors="pt")).logits for row in read_rows(file)]
    return torch.cat(scores).double()


def plain_metrics(model: Any, folder: Path, file: Path) -> dict[str, float]:
    scores = plain_scores(model, folder, file)
    targets = torch.tensor([NAMES.index(row["label"]) for row in read_rows(file)])
    accuracy = float((scores.argmax(-1) == targets).double().mean())
    return {"eval/loss": float(F.cross_entropy(scores, targets)), "eval/accuracy": accuracy}


def measured(folder: Path) -> dict[str, float]:
    last = [line for line in metrics(folder) if "eval/loss" in line][-1]
    return {name: last[name] for name in ("eval/loss", "eval/accuracy")}


def load_peft(run: Path, base: Path) -> PeftModel:
    config = AutoConfig.from_pretrained(run / "adapter")
    return PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, config=config), str(run / "adapter")
    )


def test_an_adapter_gives_the_same_scores_in_plain_peft_and_off_it_is_the_base(
    classify, bert, reviews, tmp_path, capfd
):
    run = classify(tmp_path / "run", *LORA)
    screen = capfd.readouterr().out
    assert "head: bert.pooler, classifier new, with first values by the seed (2 scores for a text)" in screen
    assert "predict.py --model" in screen and "merge.py --adapter" in screen and "chat.py" not in screen
    model = load_peft(run, bert)
    ours = measured(run)
    assert plain_metrics(model, run / "adapter", reviews[1]) == pytest.approx(ours, abs=1e-5)

    # The labels have their names, and the head is in the adapter, pooler included.
    config = AutoConfig.from_pretrained(run / "adapter")
    assert config.id2label == {0: "negative", 1: "positive"} and config.problem_type == "single_label_classification"
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["bert.pooler", "classifier"])
    assert sorted(settings["target_modules"]) == ["query", "value"]
    assert run_json(run)["export"]["logits"]["relative_error"] < 1e-4

    # Switched off, the encoder is the base again, bit for bit.
    text = AutoTokenizer.from_pretrained(bert)("the film was good", return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    with torch.no_grad(), model.disable_adapter():
        off = model.get_base_model().bert(**text).last_hidden_state
    assert torch.equal(off, base.eval().bert(**text).last_hidden_state)
    with torch.no_grad():
        assert not torch.equal(model.get_base_model().bert(**text).last_hidden_state, off)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_whole_model_is_that_of_plain_transformers(classify, reviews, tmp_path, packing):
    more = ("--packing", packing, "--per_device_train_batch_size", 1 if packing == "true" else 8)
    run = classify(tmp_path / "run", "--method", "full", "--learning_rate", 1e-3, *more)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert plain_metrics(model, run / "model", reviews[1]) == pytest.approx(measured(run), abs=1e-5)
    assert not (run / "model" / "generation_config.json").exists()
    answer = pipeline("text-classification", str(run / "model"))("the plot was great")
    scores = plain_scores(model, run / "model", reviews[1])
    assert answer[0]["label"] in NAMES and scores.shape[1] == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_score_the_last_real_token(classify, bert, reviews, tmp_path, family):
    tokenizer, base = AutoTokenizer.from_pretrained(bert), tmp_path / family
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None}
    if family == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**ids, **shape)).save_pretrained(base)
    else:
        GPT2LMHeadModel(GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(base)
    # The token that ends each text is the pad token too, as in many tokenizers of decoders.
    tokenizer.pad_token = tokenizer.sep_token
    tokenizer.save_pretrained(base)
    run = classify(tmp_path / "run", "--model_name_or_path", base, "--method", "lora", "--packing", "false",
                   "--per_device_train_batch_size", 4)  # fmt: skip
    packed = classify(tmp_path / "packed", "--model_name_or_path", base, "--method", "lora")
    for each in (run, packed):
        assert plain_metrics(load_peft(each, base), each / "adapter", reviews[1]) == pytest.approx(
            measured(each), abs=1e-5
        )
        assert AutoConfig.from_pretrained(each / "adapter").pad_token_id != 3


def stop_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    when_due = Checkpoints.when_due

    def stop(self: Any, meter: Any, evaluation: Any, bad_steps: Any, step: int) -> None:
        when_due(self, meter, evaluation, bad_steps, step)
        if step == last:
            raise Stopped("the power went")

    monkeypatch.setattr(Checkpoints, "when_due", stop)


@pytest.mark.parametrize(
    "more",
    [
        (*LORA, "--lora_dropout", 0.1),
        pytest.param(("--method", "full", "--learning_rate", 1e-3), marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_bit_equal_with_its_head(classify, tmp_path, monkeypatch, more):
    whole = classify(tmp_path / "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        classify(tmp_path / "run", *more)
    resumed = classify(tmp_path / "run", *more)
    assert equal_tensors(weights(resumed), weights(whole)) and measured(resumed) == measured(whole)
    file = "adapter/adapter_model.safetensors" if "lora" in more else "model/model.safetensors"
    assert any("pooler" in name for name in load_file(whole / file))
    assert equal_tensors(load_file(resumed / file), load_file(whole / file))


def test_an_adapter_is_trained_further_with_its_labels_and_refused_without_its_head(classify, reviews, tmp_path, capfd):
    first = classify(tmp_path / "first", *LORA)
    # The other way round in the file, and only one label in the first rows: the numbers of the classes stay.
    rows = read_rows(reviews[0])[::-1]
    rows.sort(key=lambda row: row["label"] == "negative")
    file = tmp_path / "more.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows))
    words = ("--adapter_name_or_path", first, "--train_files", file, "--eval_on_start", "--max_steps", 1)
    again = classify(tmp_path / "again", *words)
    start = next(line for line in metrics(again) if "eval/loss" in line)
    assert start["eval/loss"] == pytest.approx(measured(first)["eval/loss"], abs=1e-6)
    assert AutoConfig.from_pretrained(again / "adapter").id2label == {0: "negative", 1: "positive"}

    # A label that it does not know.
    file.write_text("sentence\tlabel\nthe film\tpositive\nthe plot\tneutral\n")
    with pytest.raises(DataError, match=r'found "neutral", which is unknown; known are negative, positive'):
        classify(tmp_path / "unknown", *words)

    # Without its head it would go on with a random one.
    place = first / "adapter" / "adapter_model.safetensors"
    tensors = load_file(place)
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, place, {"format": "pt"})
    with pytest.raises(
        ConfigError,
        match=r"adapter_name_or_path: .*its file has no base_model.model.classifier.weight, a part of its head",
    ):
        classify(tmp_path / "headless", "--adapter_name_or_path", first, "--max_steps", 1)


@pytest.mark.long
def test_the_head_of_a_classifier_is_trained_further(classify, tmp_path, capfd):
    first = classify(tmp_path / "first", "--method", "full", "--learning_rate", 1e-3)
    capfd.readouterr()
    again = classify(tmp_path / "again", "--model_name_or_path", first / "model", "--eval_on_start", "--max_steps", 1)
    assert "head: bert.pooler, classifier of the model's files" in capfd.readouterr().out
    start = next(line for line in metrics(again) if "eval/loss" in line)
    assert start["eval/loss"] == pytest.approx(measured(first)["eval/loss"], abs=1e-6)
    with pytest.raises(ConfigError, match=r"problem_type: multi_label_classification is given, but the head of"):
        classify(tmp_path / "other", "--model_name_or_path", first / "model", "--problem_type", "multi_label")


def test_options_that_do_not_fit_the_labels_are_refused(classify, tmp_path):
    for words, message in (
        (
            ("--class_weights", "1", "2", "3"),
            "class_weights: 3 weights do not fit 2 classes; give one for each of negative",
        ),
        (("--metric_for_best_model", "eval/mse"), "metric_for_best_model: eval/mse is not computed for single_label"),
        (("--problem_type", "regression"), "regression needs a number"),
        (("--eval_generate", "3"), "eval_generate: a classifier learns the label of a whole text"),
        (("--method", "prompt"), "method: prompt trains virtual tokens, whose file has no place for the head"),
        (("--class_weights", "-1", "2"), "class_weights: -1.0 is negative"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            classify(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_balanced_weights_are_those_of_scikit_learn(classify, reviews, tmp_path, capfd):
    from sklearn.utils.class_weight import compute_class_weight

    labels = [row["label"] for row in read_rows(reviews[0])]
    expected = compute_class_weight("balanced", classes=np.array(NAMES), y=labels)
    classify(tmp_path / "run", *LORA, "--class_weights", "balanced", "--max_steps", 1)
    text = f"Weights of the classes in the loss: negative {expected[0]:.4g}, positive {expected[1]:.4g}."
    assert text in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("several.jsonl", '{{"text": "{a}", "labels": ["x", "y"]}}\n{{"text": "{b}", "labels": []}}\n', ["x", "y"]),
        ("numbers.csv", "text,label\n{a},0.25\n{b},1.75\n", ["score"]),
        ("pairs.csv", "sentence1,sentence2,label\n{a},{b},entailed\n{b},{a},not\n", ["entailed", "not"]),
    ],
)
def test_several_labels_numbers_and_pairs(classify, tmp_path, name, content, labels):
    file = tmp_path / name
    body = content.format(a="the film was good", b="a dull plot")
    head, *rows = body.splitlines(keepends=True)
    file.write_text("".join([head, *rows * 8] if name.endswith(".csv") else [head, *rows] * 8))
    run = classify(tmp_path / "run", *LORA, "--train_files", file, "--eval_files", file, "--packing", "false",
                   "--per_device_train_batch_size", 16, "--learning_rate", 1e-3)  # fmt: skip
    config = AutoConfig.from_pretrained(run / "adapter")
    assert list(config.id2label.values()) == labels
    lines = [line for line in metrics(run) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.long
@pytest.mark.parametrize("method", ["qlora", "ia3", "oft", "vera", "ln_tuning", "freeze", "bitfit"])
def test_other_methods_train_the_head_too(classify, bert, reviews, tmp_path, method):
    run = classify(tmp_path / "run", "--method", method, *(("--method_options", "layers=1") * (method == "freeze")))
    assert run_json(run)["status"] == "done"
    if method == "qlora":
        return
    whole = method in ("freeze", "bitfit")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model") if whole else load_peft(run, bert)
    folder = run / ("model" if whole else "adapter")
    assert plain_metrics(model, folder, reviews[1]) == pytest.approx(measured(run), abs=1e-4)


def test_an_adapter_of_all_layers_is_trained_further_without_a_new_head(classify, tmp_path, capfd):
    first = classify(tmp_path / "first", "--method", "lora")
    settings = json.loads((first / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert not [name for name in settings["target_modules"] if "pooler" in name or "classifier" in name]
    capfd.readouterr()
    again = classify(tmp_path / "again", "--adapter_name_or_path", first, "--eval_on_start", "--max_steps", 1)
    assert "head:" not in capfd.readouterr().out
    start = next(line for line in metrics(again) if "eval/loss" in line)
    assert start["eval/loss"] == pytest.approx(measured(first)["eval/loss"], abs=1e-6)


@pytest.mark.long
def test_adalora_adds_its_penalty_once_for_each_text(classify, bert, reviews, tmp_path):
    run = classify(tmp_path / "run", "--method", "adalora", "--max_steps", 20, "--logging_steps", 20)
    assert plain_metrics(load_peft(run, bert), run / "adapter", reviews[1]) == pytest.approx(measured(run), abs=1e-4)
    whole = classify(tmp_path / "whole", "--method", "adalora", "--max_steps", 20, "--logging_steps", 1,
                     "--packing", "false", "--total_batch_size", 4)  # fmt: skip
    cut = classify(tmp_path / "cut", "--method", "adalora", "--max_steps", 20, "--logging_steps", 1,
                   "--packing", "false", "--per_device_train_batch_size", 4)  # fmt: skip
    losses = [next(line["loss"] for line in metrics(each) if "loss" in line) for each in (whole, cut)]
    assert losses[0] > 1 and losses[0] == pytest.approx(losses[1], abs=0.05)  # dropout draws other numbers


def test_a_reward_model_is_no_classifier(classify, bert, tmp_path):
    config = AutoConfig.from_pretrained(bert, num_labels=1, id2label={0: "reward"}, label2id={"reward": 0})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "reward")
    with pytest.raises(
        ConfigError, match=r"model_name_or_path: .* is a reward model; train it further with launch/reward.py"
    ):
        classify(tmp_path / "run", "--model_name_or_path", tmp_path / "reward")


def test_texts_are_cut_in_prediction_as_in_training(classify, bert, reviews, script, tmp_path, capfd):
    cut = ("--max_length", 6, "--overlong", "truncate", "--packing", "false", "--per_device_train_batch_size", 8)
    run = classify(tmp_path / "run", "--method", "full", "--learning_rate", 1e-3, *cut)
    assert "0 rows and 0 tokens cut" not in (screen := capfd.readouterr().out) and "tokens cut: longer than" in screen
    words = ("--model", run, "--input_files", reviews[1], "--output_file", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"at most 6 are allowed \(max_length of its training\); overlong: truncate"):
        script("predict", *words)
    script("predict", *words, "--overlong", "truncate")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = [row["predicted_label"] == row["label"] for row in rows]
    assert sum(right) / len(right) == pytest.approx(measured(run)["eval/accuracy"], abs=1e-9)
    # Plain transformers cuts there too.
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert len(tokenizer("the film was good and the plot was not bad", truncation=True)["input_ids"]) == 6


def test_rows_to_evaluate_on_are_not_lost_without_a_word(classify, tmp_path):
    file = tmp_path / "long.tsv"
    file.write_text(
        "sentence\tlabel\n" + "the film was good\tpositive\nthe plot\tnegative\n" * 9 + "good " * 80 + "\tpositive\n"
    )
    with pytest.raises(ConfigError, match=r"max_lost: 5.3% of the rows to evaluate on would be lost; allowed is 1.0%"):
        classify(tmp_path / "run", "--eval_files", file)


@pytest.mark.parametrize(
    ("metric", "rows", "reason"),
    [
        ("eval/auc", "the film\tpositive\n", "the same label in all rows"),
        ("eval/mcc", "the film\tnegative\n", "the same label in all rows"),
    ],
)
def test_a_metric_that_the_rows_to_evaluate_on_do_not_define_is_refused_at_the_start(
    classify, tmp_path, metric, rows, reason
):
    file = tmp_path / "one.tsv"
    file.write_text("sentence\tlabel\n" + rows * 5)
    with pytest.raises(ConfigError, match=f"metric_for_best_model: {metric} needs rows of each class.*{reason}"):
        classify(tmp_path / "run", "--eval_files", file, "--metric_for_best_model", metric)
    assert not (tmp_path / "run").exists()


def test_the_columns_that_are_read_are_said(classify, tmp_path, capfd):
    classify(tmp_path / "run", "--dry_run")
    assert "train.tsv: text from sentence, label from label." in capfd.readouterr().out


def test_the_head_of_an_adapter_wins_over_that_of_a_base_that_has_one(classify, reviews, script, tmp_path):
    """sentence-transformers 3980: the head of the adapter was discarded, without a word, where the base has its own."""
    base = classify(tmp_path / "base", "--method", "full", "--learning_rate", 1e-3) / "model"
    run = classify(tmp_path / "run", "--model_name_or_path", base, *LORA)
    ours = measured(run)
    assert plain_metrics(load_peft(run, base), run / "adapter", reviews[1]) == pytest.approx(ours, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    assert plain_metrics(plain, base, reviews[1])["eval/loss"] != pytest.approx(ours["eval/loss"], abs=1e-3)

    script("merge", "--adapter", run, "--output_dir", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain_metrics(merged, tmp_path / "merged", reviews[1]) == pytest.approx(ours, abs=1e-5)
    again = classify(tmp_path / "again", "--model_name_or_path", base, "--adapter_name_or_path", run, "--eval_on_start",
                     "--max_steps", 1)  # fmt: skip
    start = next(line for line in metrics(again) if "eval/loss" in line)
    assert start["eval/loss"] == pytest.approx(ours["eval/loss"], abs=1e-6)
    script("predict", "--model", run, "--input_files", reviews[1], "--output_file", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = plain_scores(merged, tmp_path / "merged", reviews[1]).softmax(-1)[:, 1].tolist()
    assert [row["probabilities"]["positive"] for row in rows] == pytest.approx(expected, abs=1e-5)
