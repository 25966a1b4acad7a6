"""lm-eval on the export: its tasks run from files, offline, and its bits per byte are those of the last evaluation.

It needs the extra `lm-eval`; without it the tests are skipped.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

STORIES = ROOT.parent / "shared" / "data" / "weights" / "stories260K_hf"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared"),
]
ROLLING = """\
task: held_out_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""
CHOICES = """\
task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{begin}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[right, wrong]}}}}"
metric_list: [{{metric: acc}}]
"""


QUESTIONS = [
    {"begin": "Once upon a", "right": "time", "wrong": "zebra"},
    {"begin": "She was very", "right": "happy", "wrong": "the"},
    {"begin": "He went to the park to", "right": "play", "wrong": "was"},
]


def log_probability(model: Any, tokenizer: Any, begin: str, end: str) -> float:
    """Return the log-probability of `end` behind `begin` and a space, by plain transformers."""
    before, whole = (tokenizer.encode(text) for text in (begin, f"{begin} {end}"))
    ids = torch.tensor([whole])
    with torch.no_grad():
        values = model(ids).logits[0].log_softmax(-1)
    return sum(float(values[k - 1, whole[k]]) for k in range(len(before), len(whole)))


def write_tasks(folder: Path) -> list[str]:
    """Write both tasks and their rows; return the held-out texts."""
    text = (STORIES.parents[1] / "pretrain" / "tinystories.txt").read_text(encoding="utf-8")
    documents = [line for line in text.split("\n") if 40 < len(line) < 160][:40]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    for name, task in (("texts", ROLLING), ("questions", CHOICES)):
        (folder / f"{name}.yaml").write_text(task.format(file=folder / f"{name}.jsonl"), encoding="utf-8")
    return documents


def documented_command() -> list[str]:
    """Return the words of the page's command that runs lm-eval."""
    page = (ROOT / "launch" / "pretraining" / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^lm_eval run .*$", page.replace("\\\n", " "), re.MULTILINE)
    return line.split()


def run_documented(folder: Path, tasks: Path, arguments: str = "") -> dict[str, Any]:
    """Run the page's command in `folder`, without a network; return what it found."""
    command = [word.replace("output/model", str(folder / "out" / "model")) for word in documented_command()]
    command = [word.replace("my_tasks", str(tasks)).replace("=float32", f"=float32{arguments}") for word in command]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    shutil.rmtree(folder / "output", ignore_errors=True)
    words = [sys.executable, "-m", "lm_eval", *command[1:]]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (folder / "output").rglob("results_*.json")
    return json.loads(found.read_text(encoding="utf-8"))["results"]


def test_tasks_in_files_run_on_the_export_offline(script, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    documents = write_tasks(tasks)
    words = ("--model_name_or_path", STORIES, "--train_files", tasks / "texts.jsonl", "--eval_files")
    words += (tasks / "texts.jsonl", "--max_length", 256, "--max_steps", 2, "--learning_rate", 1e-3)
    script("pretrain", *words, "--output_dir", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    ours = lines[-1]["eval/bits_per_byte"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").double()
    results = run_documented(tmp_path, tasks)
    right = [log_probability(model, tokenizer, q["begin"], q["right"]) for q in QUESTIONS]
    wrong = [log_probability(model, tokenizer, q["begin"], q["wrong"]) for q in QUESTIONS]
    assert results["next_word"]["acc,none"] == sum(a > b for a, b in zip(right, wrong, strict=True)) / len(QUESTIONS)

    # It predicts no end token; with its nats, which plain transformers counts, the two agree.
    theirs = run_documented(tmp_path, tasks, ",add_bos_token=False")["held_out_texts"]["bits_per_byte,none"]
    end_bits = 0.0
    for document in documents:
        ids = torch.tensor([[*tokenizer.encode(document), tokenizer.eos_token_id]])
        with torch.no_grad():
            end_bits -= float(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]) / math.log(2)
    size = sum(len(document.encode()) for document in documents)
    assert ours == pytest.approx(theirs + end_bits / size, rel=1e-5)
    assert abs(ours - theirs) > 1e-3  # so the end tokens are there
