"""What a run does late is tried before its first step: it fails then, leaves nothing, and changes no bit of the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import equal_tensors, metrics, run_json, weights

from accel_llm.checkpoint import rehearsal
from accel_llm.checkpoint.rehearsal import longest_rows
from accel_llm.errors import ConfigError
from accel_llm.training import export as export_module

# Rows of three lengths; the longest one is neither the first nor the last.
CHATS = [[("hi", "yo")], [("what is a long answer?", "one that goes on " * 6)], [("hello there", "good day")]]


@pytest.fixture
def run(script, tiny, tmp_path):
    """Train two steps on `CHATS`; dropout draws random numbers."""
    file = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": r, "content": t} for turn in chat for r, t in zip(("user", "assistant"), turn, strict=True)
            ]
        }
        for chat in CHATS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 3), encoding="utf-8")

    def run(name: str, *more: Any) -> Path:
        words = ["--model_name_or_path", tiny, "--train_files", file, "--eval_files", file, "--eval_generate", 2]
        words += ["--lora_dropout", 0.3, "--max_length", 256, "--max_steps", 2, "--learning_rate", 1e-2]
        words += [] if "--preflight" in more else ["--preflight", "true"]
        script("sft", *words, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / name, *more)
        return tmp_path / name

    return run


def test_no_bit_of_the_run_changes(run):
    tried, plain = run("tried"), run("plain", "--preflight", "false")
    assert equal_tensors(weights(tried), weights(plain))
    names = ("loss", "grad_norm", "eval/loss", "supervised_tokens")
    values = [[{name: line.get(name) for name in names} for line in metrics(folder)] for folder in (tried, plain)]
    assert values[0] == values[1]
    assert {path.name for path in tried.iterdir()} == {path.name for path in plain.iterdir()}


@pytest.mark.parametrize(
    "name, more",
    [
        ("pretrain", ()),
        ("dpo", ("--train_on", "last_assistant")),
        ("dpo", ("--loss_type", "orpo")),
        ("kto", ()),
        ("kto", ("--loss_type", "bco")),
        ("reward", ()),
        ("classify", ()),
    ],
    ids=lambda value: " ".join(value[1::2]) if isinstance(value, tuple) else value,
)
def test_every_script_tries_its_own_loss(script, tiny, tmp_path, name, more):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"number {k} " * k}) + "\n" for k in range(1, 30)), encoding="utf-8")
    start = ("--config_name", tiny, "--train_files", texts)
    words = [*(start if name == "pretrain" else ("--model_name_or_path", tiny, "--train_files", "demo"))]
    words += ["--eval_share", 0.3, "--limit_rows", 40, "--max_length", 256, *more]
    words += ["--max_steps", 2, "--learning_rate", 1e-2, "--cache_dir", tmp_path / "cache"]
    for preflight in (True, False):
        script(name, *words, "--preflight", preflight, "--output_dir", tmp_path / str(preflight))
    names = ("loss", "grad_norm", "eval/loss")
    tried, plain = (
        [[line.get(key) for key in names] for line in metrics(tmp_path / str(preflight))] for preflight in (True, False)
    )
    assert tried == plain


def fails_before_the_first_step(run, folder: Path, message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(folder.name)
    assert run_json(folder)["status"] == "failed" and message in run_json(folder)["error"]
    assert {path.name for path in folder.iterdir()} <= {"run.json", "report.html"}  # no step, no checkpoint, no export


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (export_module, "save_adapter"),
        (export_module, "read_export_back"),
        (rehearsal, "exact_match"),
        (rehearsal, "write_rank_files"),
    ],
    ids=["export", "read back", "generate", "save"],
)
def test_what_fails_late_fails_first(run, tmp_path, monkeypatch, module, function):
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(module, function, fail)
    fails_before_the_first_step(run, tmp_path / "out", "broken on purpose")


def test_a_disk_that_gives_back_other_bytes_is_noticed(run, tmp_path, monkeypatch):
    write = rehearsal.write_rank_files

    def write_and_spoil(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        file = folder / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(rehearsal, "write_rank_files", write_and_spoil)
    with pytest.raises(ConfigError, match="gives back other bytes than were written; use another disk"):
        run("out")


@pytest.mark.parametrize("packing", [True, False])
def test_the_longest_rows_are_tried(run, tmp_path, monkeypatch, packing):
    tried: list[list[int]] = []

    def note(stream: Any, count: int) -> Any:
        batch = longest_rows(stream, count)
        tried.append(batch["lengths"])
        longest = int(np.max(stream.rows.lengths))
        assert longest in batch["lengths"] and torch.is_tensor(batch["input_ids"])
        return batch

    monkeypatch.setattr(rehearsal, "longest_rows", note)
    run("out", "--packing", packing, "--per_device_train_batch_size", 2)
    assert len(tried) == 2  # for a step, and for an evaluation
    if not packing:
        assert [len(lengths) for lengths in tried] == [2, 2] and tried[0][0] == tried[0][1]


def test_what_is_too_large_is_written_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "MAX_BYTES", 10)
    monkeypatch.setattr(rehearsal, "write_rank_files", None)
    assert run_json(run("out"))["status"] == "done"
