"""The warning that chosen answers become steadily less likely: once in a run, and never where they become more likely."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_llm.config.preference_options import DpoOptions, KtoOptions
from accel_llm.data.stream import TrainingPlan
from accel_llm.report.likelihood import LINES, ChosenLikelihood, falls_steadily
from accel_llm.report.metrics import Meter
from accel_llm.report.record import Record


def test_variance_is_that_of_all_orders() -> None:
    """That of the formula in `falls_steadily`, for 6 values."""
    surplus = [
        sum(np.sign(b - a) for a, b in itertools.combinations(order, 2)) for order in itertools.permutations(range(6))
    ]
    assert np.mean(surplus) == 0 and np.var(surplus) == pytest.approx(6 * 5 * 17 / 18)


def test_ten_lines_must_fall_without_exception_and_by_enough() -> None:
    falling = [-0.02 * k for k in range(10)]  # by 0.16 from the first two to the last two
    assert falls_steadily(falling)
    assert not falls_steadily(falling[:9])
    assert not falls_steadily([0.5 * value for value in falling])
    assert not falls_steadily([falling[1], falling[0], *falling[2:]])  # 44 of 45 pairs are not enough
    assert not falls_steadily(falling[::-1])


def lines_until_warning(values: np.ndarray) -> int | None:
    likelihood = ChosenLikelihood(DpoOptions())
    return next((k for k, value in enumerate(values) if likelihood.add({"step": k, "rewards/chosen": value})), None)


@pytest.mark.parametrize("slope", [0.0, 0.005])
def test_noise_and_a_noisy_rise_give_no_warning(slope: float) -> None:
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(0, 0.3, 150)
        assert lines_until_warning(slope * np.arange(150) + noise) is None


def test_a_noisy_fall_gives_one_even_late_in_a_run() -> None:
    rng = np.random.default_rng(0)
    falling = rng.normal(0, 0.3, 200) - 0.01 * np.arange(200)
    early, late = lines_until_warning(falling), lines_until_warning(np.concatenate([rng.normal(0, 0.3, 300), falling]))
    assert early is not None and 30 < early < LINES
    assert late is not None and 300 < late < 300 + LINES


def test_the_sentence_fits_the_options() -> None:
    def sentence(options: DpoOptions | KtoOptions) -> str | None:
        likelihood = ChosenLikelihood(options)
        made = [likelihood.add({"step": k, "rewards/chosen": -0.1 * k}) for k in range(1, 30)]
        assert sum(made) <= 1
        return likelihood.warning

    start = (
        "chosen answers become less and less likely: their mean reward fell by 0.8 up to step 10. If good answers must"
    )
    assert sentence(DpoOptions()) == (
        f"{start} stay likely, lower learning_rate, raise beta or set rpo_alpha, which trains on them too (arXiv 2402.13228)."
    )
    assert "lower learning_rate or set rpo_alpha" in str(sentence(DpoOptions(loss_type=["simpo"])))
    assert "raise rpo_alpha" in str(sentence(DpoOptions(rpo_alpha=0.1)))
    assert "lower learning_rate, raise beta or raise desirable_weight" in str(sentence(KtoOptions()))
    assert sentence(DpoOptions(loss_type=["apo_down"])) is None  # it lowers them on purpose


def test_a_run_says_it_once_also_if_it_is_resumed(accelerator, tmp_path: Path, capsys) -> None:
    options = DpoOptions(output_dir=str(tmp_path), logging_steps=1)

    def run(first: int, last: int) -> None:
        record = Record(tmp_path, True)
        meter = Meter(accelerator, options, TrainingPlan(4, 2, None, 20), record, first)
        for step in range(first + 1, last + 1):
            values = torch.tensor([-0.1 * step if step > 1 else float("nan"), 1.0], dtype=torch.float64)
            batch = {"total_weight": 1.0, "num_targets": 1, "lengths": [2], "measured": {"rewards/chosen": values}}
            meter.add(torch.tensor(1.0), batch)
            meter.log(step, 0.1, 1.0)
        record.update(status="done")

    def warnings() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]

    run(0, 20)
    whole, said = json.loads((tmp_path / "run.json").read_text())["warning"], warnings()
    assert said == [f"warning: {whole}"] and "up to step 11." in whole
    for stop, again in ((10, 1), (11, 0), (15, 0)):
        run(stop, 20)
        assert len(warnings()) == again
        assert json.loads((tmp_path / "run.json").read_text())["warning"] == whole
