"""The curves of a page: each number where it belongs, long ones thinned without losing a peak, broken values named."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import METRICS, RUN, write_page

from accel_llm.report.page_curves import (
    MAX_CURVE_POINTS,
    MAX_PAGE_POINTS,
    Chart,
    Curve,
    as_metrics,
    chart_data,
    charts_of,
    thin_curve,
)


def test_the_loss_has_its_evaluations_and_the_learning_rate(tmp_path):
    loss, match, norm, speed, memory = write_page(tmp_path, RUN, METRICS).charts()["charts"]
    assert [(curve["label"], curve["kind"], curve["steps"], curve["values"]) for curve in loss["curves"]] == [
        ("train", "train", [1, 50, 100], [4.0, 2.0, 1.23456]),
        ("eval", "eval", [0, 100], [4.0, 1.5]),
        ("learning rate", "rate", [1, 50], [1e-5, 2e-5]),
    ]
    assert (match["title"], match["from_zero"], match["curves"][0]["values"]) == (
        "exact_match",
        False,
        [0.03125, 0.96875],
    )
    assert (norm["title"], norm["from_zero"], norm["curves"][0]["values"]) == ("Gradient norm", True, [3.5, 2.5])
    assert (speed["title"], memory["title"]) == ("Tokens per second", "Peak memory, MiB")


def test_each_measured_number_has_a_chart_with_its_values_in_training(tmp_path):
    lines = [{"step": step, "rewards/margins": step / 8, "loss": 1.0, "kl": 0.5} for step in (1, 2, 3)]
    lines += [{"step": step, "eval/loss": 1.0, "eval/rewards/margins": 0.5} for step in (0, 3)]
    lines += [{"step": 3, "eval/once": 1.0, "eval/supervised_tokens": 3, "eval/perplexity": 2.0}]
    page = write_page(tmp_path, RUN, lines)
    assert [text for text in page.texts("figcaption") if text.endswith("by step")] == [
        "Loss by step", "rewards/margins by step", "kl by step"
    ]  # fmt: skip
    _, margins, kl, *_ = page.charts()["charts"]
    assert [curve["label"] for curve in margins["curves"]] == ["train", "eval"]
    assert [curve["label"] for curve in kl["curves"]] == ["train"]
    # Chart k of the data is drawn into the figure with this number.
    numbers = [attributes["data-chart"] for _, attributes, _ in page.elements if "data-chart" in attributes]
    assert sorted(numbers) == ["0", "1", "2"]


def test_curves_of_several_runs_lie_in_the_same_charts():
    lines = [{"step": 1, "loss": 2.0, "eval/loss": 3.0, "learning_rate": 1e-5}]
    loss, rate, *_ = charts_of({"a": as_metrics(lines), "b": as_metrics([{"step": 5, "loss": 1.0}])})
    assert [(curve.label, curve.kind, curve.run, curve.points) for curve in loss.curves] == [
        ("a: train", "train", 0, [(1, 2.0)]),
        ("a: eval", "eval", 0, [(1, 3.0)]),
        ("b: train", "train", 1, [(5, 1.0)]),
    ]
    assert (rate.title, [curve.label for curve in rate.curves], rate.noise) == ("Learning rate", ["a"], False)
    assert loss.noise


def test_a_value_that_is_not_finite_is_a_gap_and_is_named(tmp_path):
    values = [4.0, 3.0, math.nan, 2.0, math.inf, 1.0]
    page = write_page(tmp_path, {}, [{"step": k, "loss": value} for k, value in enumerate(values)])
    assert page.charts()["charts"][0]["curves"][0]["values"] == [4.0, 3.0, None, 2.0, None, 1.0]
    assert page.texts("span", "wrong") == ["not a finite number at step 2, 4"]
    assert page.tiles()["Final loss"] == ("1", "step 5")
    page = write_page(tmp_path, {}, [{"step": k, "loss": math.nan} for k in range(1, 9)])
    assert page.texts("span", "wrong") == ["not a finite number at step 1, 2, 3, 4, 5 and 3 more"]
    assert page.tiles()["Final loss"] == ("nan", "step 8")
    assert page.texts("figcaption")[0].startswith("Loss: nothing to draw")
    both = [{"step": 1, "loss": 1.0, "learning_rate": 1.0}, {"step": 2, "loss": None, "learning_rate": 1.0}]
    assert write_page(tmp_path, {}, both).texts("span", "wrong") == ["not a finite number at step 2 (train)"]


@settings(deadline=None)
@given(st.lists(st.floats(-1e299, 1e299) | st.just(math.nan), min_size=1, max_size=300), st.integers(10, 80))
def test_thinned_curves_keep_peaks_ends_gaps_and_means(values, limit):
    points = list(enumerate(values))
    drawn, means, size = thin_curve(points, limit)
    assert [step for step, _ in drawn] == sorted({step for step, _ in drawn}) and drawn[0] == points[0]
    assert drawn[-1][0] == points[-1][0] and len(drawn) <= 1.5 * limit + 3
    finite = [value for value in values if not math.isnan(value)]
    kept = [value for _, value in drawn if not math.isnan(value)]
    assert (min(kept), max(kept)) == (min(finite), max(finite)) if finite else not kept
    assert any(math.isnan(value) for _, value in drawn) == any(map(math.isnan, values))
    if size == 1:
        assert drawn == points and not means
        return
    for (step, mean), group in zip(means, groups_with_a_value(points, size), strict=True):
        scale = max(map(abs, (value for _, value in group)))
        assert math.isclose(mean, math.fsum(value / len(group) for _, value in group), abs_tol=1e-9 * scale)
        assert math.isclose(step, sum(at for at, _ in group) / len(group))


def groups_with_a_value(points, size):
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    finite = [[point for point in group if not math.isnan(point[1])] for group in groups]
    return [group for group in finite if group]


def test_a_long_run_is_thinned_and_the_page_says_so(tmp_path):
    lines = [{"step": k, "loss": 1000.0 / k} for k in range(1, 20_002)]
    page = write_page(tmp_path, {}, lines)
    (curve,) = page.charts()["charts"][0]["curves"]
    assert len(curve["steps"]) <= MAX_CURVE_POINTS and (curve["values"][0], curve["steps"][-1]) == (1000.0, 20_001)
    assert curve["points_in_mean"] == 21 and len(curve["means"]["steps"]) == math.ceil(20_001 / 21)
    assert any(text.startswith("Long curves are thinned to about 2,000 points") for text in page.texts("p"))
    short = write_page(tmp_path, {}, lines[:MAX_CURVE_POINTS])
    assert len(short.charts()["charts"][0]["curves"][0]["steps"]) == MAX_CURVE_POINTS
    assert not any("thinned" in text for text in short.texts("p"))


@pytest.mark.parametrize("count", [1, 30, 200])
def test_all_curves_of_a_page_share_its_points(count):
    points = [(float(k), 1.0) for k in range(3000)]
    data, _ = chart_data([Chart("t", [Curve("c", "train", points)] * count)])
    total = sum(len(curve["steps"]) for curve in data[0]["curves"])
    assert total <= 1.1 * MAX_PAGE_POINTS
