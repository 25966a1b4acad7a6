"""The curves of one run, or of several over one another: what page.js draws, thinned so that a page stays small."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from accel_llm.report.page_html import cut_text, escape_html, format_number

Point = tuple[float, float]  # (step, value); the value can be NaN or infinite
Metrics = dict[str, list[Point]]  # by the name of the metric, in the order of the steps

# A curve has at most MAX_CURVE_POINTS points, fewer if there are many curves: all of a page share MAX_PAGE_POINTS.
MAX_CURVE_POINTS, MAX_PAGE_POINTS, MIN_CURVE_POINTS = 2_000, 30_000, 40
MAX_CHARTS = 40
# Charts besides those of the loss and of what was measured, whose value axes start at zero: key and title.
SPEED_CHARTS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "peak_memory_mb": "Peak memory, MiB",
}
WITHOUT_NOISE = ("learning_rate", "peak_memory_mb")
# Not drawn by their own names: counted or drawn already, or of no interest as a curve.
UNDRAWN = {"step", "loss", "perplexity", "supervised_tokens", "epoch", *SPEED_CHARTS}


@dataclass(frozen=True)
class Curve:
    """One curve of a chart. `kind` is train, eval, or rate: the learning rate, which has an axis of its own."""

    label: str
    kind: str
    points: list[Point]
    run: int = 0  # number of the run, from 0


@dataclass(frozen=True)
class Chart:
    """Curves by step. With `from_zero` the value axis also covers 0; values of no `noise` are never smoothed."""

    title: str
    curves: list[Curve]
    from_zero: bool = False
    noise: bool = True


def is_drawable(value: Any) -> bool:
    """Return whether `value` is a number that can be drawn. Within the bound, differences are finite."""
    return isinstance(value, int | float) and abs(value) < 1e300


def as_metrics(lines: list[dict[str, Any]]) -> Metrics:
    """Return the numbers in lines of metrics.jsonl by their names; of a step that stands twice, the last one."""
    values: dict[str, dict[float, float]] = {}
    for line in lines:
        step = line["step"]
        for name, value in line.items():
            if isinstance(value, int | float):
                values.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in values.items()}


def last_step(metrics: Metrics) -> float:
    """Return the last step that was logged; 0 without any."""
    return metrics["step"][-1][0] if "step" in metrics else 0


def charts_of(runs: dict[str, Metrics]) -> list[Chart]:
    """Return the charts of the metrics of runs, by the name of the run: the loss, what was measured, and speed.

    Of a single run the chart of the loss also has the learning rate; of several, it has a chart of its own.
    """
    several = len(runs) > 1

    def curves(key: str, kinds: Iterable[str]) -> list[Curve]:
        found = []
        for number, (name, metrics) in enumerate(runs.items()):
            for kind in kinds:
                if points := metrics.get(f"eval/{key}" if kind == "eval" else key):
                    label = f"{name}: {kind}" if several and len(list(kinds)) > 1 else name if several else kind
                    found.append(Curve(label, kind, points, number))
        return found

    loss = curves("loss", ("train", "eval"))
    rates = [] if several else curves("learning_rate", ("train",))
    loss += [replace(curve, label="learning rate", kind="rate") for curve in rates]
    charts = [Chart("Loss", loss)]
    names = (key.removeprefix("eval/") for metrics in runs.values() for key in metrics)
    for name in dict.fromkeys(name for name in names if name not in UNDRAWN and not name.endswith("_tokens")):
        measured = Chart(name, curves(name, ("train", "eval")))
        if any(len(curve.points) > 1 for curve in measured.curves) or (several and measured.curves):
            charts.append(measured)
    speed = {key: title for key, title in SPEED_CHARTS.items() if several or key != "learning_rate"}
    charts = charts[: MAX_CHARTS - len(speed)]
    return charts + [
        Chart(title, curves(key, ("train",)), from_zero=True, noise=key not in WITHOUT_NOISE)
        for key, title in speed.items()
    ]


def chart_figures(charts: list[Chart]) -> str:
    """Return the figures of `charts`; page.js draws chart k, from `chart_data`, into the one with data-chart="k"."""
    figures = []
    for number, chart in enumerate(charts):
        curves = [curve for curve in chart.curves if any(is_drawable(value) for _, value in curve.points)]
        title = escape_html(cut_text(chart.title, 100))
        caption = f"<b>{title}</b> by step" if curves else f"<b>{title}</b>: nothing to draw"
        caption += "".join(_name_broken_steps(chart, curve) for curve in chart.curves)
        plot = f'<div class="plot" data-chart="{number}"></div>' if curves else ""
        look = "box wide" if number == 0 else "box"
        figures.append(f'<figure class="{look}"><figcaption>{caption}</figcaption>{plot}</figure>')
    return f'<div class="grid charts">{"".join(figures)}</div>'


def _name_broken_steps(chart: Chart, curve: Curve) -> str:
    """Return a remark on the steps at which a curve has no finite value."""
    broken = [format_number(step) for step, value in curve.points if not is_drawable(value)]
    if not broken:
        return ""
    steps = ", ".join(broken[:5]) + (f" and {len(broken) - 5:,} more" if len(broken) > 5 else "")
    of_curve = f" ({escape_html(cut_text(curve.label, 100))})" if len(chart.curves) > 1 else ""
    return f' <span class="wrong">not a finite number at step {steps}{of_curve}</span>'


def chart_data(charts: list[Chart]) -> tuple[list[dict[str, Any]], str]:
    """Return the charts as JSON values for page.js, and a sentence if curves were thinned."""
    curves = sum(len(chart.curves) for chart in charts)
    limit = max(MIN_CURVE_POINTS, min(MAX_CURVE_POINTS, MAX_PAGE_POINTS // max(curves, 1)))
    thinned = any(len(curve.points) > limit for chart in charts for curve in chart.curves)
    values = [
        {
            "title": cut_text(chart.title, 100),
            "from_zero": chart.from_zero,
            "noise": chart.noise,
            "curves": [_curve_data(curve, limit) for curve in chart.curves],
        }
        for chart in charts
    ]
    sentence = (
        f"Long curves are thinned to about {limit:,} points: of neighbouring points the smallest and the largest are "
        "drawn, and smoothing takes their mean. metrics.jsonl has all of them."
    )
    return values, sentence if thinned else ""


def _curve_data(curve: Curve, limit: int) -> dict[str, Any]:
    drawn, means, size = thin_curve(curve.points, limit)
    data = {"label": cut_text(curve.label, 100), "kind": curve.kind, "run": curve.run, **_columns(drawn)}
    return data | ({"means": _columns(means), "points_in_mean": size} if size > 1 else {})


def thin_curve(points: list[Point], limit: int) -> tuple[list[Point], list[Point], int]:
    """Return at most about `limit` points of a curve; the mean of each group of neighbours; and the size of a group.

    Of each group the smallest and the largest value stay, so that no peak is lost, and one that is not finite; and the
    first and last point of all. The size is 1, and there are no means, if all points stay.
    """
    if len(points) <= limit:
        return points, [], 1
    size = math.ceil(2 * len(points) / limit)
    groups = math.ceil(len(points) / size)
    # [groups, size]; the last group is filled up with its own last point.
    places = np.minimum(np.arange(groups * size), len(points) - 1).reshape(groups, size)
    steps = np.array([step for step, _ in points], np.float64)[places]
    values = np.array([value if is_drawable(value) else math.nan for _, value in points], np.float64)[places]
    broken = np.isnan(values)
    kept = {0, len(points) - 1}
    for chosen in (np.where(broken, np.inf, values).argmin(1), np.where(broken, -np.inf, values).argmax(1)):
        kept |= set(places[range(groups), chosen].tolist())
    kept |= set(places[range(groups), broken.argmax(1)][broken.any(1)].tolist())

    counted = ~broken & (np.arange(groups * size).reshape(groups, size) < len(points))
    numbers = counted.sum(1)
    shares = counted / np.maximum(numbers, 1)[:, None]  # no sum of shares is larger than the largest value
    mean_steps, mean_values = (
        (np.where(counted, of, 0.0) * shares).sum(1)[numbers > 0].tolist() for of in (steps, values)
    )
    means = list(zip(mean_steps, mean_values, strict=True))
    return [points[k] for k in sorted(kept)], means, size


def _columns(points: list[Point]) -> dict[str, list[float | None]]:
    """Return steps and values, shortened to six digits; null where a value cannot be drawn."""
    steps = [int(step) if float(step).is_integer() else float(f"{step:.9g}") for step, _ in points]
    return {"steps": steps, "values": [float(f"{value:.6g}") if is_drawable(value) else None for _, value in points]}
