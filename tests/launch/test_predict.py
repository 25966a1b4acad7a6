"""predict.py as a person starts it: files in and out, the screen, Ctrl-C, and a kill at any time."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support import ROOT
from transformers import BertConfig, BertForSequenceClassification

from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError
from accel_llm.model.batch_answers import BatchAnswer, PromptRow, QuestionBatches
from accel_llm.model.encoders import classifier_config

BASE = ROOT / "accel_llm" / "demo_base"


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.csv"
    rows = [(k, row["messages"][0]["content"], "") for k, row in enumerate(demo_conversations("train")[:12])]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "question", "answer"), *rows])
    return path


def test_rows_keep_their_columns_and_their_order(script, questions, tmp_path, capsys):
    words = ("--model", BASE, "--input_files", questions, "--max_new_tokens", 8)
    outputs = [tmp_path / "new" / f"out.{kind}" for kind in ("jsonl", "csv", "parquet")]
    for output in outputs:
        script("predict", *words, "--output_file", output)
        printed = capsys.readouterr()
        last, before = printed.out.splitlines()[-1], printed.out.splitlines()[-2]
        assert last == f"wrote {output}" and before.startswith("answered: 12 of 12 rows, ")
        assert before.endswith("% ended by themselves")
        assert printed.err == "[On cpu, weights in float32.]\n"
    rows = [json.loads(line) for line in outputs[0].read_text(encoding="utf-8").splitlines()]
    assert list(rows[0]) == ["id", "question", "answer", "generated", "stopped"]
    assert [row["id"] for row in rows] == [str(k) for k in range(12)]
    assert len({row["generated"] for row in rows}) > 3
    with outputs[1].open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["generated"] for row in cells] == [row["generated"] for row in rows]
    assert {row["stopped"] for row in cells} <= {"true", "false"}
    assert pq.read_table(outputs[2]).to_pylist() == rows
    assert sorted(path.name for path in outputs[0].parent.iterdir()) == ["out.csv", "out.jsonl", "out.parquet"]


def test_another_model_answers_beside_the_first(script, questions, tiny, tmp_path):
    first, both = tmp_path / "first.jsonl", tmp_path / "both.jsonl"
    words = ("--max_new_tokens", 4, "--input_files")
    script("predict", "--model", BASE, *words, questions, "--output_file", first)
    with pytest.raises(ConfigError) as error:
        script("predict", "--model", tiny, *words, first, "--output_file", both)
    assert str(error.value) == (
        f"column_prefix: '' makes a new column 'generated', but {first}, row 1 has one; give another, such as new_."
    )
    script("predict", "--model", tiny, *words, first, "--output_file", both, "--column_prefix", "tuned_")
    row = json.loads(both.read_text(encoding="utf-8").splitlines()[0])
    assert list(row) == ["id", "question", "answer", "generated", "stopped", "tuned_generated", "tuned_stopped"]


def test_rows_without_an_answer_are_counted_and_named(script, questions, tmp_path, capsys):
    questions.write_text(questions.read_text(encoding="utf-8") + '12,"",x\n13," ",x\n', encoding="utf-8")
    words = ("--model", BASE, "--input_files", questions, "--max_new_tokens", 4, "--on_bad_row", "drop")
    script("predict", *words, "--output_file", tmp_path / "out.csv")
    printed = capsys.readouterr()
    assert f"[No answer: {questions}, row 13: question: the prompt is empty; " in printed.err
    assert "no answer: 2 rows, empty text\nanswered: 12 of 14 rows" in printed.out
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["id"], last["generated"], last["stopped"]) == ("13", "", "")
    assert last["problem"].startswith("question: the prompt is empty")


def test_ctrl_c_says_how_to_go_on(script, questions, tmp_path, monkeypatch, capsys):
    output, calls, answer = tmp_path / "out.jsonl", [], QuestionBatches.answer
    words = ("--model", BASE, "--input_files", questions, "--max_new_tokens", 4, "--output_file", output)

    def interrupted(self: QuestionBatches, batch: list[PromptRow]) -> list[BatchAnswer]:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QuestionBatches, "answer", interrupted)
        script("predict", *words, "--per_device_eval_batch_size", 3)
    said = f"[6 of 12 rows are kept in {output}.part; the same command goes on there.]"
    assert capsys.readouterr().err.splitlines()[-1] == said and not output.exists()
    script("predict", *words)  # also with another batch size
    printed = capsys.readouterr()
    assert "[6 of 12 rows were done before.]" in printed.err and "answered: 12 of 12 rows" in printed.out
    script("predict", *words[:-1], tmp_path / "right.jsonl")
    assert output.read_bytes() == (tmp_path / "right.jsonl").read_bytes()


def start(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "predict.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_lines(part: Path, lines: int, running: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b"\n") < lines:
        assert running.poll() is None and time.monotonic() < limit, running.communicate()
        time.sleep(0.01)


def test_a_model_that_reads_padding_is_named(script, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accel_llm.model.batch_answers.ignores_padding", lambda _: False)
    words = ("--model", BASE, "--input_files", questions, "--max_new_tokens", 4)
    script("predict", *words, "--output_file", tmp_path / "out.csv")
    assert "[Only prompts of the same length are answered together: " in capsys.readouterr().err


@pytest.mark.long
def test_signals_and_kills_lose_nothing(script, tiny, tmp_path):
    """Ctrl-C says how to go on; after it a kill; then the same command, in this process, ends with the same file."""
    options = ["--max_new_tokens", "32", "--per_device_eval_batch_size", "2"]
    rows = json.dumps({"prompt": "What is 3 + 4?"}) + "\n"
    file, right = tmp_path / "rows.jsonl", tmp_path / "right.jsonl"
    file.write_text(rows * 48, encoding="utf-8")
    words = ["--model", str(tiny), "--input_files", str(file), *options, "--output_file"]
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"

    running = start([*words, str(output)])
    wait_for_lines(part, 3, running)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in err
    done = part.read_bytes().count(b"\n") - 1
    assert f"[{2 * done:,} of 48 rows are kept in {part}; the same command goes on there.]" in err

    running = start([*words, str(output)])
    wait_for_lines(part, done + 3, running)
    running.kill()
    _, err = running.communicate(timeout=60)
    assert f"[{2 * done:,} of 48 rows were done before.]" in err
    assert not output.exists() and part.read_bytes().count(b"\n") < 24

    script("predict", *words, output)
    script("predict", *words, right)
    assert output.read_bytes() == right.read_bytes() and right.read_bytes().count(b"\n") == 48
    assert not part.exists()


@pytest.fixture
def classifier(tmp_path) -> Path:
    """A tiny encoder that tells three classes apart, with the demo's tokenizer."""
    tokenizer = build_demo_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    labels = ("single_label_classification", ["question", "order", "thanks"])
    model = BertForSequenceClassification(classifier_config(config, labels))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_texts(path: Path, count: int) -> Path:
    texts = [row["messages"][0]["content"][: 10 + k % 30] for k, row in enumerate(demo_conversations("train"))]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [(k, texts[k % len(texts)], "?") for k in range(count)]
        csv.writer(file).writerows([("id", "sentence", "label"), *rows])
    return path


