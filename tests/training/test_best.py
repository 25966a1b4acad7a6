"""Which evaluation is the best: the lower one of losses and errors, else the higher one."""

import typing

import pytest

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.training.best import LOWER_IS_BETTER, Best

NAMES = typing.get_args(typing.get_args(ClassifyOptions.model_fields["metric_for_best_model"].annotation)[0])


@pytest.mark.parametrize("metric", NAMES)
def test_an_error_is_better_if_it_is_lower_and_all_else_if_it_is_higher(metric: str) -> None:
    lower = metric.removeprefix("eval/") in ("loss", "log_loss", "calibration_error", "mse", "mae")
    best = Best().after(1, 0.5, metric).after(2, 0.25, metric).after(3, 0.75, metric)
    assert best.step == (2 if lower else 3) and (metric in LOWER_IS_BETTER) == lower
    assert best.after(4, float("nan"), metric).step == best.step


def test_every_metric_of_classifiers_is_known() -> None:
    assert len(NAMES) == 12 and set(NAMES) >= LOWER_IS_BETTER
