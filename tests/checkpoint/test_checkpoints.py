"""A resumed run is bit-equal to one that was never stopped; which checkpoints are saved and kept, and when.

Several processes and every strategy: tests/proofs/resumes.py. Kills, full disks and signals: tests/proofs/soak.py.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import (
    STEPS,
    STOP,
    Stopped,
    checkpoint_path,
    equal_tensors,
    metrics,
    run_json,
    saved_steps,
    spoil,
    turn_vectors,
    weights,
)

from accel_llm.checkpoint import files as files_module
from accel_llm.checkpoint import load as load_module
from accel_llm.errors import ConfigError, DataError
from accel_llm.model import loss as loss_module
from accel_llm.model.loss import next_token_loss
from accel_llm.system.manifest import find_damage
from accel_llm.system.signals import Preempted, handle_signal

LORA = ("--method", "lora", "--lora_dropout", 0.1)
ADALORA = ("--method", "adalora", "--method_options")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((*LORA, "--add_tokens", "--chat_template", "chatml"), id="lora-dropout-adamw"),
        pytest.param(("--method", "full", "--neftune_noise_alpha", 5, "--save_async"), id="full-neftune-async"),
        pytest.param((*LORA, "--optim", "adamw_8bit", "--lora_r", 64), id="lora-adamw_8bit", marks=pytest.mark.long),
        pytest.param((*LORA, "--optim", "adafactor", "--gradient_checkpointing"), id="lora-adafactor-checkpointing"),
        pytest.param(("--method", "full", "--optim", "muon", "--logging_steps", 2), id="full-muon"),
        pytest.param(
            (*LORA, "--optim", "lion", "--modules_to_save", "lm_head"),
            id="lora-lion-modules_to_save",
            marks=pytest.mark.long,
        ),
        pytest.param(
            (*ADALORA, "{tfinal: 1, init_r: 64}", "--optim", "adamw_8bit"),
            id="adalora-adamw_8bit",
            marks=pytest.mark.long,
        ),
        pytest.param((*ADALORA, "{tfinal: 4}"), id="adalora-last-phase", marks=pytest.mark.long),
    ],
)
def test_a_stopped_and_resumed_run_is_bit_equal_to_one_never_stopped(train, interrupt, tmp_path, options):
    whole = train(tmp_path / "whole", *options)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", *options)
    assert run_json(tmp_path / "parts")["status"] == "failed" and saved_steps(tmp_path / "parts") == [STOP]

    parts = train(tmp_path / "parts", *options)
    assert run_json(parts)["status"] == "done"
    assert metrics(parts) == metrics(whole)
    assert equal_tensors(weights(parts), weights(whole))
    last = [load_file(checkpoint_path(folder, STEPS) / "rank-00000.safetensors") for folder in (parts, whole)]
    assert equal_tensors(*last)
    ends = [json.loads((checkpoint_path(folder, STEPS) / "rank-00000.json").read_text()) for folder in (parts, whole)]
    assert ends[0]["randomness"] == ends[1]["randomness"] and ends[0]["numbers"] == ends[1]["numbers"]
    assert any(tensor.dtype == torch.uint8 for tensor in last[0].values()) == ("adamw_8bit" in options)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, for FRoD's sparse matrix
@pytest.mark.long
@pytest.mark.parametrize("method", ["psoft", "tinylora", "frod"])
def test_a_run_resumed_where_decompositions_have_other_signs_is_bit_equal_too(
    train, interrupt, tmp_path, monkeypatch, method
):
    options = ("--method", method, "--max_steps", 4)
    whole = train(tmp_path / "whole", *options)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", *options)
    turn_vectors(monkeypatch)
    parts = train(tmp_path / "parts", *options)
    assert metrics(parts) == metrics(whole) and equal_tensors(weights(parts), weights(whole))


def test_a_resume_without_the_generators_ends_elsewhere(train, interrupt, tmp_path, monkeypatch):
    """Shows that the test above notices dropout."""
    whole = train(tmp_path / "whole", *LORA)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", *LORA)
    monkeypatch.setattr(load_module, "set_generator_states", lambda state, device: None)
    assert not equal_tensors(weights(train(tmp_path / "parts", *LORA)), weights(whole))


@contextmanager
def check_around_removals(check: Callable[[], None]) -> Iterator[list[str]]:
    """Call `check` before each rename or removal of a file or folder. Yield the list of these events."""
    events: list[str] = []

    def hook(event: str, _: Any) -> None:
        if events is not None and on[0] and event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            on[0] = False
            events.append(event)
            check()
            on[0] = True

    on = [True]
    sys.addaudithook(hook)
    try:
        yield events
    finally:
        on[0] = False


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_at_every_moment_there_is_a_complete_checkpoint(train, tmp_path, limit):
    run, least = tmp_path / "run", [99]

    def check() -> None:
        folders = list((run / "checkpoints").glob("step-*"))
        if folders:
            whole = sum(find_damage(folder) is None for folder in folders)
            assert whole == len(folders)
            least[0] = min(least[0], whole)
            started.append(whole)
        assert folders or not started, "the last checkpoint is gone"

    started: list[int] = []
    with check_around_removals(check) as events:
        train(run, "--save_steps", 1, "--save_total_limit", limit)
    assert {"os.rename", "os.remove", "shutil.rmtree"} <= set(events) and least[0] == 1
    assert saved_steps(run) == list(range(STEPS - limit + 1, STEPS + 1)) and max(started) == min(limit + 1, STEPS)


def test_the_best_checkpoint_is_kept_and_exported(train, chats, tmp_path, monkeypatch):
    """Evaluated every step; the third evaluation is made the best."""
    losses = iter([3.0, 2.0, 1.0, 1.5, float("nan"), 1.0])
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", lambda *_: {"eval/loss": next(losses)})
    words = ("--method", "full", "--eval_files", chats, "--eval_steps", 1, "--save_steps", 6)
    best = ("--metric_for_best_model", "eval/loss", "--save_total_limit", 1)
    run = train(tmp_path / "run", *words, *best)
    assert saved_steps(run) == [3, 6] and run_json(run)["exported_step"] == 3
    assert json.loads((checkpoint_path(run, 6) / "state.json").read_text())["best"] == [3, 1.0, 2]
    saved = load_file(checkpoint_path(run, 3) / "rank-00000.safetensors")
    assert all(torch.equal(tensor.view(-1), saved[f"{name}|weight|0"]) for name, tensor in weights(run).items())

    losses = iter([3.0, 2.0, 1.0, 1.5, 1.2, 1.0])
    last = train(tmp_path / "last", *words)
    assert (
        saved_steps(last) == [6]
        and run_json(last)["exported_step"] == 6
        and not equal_tensors(weights(last), weights(run))
    )


def test_the_best_checkpoint_is_remembered_after_a_resume(train, interrupt, chats, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", lambda *_: {"eval/loss": next(losses)})
    words = ("--eval_files", chats, "--eval_steps", 1, "--metric_for_best_model", "eval/loss", "--save_total_limit", 1)
    interrupt(4)
    with pytest.raises(Stopped):
        train(tmp_path / "run", *words)
    assert saved_steps(tmp_path / "run") == [1, 3]
    losses = iter([4.0, 5.0, 6.0])
    run = train(tmp_path / "run", *words)
    assert saved_steps(run) == [1, 6] and run_json(run)["exported_step"] == 1


@pytest.mark.parametrize("step, words", [(STEPS, ()), (4, ("--save_steps", 2, "--save_async"))])
def test_a_state_with_a_nan_is_not_saved(train, at_step, tmp_path, step, words):
    def sicken(checkpoints: Any) -> None:
        with torch.no_grad():
            next(p for p in checkpoints.model.parameters() if p.requires_grad).view(-1)[0] = math.nan

    at_step(step, sicken, before=True)
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "run", *LORA, *words)
    assert f"after step {step} 1 tensors hold a NaN or an infinity (base_model" in str(error.value)
    assert saved_steps(tmp_path / "run") == ([2] if words else [3])
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert run_json(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_in_one_sentence_and_keeps_the_last_checkpoint(train, tmp_path, monkeypatch, background):
    write, calls = files_module.write_tensors, iter(range(9))

    def full(path: Path, tensors: Any, *header: Any) -> Any:
        if next(calls) == 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, tensors, *header)

    monkeypatch.setattr(files_module, "write_tensors", full)
    words = ("--save_steps", 2, *(["--save_async"] if background else []))
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "run", *words)
    assert str(error.value) == (
        "checkpoints: step 4 could not be written: No space left on device; make room and give the same command again; it "
        "continues from the last whole checkpoint."
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    run = train(tmp_path / "run", *words)
    assert equal_tensors(weights(run), weights(train(tmp_path / "whole", *words)))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(train, tmp_path, monkeypatch, capsys, where):
    original, sick = next_token_loss, {3, 5}
    calls = iter(range(1, 99))

    def failing_loss(model: Any, batch: Any) -> torch.Tensor:
        loss = original(model, batch)
        if sys._getframe(1).f_code.co_name != "train" or next(calls) not in sick:
            return loss
        if where == "loss":
            return loss * math.nan
        return loss + (0 * next(p for p in model.parameters() if p.requires_grad)).sum().sqrt()  # infinite slope at 0

    monkeypatch.setattr(loss_module, "next_token_loss", failing_loss)
    moved = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: moved.append(1) or step(self, *a, **k))
    run = train(tmp_path / "run", *LORA, "--max_skipped_steps", 2)
    assert len(moved) == STEPS - 2 and run_json(run)["status"] == "done"
    lines = [line for line in capsys.readouterr().out.splitlines() if " skipped: " in line]
    assert (
        lines[0].startswith(f"step 3 skipped: its {where} is not finite (1 of 2); ") and "chats.jsonl, row " in lines[0]
    )
    assert lines[1].startswith("step 5 skipped") and len(lines) == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    assert [line["loss"] is None for line in metrics(run)] == [where == "loss" and n in sick for n in range(1, 7)]

    calls = iter(range(1, 99))
    with pytest.raises(DataError) as error:
        train(tmp_path / "less", *LORA, "--max_skipped_steps", 1)
    assert f"the {where} of step 5 is not finite (2 such steps, 1 allowed). Its rows: " in str(error.value)
    assert saved_steps(tmp_path / "less") == [3] and run_json(tmp_path / "less")["status"] == "failed"


def test_a_step_without_a_target_changes_nothing(train, tmp_path, monkeypatch):
    from accel_llm.training import loop

    count, calls = loop.total_targets, iter(range(1, 99))
    monkeypatch.setattr(loop, "total_targets", lambda *arguments: 0.0 if next(calls) == 4 else count(*arguments))
    run = train(tmp_path / "run", "--save_steps", 1, "--save_total_limit", 9)
    three, four, five = (load_file(checkpoint_path(run, step) / "rank-00000.safetensors") for step in (3, 4, 5))
    assert equal_tensors(three, four) and not equal_tensors(four, five)
    assert metrics(run)[3]["grad_norm"] == 0.0


def test_a_stop_signal_saves_and_the_run_can_be_resumed(train, at_step, tmp_path):
    def ask(_: Any) -> None:
        handle_signal(15)

    at_step(4, ask, before=True)
    with pytest.raises(Preempted) as end:
        train(tmp_path / "run", *LORA)
    assert (end.value.number, end.value.step) == (15, 4)
    run = run_json(tmp_path / "run")
    assert run["status"] == "preempted" and run["step"] == 4 and saved_steps(tmp_path / "run") == [3, 4]
    at_step(99, ask)
    assert equal_tensors(weights(train(tmp_path / "run", *LORA)), weights(train(tmp_path / "whole", *LORA)))


def test_a_save_signal_saves_and_training_continues(train, at_step, tmp_path):
    at_step(2, lambda _: handle_signal(10), before=True)
    run = train(tmp_path / "run", "--save_total_limit", 9)
    assert saved_steps(run) == [2, 3, 6] and run_json(run)["status"] == "done"


def test_an_interrupted_evaluation_is_repeated_after_the_resume(train, chats, tmp_path, monkeypatch):
    words = ("--eval_files", chats, "--eval_steps", 2, "--per_device_eval_batch_size", 1)
    whole = train(tmp_path / "whole", *words)
    from accel_llm.training import evaluation

    original, calls = evaluation.next_token_loss, iter(range(99))

    def interrupted_loss(*arguments: Any) -> torch.Tensor:
        if next(calls) == 3:  # in the middle of the first evaluation
            handle_signal(2)
        return original(*arguments)

    monkeypatch.setattr(evaluation, "next_token_loss", interrupted_loss)
    with pytest.raises(Preempted):
        train(tmp_path / "run", *words)
    assert run_json(tmp_path / "run")["step"] == 2 and [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    run = train(tmp_path / "run", *words)
    assert metrics(run) == metrics(whole) and equal_tensors(weights(run), weights(whole))


def test_an_adapters_checkpoint_is_small(train, make_model, tmp_path):
    base = make_model(tmp_path / "base", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    run = train(tmp_path / "run", "--model_name_or_path", base, "--method", "lora", "--lora_r", 32, "--max_steps", 1)
    trained = run_json(run)["accelerate"]["parameters"]["trainable"] * 4
    size = sum(path.stat().st_size for path in checkpoint_path(run, 1).iterdir())
    assert trained > 1_000_000 and 3 * trained < size < 1.1 * 3 * trained


def test_a_damaged_newer_checkpoint_is_removed_by_the_resume(train, interrupt, tmp_path):
    """Rotation goes by step: were it left in place, it would push the good ones out."""
    interrupt(4)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 2)
    spoil(checkpoint_path(tmp_path / "run", 4) / "rank-00000.safetensors", "truncated")
    interrupt(3)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 1, "--save_total_limit", 1)
    assert saved_steps(tmp_path / "run") == [3] and find_damage(checkpoint_path(tmp_path / "run", 3)) is None


def test_missing_state_is_an_error(train, interrupt, tmp_path):
    """Even where somebody has sealed the folder anew."""
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "run", *LORA)
    folder = checkpoint_path(tmp_path / "run", STOP)
    path = folder / "rank-00000.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    removed = next(name for name in tensors if "|exp_avg|" in name)
    shutil.copytree(folder, tmp_path / "copy")
    facts = json.loads((folder / "manifest.json").read_text())
    facts[path.name] = list(files_module.write_tensors(path, {n: t for n, t in tensors.items() if n != removed}))
    (folder / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=rf"lacks 1 tensors \({re.escape(removed)}\)"):
        train(tmp_path / "run", *LORA)