def test_a_classifier_tells_labels_and_the_screen_counts_them(script, classifier, tmp_path, capsys):
    file, output = write_texts(tmp_path / "texts.csv", 40), tmp_path / "labels.csv"
    script("predict", "--model", classifier, "--input_files", file, "--output_file", output)
    printed = capsys.readouterr()
    assert printed.err == "[On cpu, weights in float32.]\n"
    with output.open(encoding="utf-8", newline="") as opened:
        cells = list(csv.DictReader(opened))
    names = ("question", "order", "thanks")
    counts = [sum(row["predicted_label"] == name for row in cells) for name in names]
    shares = ", ".join(f"{name} {count} ({count / 40:.1%})" for name, count in zip(names, counts, strict=True))
    assert printed.out.splitlines() == [f"classified: 40 of 40 rows: {shares}", f"wrote {output}"]
    assert list(cells[0]) == ["id", "sentence", "label", "predicted_label", "probability", "probabilities"]
    assert [row["id"] for row in cells] == [str(k) for k in range(40)]

    words = ("--max_new_tokens", 5, "--overwrite_output_file")
    with pytest.raises(ConfigError, match=r"max_new_tokens: .* is a classifier, which scores whole texts"):
        script("predict", "--model", classifier, "--input_files", file, "--output_file", output, *words)


def test_progress_shows_texts_a_second(script, classifier, tmp_path, monkeypatch, capsys):
    file = write_texts(tmp_path / "texts.csv", 40)
    times = iter(range(0, 10**6, 60))  # a minute for each look at the clock
    monkeypatch.setattr("time.monotonic", lambda: float(next(times)))
    script("predict", "--model", classifier, "--input_files", file, "--output_file", tmp_path / "out.jsonl")
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"16 of 40 rows, 0 texts/s, [\d.]+ minutes left", first)


@pytest.mark.long
def test_a_killed_classifier_goes_on_with_the_same_bytes(script, classifier, tmp_path):
    """kill -9 in the middle of the file of scores; the same command again gives the file of a run without it."""
    file = write_texts(tmp_path / "texts.csv", 900)
    words = ["--model", str(classifier), "--input_files", str(file), "--per_device_eval_batch_size", "2"]
    output, part, right = (tmp_path / name for name in ("out.parquet", "out.parquet.part", "right.parquet"))
    running = start([*words, "--output_file", str(output)])
    wait_for_lines(part, 60, running)
    running.kill()
    running.communicate(timeout=60)
    done = part.read_bytes().count(b"\n") - 1
    assert 59 <= done < 450 and not output.exists()
    running = start([*words, "--output_file", str(output)])
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, err
    assert f"[{2 * done:,} of 900 rows were done before.]" in err and "classified: 900 of 900 rows: " in out
    script("predict", *words, "--output_file", right)
    assert output.read_bytes() == right.read_bytes() and not part.exists()
    assert pq.read_table(output)["id"].to_pylist() == [str(k) for k in range(900)]
