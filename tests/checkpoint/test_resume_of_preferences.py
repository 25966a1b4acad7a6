"""A resumed preference run is bit-equal and keeps its reference; the best by any of its metrics is exported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import (
    ROOT,
    STEPS,
    STOP,
    Stopped,
    checkpoint_path,
    equal_tensors,
    metrics,
    moved_adapter,
    run_json,
    weights,
)

from accel_llm.demo.skills import demo_conversations
from accel_llm.errors import ConfigError
from accel_llm.preference import reference as module

# Signals are read by a thread.
WAIT = "import time\n    from accel_llm.system.signals import signal_requests\n"
WAIT += "    while not signal_requests.stop: time.sleep(0.01)"
LORA = ("--method", "lora", "--lora_dropout", 0.1)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, Path]:
    """24 pairs for dpo.py, and the same answers with labels for kto.py."""
    folder, pairs, labelled = tmp_path_factory.mktemp("answers"), [], []
    for row in demo_conversations("train")[:24]:
        *prompt, last = row["messages"]
        wrong = {"role": "assistant", "content": "no " + last["content"]}
        pairs.append({"prompt": prompt, "chosen": [last], "rejected": [wrong]})
        labelled += [{"messages": [*prompt, side], "label": side is last} for side in (last, wrong)]
    for name, rows in (("dpo", pairs), ("kto", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in ("dpo", "kto")}


@pytest.fixture
def words(tiny, answers) -> Callable[..., list[str]]:
    """`words("dpo", folder)`: the command line of a run with its cache beside its folder."""

    def join(name: str, folder: Path, *more: object) -> list[str]:
        files = ("--model_name_or_path", tiny, "--train_files", answers[name], "--output_dir", folder)
        files += ("--cache_dir", folder.with_name(f"{folder.name}-cache"), "--eval_share", 0.2, "--max_length", 128)
        steps = ("--max_steps", STEPS, "--logging_steps", 1, "--save_steps", STOP, "--learning_rate", 1e-2)
        return list(map(str, (*files, *steps, "--per_device_train_batch_size", 2, *more)))

    return join


@pytest.fixture
def train(script, words) -> Callable[..., Path]:
    def run(name: str, folder: Path, *more: object) -> Path:
        script(name, *words(name, folder, *more))
        return folder

    return run


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("dpo", LORA, id="dpo-lora-dropout"),
        pytest.param("kto", (*LORA, "--save_async"), id="kto-lora-async", marks=pytest.mark.long),
        pytest.param(
            "dpo", ("--method", "full", "--loss_type", "simpo", "sft"), id="simpo-full", marks=pytest.mark.long
        ),
        pytest.param("kto", ("--loss_type", "bco", "--method", "qlora"), id="bco-qlora", marks=pytest.mark.long),
        pytest.param("dpo", (*LORA, "--load_in_8bit"), id="dpo-8-bits", marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_bit_equal(train, interrupt, tmp_path, capsys, name, options):
    """It reads the reference that the run without a stop has computed itself, each with a cache of its own."""
    whole = train(name, tmp_path / "whole", *options)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(name, tmp_path / "parts", *options)
    capsys.readouterr()
    parts = train(name, tmp_path / "parts", *options)
    assert ("reference: log-probabilities read from" in capsys.readouterr().out) == ("simpo" not in options)
    assert metrics(parts) == metrics(whole)
    assert equal_tensors(weights(parts), weights(whole))
    last = [load_file(checkpoint_path(folder, STEPS) / "rank-00000.safetensors") for folder in (parts, whole)]
    assert equal_tensors(*last)


def stop_before(train: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module.Reference, "compute", stop)
        train("kto", run, *LORA)


def stop_while_written(train: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of four files, as SIGKILL would leave it."""
    original, files = module.atomic_file, iter(range(9))

    def stop(path: Path) -> Any:
        if next(files):
            path.with_name(f".{path.name}.1.partial").write_bytes(b"half")
            raise Stopped
        return original(path)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module, "atomic_file", stop)
        train("kto", run, *LORA)


@pytest.mark.long
@pytest.mark.parametrize("stop", [stop_before, stop_while_written])
def test_a_run_that_ends_before_its_reference_is_complete_computes_it_anew(train, tmp_path, monkeypatch, stop):
    whole = train("kto", tmp_path / "whole", *LORA)
    stop(train, tmp_path / "parts", monkeypatch)
    parts = train("kto", tmp_path / "parts", *LORA)
    assert metrics(parts) == metrics(whole) and equal_tensors(weights(parts), weights(whole))


def test_a_resume_does_not_change_the_reference(train, interrupt, quiet, tiny, tmp_path):
    """Not even to one that the cache has too: that of a run with another adapter."""
    for seed in (1, 2):
        moved_adapter(tiny, tmp_path / f"adapter-{seed}", seed)
    first, second = (("--adapter_name_or_path", tmp_path / f"adapter-{seed}") for seed in (1, 2))
    cache = ("--cache_dir", tmp_path / "cache")
    train("dpo", tmp_path / "other", *second, *cache, "--max_steps", 1)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train("dpo", tmp_path / "run", *first, *cache)
    with pytest.raises(
        ConfigError, match="step-00000003 was trained against another reference than this run has; give"
    ):
        train("dpo", tmp_path / "run", *second, *cache)
    with pytest.raises(ConfigError, match="was trained against another reference"):
        train("dpo", tmp_path / "run", *first, *cache, "--seed", 1, "--allow_changed", "seed", "train_files")
    with pytest.raises(
        ConfigError, match=r"^precision: \S+ was saved with 'auto', this run has 'bf16'; give .*none\.$"
    ):
        train("dpo", tmp_path / "run", *first, *cache, "--precision", "bf16")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"the log-probabilities of the reference, .* are missing, and the model of"):
        train("dpo", tmp_path / "run", *first, *cache)


