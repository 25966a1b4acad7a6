"""One line a logging step with the loss of its window, readable by any JSON parser; and the lines on the screen."""

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from accel_llm.config.options import RunOptions
from accel_llm.data.batches import Batch, collate_packed, collate_padded
from accel_llm.data.stream import TrainingPlan
from accel_llm.report import metrics
from accel_llm.report.metrics import Meter
from accel_llm.report.record import Record
from accel_llm.system import progress

ROW = (np.arange(5, 11), np.array([-100, -100, 7, 8, -100, 10]))  # 6 tokens, 3 targets
SHORT = (np.arange(5, 9), np.array([-100, 6, -100, -100]))  # 4 tokens, 1 target
FILLER = (np.zeros(2, np.int64), np.full(2, -100))


def new_meter(accelerator, folder: Path, first_step: int = 0, logging_steps: int = 3, total_steps: int = 8) -> Meter:
    options = RunOptions(output_dir=str(folder), logging_steps=logging_steps)
    return Meter(accelerator, options, TrainingPlan(4, 2, None, total_steps), Record(folder, True), first_step)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """As a strict parser reads them."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def run(meter: Meter, first_step: int, last_step: int) -> None:
    """Two micro-batches a step, of summed losses `step` and `2 * step`, over 3 and 1 targets."""
    for step in range(first_step + 1, last_step + 1):
        meter.add(torch.tensor(float(step), requires_grad=True), collate_packed([ROW]))
        meter.add(torch.tensor(2.0 * step), collate_packed([SHORT]))
        meter.log(step, 1e-3 * step, 0.5 * step)


def test_lines_are_written_when_due_with_the_loss_of_their_window(accelerator, tmp_path, capsys):
    run(new_meter(accelerator, tmp_path), 0, 8)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 6, 8]
    windows = [(1,), (2, 3), (4, 5, 6), (7, 8)]
    assert [line["loss"] for line in lines] == [sum(3 * s for s in window) / (4 * len(window)) for window in windows]
    assert [line["supervised_tokens"] for line in lines] == [4, 12, 24, 32]
    assert [line["learning_rate"] for line in lines] == [1e-3 * step for step in (1, 3, 6, 8)]
    assert [line["grad_norm"] for line in lines] == [0.5, 1.5, 3.0, 4.0]
    assert [line["epoch"] for line in lines] == [0.5, 1.5, 3.0, 4.0]
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_mb"] > 0 for line in lines)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and re.fullmatch(
        r"step 3/8  loss 1\.8750  lr 3\.00e-03  grad 1\.5000  tok/s [\d,]+  left 0:00", printed[1]
    )


def test_tokens_are_real_ones(accelerator, tmp_path):
    meter = new_meter(accelerator, tmp_path)
    loss = torch.tensor(1.0)
    meter.add(loss, collate_packed([ROW, SHORT]))
    assert meter.state()[:4] == [1.0, 4.0, 4.0, 10.0]
    meter.add(loss, collate_padded([ROW, SHORT], 0))  # 2 of 12 are padding
    assert meter.state()[:4] == [2.0, 8.0, 8.0, 20.0]
    for filler in (collate_packed([FILLER]), collate_padded([FILLER], 0)):
        meter.add(torch.tensor(0.0), filler)
    assert meter.state()[:4] == [2.0, 8.0, 8.0, 20.0]


def test_small_losses_are_not_lost_in_a_long_window(accelerator, tmp_path):
    meter = new_meter(accelerator, tmp_path)
    meter.add(torch.tensor(2.0**24), collate_packed([ROW]))
    for _ in range(1000):
        meter.add(torch.tensor(1.0), collate_packed([ROW]))
    assert meter.sums[0] == 2**24 + 1000


@pytest.mark.parametrize("sick", [float("nan"), float("inf"), -float("inf")])
def test_a_sick_number_is_null_for_programs_and_plain_for_people(accelerator, tmp_path, capsys, sick):
    meter = new_meter(accelerator, tmp_path, logging_steps=1)
    meter.add(torch.tensor(sick), collate_packed([ROW]))
    meter.log(1, 1e-3, sick)
    run(meter, 1, 2)
    first, second = read_lines(tmp_path)
    assert first["loss"] is None and first["grad_norm"] is None and first["supervised_tokens"] == 3
    assert second["loss"] == 1.5
    output = capsys.readouterr().out
    assert "loss nan" in output and f"grad {sick}" in output


def test_a_window_without_targets_has_loss_zero(accelerator, tmp_path):
    meter = new_meter(accelerator, tmp_path)
    meter.add(torch.tensor(0.0), collate_packed([FILLER]))
    meter.log(1, 1e-3, 0.0)
    assert read_lines(tmp_path)[0]["loss"] == 0.0


def test_a_resumed_run_forgets_what_it_does_again(accelerator, tmp_path):
    meter = new_meter(accelerator, tmp_path)
    run(meter, 0, 3)
    meter.write(3, {"eval/loss": float("nan")})
    run(meter, 3, 6)
    before = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while it wrote
    resumed = new_meter(accelerator, tmp_path, first_step=3)
    assert [(line["step"], "loss" in line) for line in read_lines(tmp_path)] == [(1, True), (3, True), (3, False)]
    assert before.startswith((tmp_path / "metrics.jsonl").read_text()) and resumed.supervised == 12
    run(resumed, 3, 8)
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 3, 3, 6, 8]
    assert [line["supervised_tokens"] for line in read_lines(tmp_path) if "loss" in line] == [4, 12, 24, 32]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_without_metrics_starts_an_empty_file(accelerator, tmp_path):
    assert new_meter(accelerator, tmp_path, first_step=3).supervised == 0
    assert read_lines(tmp_path) == []


def test_a_fresh_run_touches_no_file_before_its_first_line(accelerator, tmp_path):
    new_meter(accelerator, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_paused_time_does_not_count_against_speed(accelerator, tmp_path):
    meter = new_meter(accelerator, tmp_path)
    start = meter.since
    with meter.pause_clock():
        time.sleep(0.1)
    assert 0.1 <= meter.since - start < 5
    with pytest.raises(KeyError), meter.pause_clock():
        raise KeyError  # an error inside is not swallowed
    meter.add(torch.tensor(1.0), collate_packed([ROW]))
    meter.since = time.perf_counter() - 2
    meter.log(1, 0.0, 0.0)
    assert read_lines(tmp_path)[0]["tokens_per_second"] == pytest.approx(3, rel=0.05)


def test_progress_is_drawn_on_a_terminal_only(accelerator, tmp_path, monkeypatch, capsys):
    plain = new_meter(accelerator, tmp_path)
    assert plain.bar and plain.bar.task is None
    plain.close()
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(metrics, "console", terminal)
    monkeypatch.setattr(progress, "console", terminal)
    meter = new_meter(accelerator, tmp_path, first_step=2)
    assert meter.bar and (meter.bar.done, meter.bar.total) == (2, 8)
    run(meter, 2, 3)
    assert meter.bar.done == 3 and meter.status.startswith("epoch 1.50  loss")
    meter.close()
    assert "step 3/8" in screen.getvalue() and "step 3/8" not in capsys.readouterr().out
    assert "train" in screen.getvalue() and "3/8" in screen.getvalue()


def test_a_line_of_a_log_says_how_long_the_rest_takes(accelerator, tmp_path, capsys):
    meter = new_meter(accelerator, tmp_path)
    assert meter.bar
    meter.bar.start -= 60
    run(meter, 0, 8)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0].endswith("left 7:00")
    assert "left" not in lines[-1]


def test_the_end_of_a_run_leaves_its_process_groups_alone(accelerator, tmp_path):
    """To destroy them could deadlock in torch 2.13 (pytorch 56297)."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        new_meter(accelerator, tmp_path).end_run()
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_loss_measures_beside_is_a_mean_over_its_values_also_after_a_resume(accelerator, tmp_path):
    def batch(chosen: list[float], rejected: list[float]) -> Batch:
        measured = {"rewards/chosen": chosen, "rewards/rejected": rejected}
        tensors = {name: torch.tensor([sum(v), len(v)], dtype=torch.float64) for name, v in measured.items()}
        return collate_padded([ROW], 0) | {"measured": tensors}

    meter = new_meter(accelerator, tmp_path)
    meter.add(torch.tensor(1.0), batch([1.0, 2.0], [0.5]))
    # A window goes on in a new process.
    options = RunOptions(output_dir=str(tmp_path), logging_steps=3)
    plan, record = TrainingPlan(4, 2, None, 8), Record(tmp_path, True)
    meter = Meter(accelerator, options, plan, record, 0, meter.state())
    meter.add(torch.tensor(float("nan")), batch([100.0], [100.0]))  # a sick batch is left out
    meter.add(torch.tensor(1.0), batch([6.0], []))
    meter.log(3, 0.1, 1.0)
    (line,) = read_lines(tmp_path)
    assert line["rewards/chosen"] == 3.0 and line["rewards/rejected"] == 0.5 and line["rewards/margins"] == 2.5
    meter.add(torch.tensor(1.0), batch([1.0], []))
    meter.log(6, 0.1, 1.0)
    assert read_lines(tmp_path)[1].keys() & {"rewards/chosen", "rewards/rejected", "rewards/margins"} == {
        "rewards/chosen"
    }
