"""The end of a run on the screen: its numbers are those of metrics.jsonl, and its commands can be pasted anywhere."""

import ast
import io
import math
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console

from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ChatOptions, MergeOptions
from accel_llm.report import display, summary
from accel_llm.report.record import Record
from accel_llm.report.summary import show_answers, summary_lines

ROOT = Path(__file__).parents[2]


def train(step: int, loss: float) -> dict:
    values = {
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 100.0 * step,
        "supervised_tokens": 50 * step,
    }
    return {"step": step, "loss": loss} | values | {"epoch": step / 4, "peak_memory_mb": 300 + step}


def test_the_numbers_are_the_last_ones_beside_the_first_and_the_best():
    metrics = [
        {"step": 0, "eval/loss": 5.0, "eval/exact_match": 0.0, "eval/supervised_tokens": 9},
        train(1, 4.0),
        train(5, 2.0),
        {"step": 5, "eval/loss": 1.5, "eval/exact_match": 0.75, "eval/supervised_tokens": 9},
        train(9, 1.0),
        {"step": 9, "eval/loss": 1.75, "eval/exact_match": 0.5, "eval/supervised_tokens": 9},
    ]
    assert dict(summary_lines(metrics, {}, "tokens")) == {
        "done": "9 steps, 2.25 epochs, 450 trained tokens",
        "speed": "500 tokens a second (median), peak memory 309 MiB (main process)",
        "loss": "1.0000 at step 9, from 4.0000 at step 1",
        "eval/loss": "1.7500 at step 9, from 5.0000 at step 0; best 1.5000 at step 5",
        "eval/exact_match": "0.5000 at step 9, from 0.0000 at step 0; best 0.7500 at step 5",
    }
    assert summary_lines(metrics[:1], {}, "tokens") == []


def test_of_rejected_answers_less_is_better():
    values = (-1.0, -4.0, -3.0)
    metrics = [
        train(1, 4.0),
        *({"step": k, "eval/loss": 1, "eval/rewards/rejected": v} for k, v in enumerate(values, 1)),
    ]
    assert dict(summary_lines(metrics, {}, "tokens"))["eval/rewards/rejected"].endswith("best -4.0000 at step 2")


def test_the_best_loss_of_a_source_is_the_lowest():
    values = zip((3.0, 2.0, 2.5), (20.0, 7.0, 12.0), strict=True)
    metrics = [train(1, 4.0)]
    metrics += [
        {"step": k, "eval/loss": 1.0, "eval/loss/zh/a.txt": a, "eval/perplexity/accuracy.txt": b}
        for k, (a, b) in enumerate(values, 1)
    ]
    lines = dict(summary_lines(metrics, {}, "tokens"))
    assert lines["eval/loss/zh/a.txt"] == "2.5000 at step 3, from 3.0000 at step 1; best 2.0000 at step 2"
    assert lines["eval/perplexity/accuracy.txt"].endswith("best 7.0000 at step 2")


def test_values_that_are_not_finite_are_no_best_ones():
    metrics = [train(1, 4.0), *({"step": k, "eval/loss": value} for k, value in enumerate((2.0, math.nan, 3.0), 1))]
    assert (
        dict(summary_lines(metrics, {}, "tokens"))["eval/loss"]
        == "3.0000 at step 3, from 2.0000 at step 1; best 2.0000 at step 1"
    )


def test_answers_stand_on_one_line_each_and_are_no_markup(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(summary, "console", Console(file=screen, width=40))
    right = {"prompt": "x" * 100 + "2 + 2?", "expected": "4[end]", "generated": "4[end]"}
    wrong = {"prompt": "a\nb", "expected": "[bold]5", "generated": "\x1b[31m6" + "y" * 80}
    show_answers([right, wrong, right, right], 2)
    first, second = screen.getvalue().splitlines()
    assert first.endswith("xx2 + 2? => 4[end]") and "... " not in first and len(first) < 100
    assert second == f"answer:            b => \\x1b[31m6{'y' * 51}...  (data: [bold]5)"


def test_answers_stand_beside_the_question_without_the_template(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(summary, "console", Console(file=screen, width=40))
    asked = ["Two lines,\nthen 3 + 6?", "什么是水", ""]
    samples = [
        {"prompt": f"<s>user\n{text}<e>\n<s>assistant\n", "expected": "9", "generated": "9<e>"} for text in asked
    ]
    show_answers(samples, 3)
    assert [line.partition(":")[2].strip().split(" => ")[0] for line in screen.getvalue().splitlines()] == [
        "then 3 + 6?",
        "什么是水",
        "<s>user",
    ]


@pytest.mark.parametrize("run", ["out", "my run/a", "it's $HOME [bold]:smile:", "-dash", "."])
@pytest.mark.parametrize("export", ["adapter", "model"])
def test_the_next_commands_are_right_from_anywhere(accelerator, tmp_path, monkeypatch, run, export):
    (tmp_path / run / export).mkdir(parents=True)
    (tmp_path / run / "adapter").mkdir(exist_ok=True)
    (tmp_path / run / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch" / "sft.py")])
    monkeypatch.setattr(display, "write_report", lambda folder: None)
    screen = io.StringIO()
    monkeypatch.setattr(summary, "console", Console(file=screen, width=40))
    display.show_end(accelerator, Record(Path(run), False), Path(run) / export)
    monkeypatch.chdir(ROOT)
    folder = tmp_path / run
    lines = dict(line.split(":", 1) for line in screen.getvalue().splitlines())
    _, chat, *words = shlex.split(lines["ask it"])
    assert Path(chat).is_file() and Path(parse_options(ChatOptions, words).model) == folder
    ((argument,),) = [[a.value for a in node.args] for node in ast.walk(ast.parse(lines["load it"].strip()))
                      if isinstance(node, ast.Call)]  # fmt: skip
    assert Path(argument).is_dir() and Path(argument) == folder / export
    assert ("merge it" in lines) == (export == "adapter")
    if "merge it" in lines:
        _, merge, *words = shlex.split(lines["merge it"])
        options = parse_options(MergeOptions, words)
        assert Path(merge).is_file() and Path(options.adapter[0]) == folder
        assert Path(options.output_dir).resolve() not in (folder.resolve(), (folder / export).resolve())


def test_virtual_tokens_are_not_offered_for_a_merge(accelerator, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    settings = '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}'
    (tmp_path / "adapter" / "adapter_config.json").write_text(settings, encoding="utf-8")
    monkeypatch.setattr(display, "write_report", lambda folder: None)
    screen = io.StringIO()
    monkeypatch.setattr(summary, "console", Console(file=screen, width=40))
    display.show_end(accelerator, Record(tmp_path, False), tmp_path / "adapter")
    assert "ask it" in screen.getvalue() and "merge it" not in screen.getvalue()