@pytest.mark.long
def test_another_reference_model_that_changed_is_refused_and_may_move(train, interrupt, make_model, tmp_path):
    """Without its columns it is asked again."""
    make_model(tmp_path / "reference", hidden_size=16)
    words = ("--reference_model_name_or_path", tmp_path / "reference")
    whole = train("dpo", tmp_path / "whole", *LORA, *words)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train("dpo", tmp_path / "run", *LORA, *words)
    shutil.move(tmp_path / "reference", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run-cache")
    make_model(tmp_path / "reference", hidden_size=8)
    with pytest.raises(ConfigError, match="was trained against another reference"):
        train("dpo", tmp_path / "run", *LORA, *words)
    run = train("dpo", tmp_path / "run", *LORA, "--reference_model_name_or_path", tmp_path / "moved")
    assert metrics(run) == metrics(whole) and equal_tensors(weights(run), weights(whole))


def test_of_two_runs_that_compute_one_reference_both_take_that_of_the_first(train, tmp_path, monkeypatch):
    """Otherwise the slower run would replace columns that the other one has to find again to the last bit."""
    compute, first = module.reference_columns, []

    def slow(*arguments: Any) -> np.ndarray:
        column = compute(*arguments)
        first.append(column * (1 + 1e-9))
        reference = references[0]
        part = list(reference.parts)[len(first) - 1]
        reference.files[part].write_bytes(first[-1].tobytes())
        return column

    references: list[Any] = []
    find = module.Reference.find
    monkeypatch.setattr(module.Reference, "find", lambda self, resumed: references.append(self) or find(self, resumed))
    monkeypatch.setattr(module, "reference_columns", slow)
    train("dpo", tmp_path / "run", *LORA, "--max_steps", 1)
    (reference,) = references
    assert len(first) == 2
    for column, part in zip(first, ("train", "eval"), strict=True):
        np.testing.assert_array_equal(reference.columns[part], column)
        assert reference.files[part].read_bytes() == column.tobytes()


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("dpo", "eval/rewards/margins"),
        *(
            pytest.param(*pair, marks=pytest.mark.long)
            for pair in (
                ("dpo", "eval/loss"),
                ("dpo", "eval/rewards/accuracies"),
                ("kto", "eval/loss"),
                ("kto", "eval/rewards/margins"),
            )
        ),
    ],
)
def test_the_best_by_any_metric_is_exported(train, tmp_path, name, metric):
    run = train(
        name,
        tmp_path / "run",
        *("--method", "full", "--learning_rate", 3e-2, "--max_steps", 8, "--eval_steps", 1, "--save_steps", 1),
        *("--metric_for_best_model", metric, "--save_total_limit", 9, "--lr_scheduler_type", "constant"),
    )
    values = {line["step"]: line[metric] for line in metrics(run) if metric in line}
    best = (min if metric == "eval/loss" else max)(values.values())
    step = min(step for step, value in values.items() if value == best)  # the first one, if several are equal
    assert len(values) == 8 and run_json(run)["exported_step"] == step
    saved = load_file(checkpoint_path(run, step) / "rank-00000.safetensors")
    assert all(torch.equal(tensor.view(-1), saved[f"{name}|weight|0"]) for name, tensor in weights(run).items())


@pytest.mark.long
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_check_only_and_dry_run_keep_nothing(script, words, tmp_path, capsys, name):
    script(name, *words(name, tmp_path / "run", *LORA, "--dry_run"))
    assert "reference: " not in capsys.readouterr().out  # no model was read
    script(name, *words(name, tmp_path / "run", *LORA, "--check_only", "--eval_steps", 1))
    assert "ready: start without --check_only" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_ctrl_c_ends_with_its_code_and_the_run_goes_on(words, train, tmp_path):
    """While it computes the reference, and while it trains, in processes of their own."""
    whole, name = train("kto", tmp_path / "whole", *LORA), "kto"
    program = (
        "import os, runpy, signal, sys\nfrom accel_llm.{module} import {owner} as owner\noriginal = owner.{call}\n"
        "def signalled(*arguments, **named):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    {wait}\n    return original(*arguments, **named)\nowner.{call} = signalled\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    places = (
        {"module": "preference.reference", "owner": "Reference", "call": "compute", "wait": "signal.pause()"},
        {"module": "training.bad_steps", "owner": "BadSteps", "call": "check", "wait": WAIT},
    )
    ends = ("preempted by SIGINT: nothing is lost; run the same command to continue\n",)
    ends += ("preempted by SIGINT: stopped after step 1; run the same command to continue\n",)
    run = tmp_path / "run"
    for place, end in zip(places, ends, strict=True):
        command = [sys.executable, "-c", program.format(**place), ROOT / "launch" / f"{name}.py"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [*map(str, command), *words(name, run, *LORA)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 128 + signal.SIGINT, ended.stderr
        assert ended.stderr.endswith(end)
        assert run_json(run)["status"] == "preempted"
    train(name, run, *LORA)
    assert metrics(run) == metrics(whole) and equal_tensors(weights(run), weights(whole))


@pytest.mark.long
def test_killed_runs_on_several_processes_end_early_with_the_same_bits(tmp_path):
    """Two cells of the proof, which has every strategy."""
    command = [sys.executable, ROOT / "tests" / "proofs" / "preference_resumes.py", "--work", tmp_path]
    command += ["--only", "dpo-zero2-lora-2p,kto-fsdp2-lora-2p"]
    ended = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0 and ended.stdout.count('{"status": "same"}') == 2, ended.stdout + ended.stderr
