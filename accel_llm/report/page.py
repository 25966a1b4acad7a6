"""report.html: a run on one page, built from run.json and metrics.jsonl. It opens from disk, without network."""

import html
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.report.ledger_text import ledger_headings, ledger_lines
from accel_llm.system.disk import write_atomically
from accel_llm.system.secrecy import hide_secrets

Point = tuple[float, float]  # (step, value); the value can be NaN or infinite
Range = tuple[float, float]  # smallest and largest value of an axis

# Width, height and margins of a chart in SVG units. It is about as wide as a phone, so labels keep their size there.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 56, 14, 10, 30
# A line has at most MAX_DOTS dots. With more than MAX_VISIBLE_DOTS points they show only under the pointer.
MAX_DOTS, MAX_VISIBLE_DOTS = 200, 60
MAX_OPEN_SAMPLES = 20  # more samples are folded
# Charts besides that of the loss, whose value axes start at zero: key in metrics.jsonl and title.
METRIC_CHARTS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
# Side of a cell of the confusion matrix in pixels, if counts are written in it and if not; names have at most so many letters.
CELL, SMALL_CELL, MAX_CELLS_WITH_COUNTS, NAME_LETTERS = 46, 18, 12, 24
UNDRAWN = {"loss", "perplexity", "supervised_tokens"}  # evaluated, but drawn already, or of no interest as a curve

STYLE = """
:root { color-scheme: light dark; --train: #0969da; --eval: #bc4c00; --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) {
  :root { background: #0d1117; --train: #58a6ff; --eval: #f0883e; --good: #3fb950; --bad: #f85149; } }
body { margin: 0 auto; max-width: 1080px; padding: 8px 16px; font: 15px/1.5 system-ui; overflow-wrap: anywhere; }
h1 { margin: 0; } h2 { margin-top: 36px; } small, figcaption { font-size: 13px; } small { opacity: 0.75; }
.done, .right { color: var(--good); } .failed, .wrong, .lost { color: var(--bad); } .status, .read { font-weight: 600; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); } .grid .box { margin: 0; }
.box { margin: 0 0 12px; padding: 10px 12px; background: #8881; border: 1px solid #8884; border-radius: 8px; }
.box > b { display: block; font-size: 17px; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
.ledger :is(td, th):nth-child(n+3) { text-align: right; } .ledger th { min-width: 6em; } .pairs th { width: 40%; }
pre { margin: 2px 0 8px; white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; } svg { display: block; }
.scroll { overflow-x: auto; } text { fill: currentColor; font-size: 11px; } line { stroke: #8886; }
path { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round; } circle { fill: currentColor; }
rect { fill: currentColor; stroke: #8884; }
.train { color: var(--train); } .eval { color: var(--eval); } circle.hidden:not(:hover) { fill: transparent; }
"""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from the folder's run.json and metrics.jsonl (which may be missing); return its path.

    Raises:
        FileNotFoundError: there is no run.json.
    """
    run = json.loads(hide_secrets((folder / "run.json").read_text(encoding="utf-8")))
    path = folder / "report.html"
    write_atomically(path, _page(run, read_metrics(folder / "metrics.jsonl"), folder.resolve().name))
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have a step. A null stands for a number that is not finite: NaN."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the run was killed while it wrote its last line
            continue
        if isinstance(line, dict) and _is_drawable(line.get("step")):
            lines.append({key: math.nan if value is None else value for key, value in line.items()})
    return lines


def _page(run: dict[str, Any], lines: list[dict[str, Any]], folder_name: str) -> str:
    """Return the HTML of the page. Each section takes its keys out of `run`; the last one shows what is left."""
    options, python, commit = run.pop("options", None) or {}, run.pop("python", None), run.pop("git_commit", None)
    name = _escape(run.pop("run_name", None) or options.get("run_name") or folder_name)
    status, error = _escape(run.pop("status", None) or "unknown"), run.pop("error", None)
    failures = [error] if error else []
    failures += run.pop("problems", None) or []
    times = ", ".join(f"{key} {_escape(run.pop(key))}" for key in ("started", "ended") if run.get(key))

    losses = {"train": _points(lines, "loss"), "eval": _points(lines, "eval/loss")}
    charts = _charts_of_evaluations(lines)
    charts += [_draw_chart(title, {"train": _points(lines, key)}, 0.0) for key, title in METRIC_CHARTS.items()]
    confusions = run.pop("confusion_matrix", None)
    sections = {
        "Curves": f'<div class="grid charts">{_draw_chart("Loss", losses)}{"".join(charts)}</div>',
        **({"Confusion matrix": _draw_confusions(confusions)} if confusions else {}),
        "Ledger": _ledger_section(run.pop("ledger", None) or {}),
        "Samples": _samples_section(run.pop("samples", None) or []),
        "Settings": _pairs_table(options),
        "In force": _pairs_table(run.pop("accelerate", None) or {}),
        "Versions": _pairs_table({"python": python, "git_commit": commit} | (run.pop("packages", None) or {})),
        "Also recorded": _pairs_table(run),
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n" for title, content in sections.items())
    failure = "".join(f'<pre class="failed">\n{_escape(text)}</pre>' for text in failures)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: {status}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body>
<h1>{name}</h1><p><span class="status {status}">{status}</span> {times}</p>{failure}
<div class="grid">{_headline_tiles(lines)}</div>
{body}</body></html>
"""


def _escape(value: object) -> str:
    """Escape a text for HTML. Half a surrogate pair, which JSON can hold but UTF-8 cannot, becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _is_drawable(value: Any) -> bool:
    """Return whether `value` is a number that can be drawn. Within the bound, differences are finite."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _format_number(value: float, digits: int = 4) -> str:
    """Return a number for people, with so many significant digits: 0.01234, 12.35, 12,346."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e7 else f"{value:,.{digits}g}"


def _points(lines: list[dict[str, Any]], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _headline_tiles(lines: list[dict[str, Any]]) -> str:
    """Return the most important numbers of a run, a box for each; an evaluation has its first and its last value."""
    tiles = [
        ("Final loss", _format_number(value), f"step {_format_number(step)}")
        for step, value in _points(lines, "loss")[-1:]
    ]
    for key in dict.fromkeys(key for line in lines for key in line if key.startswith("eval/")):
        points = _points(lines, key)
        first_and_last = points[:1] + points[1:][-1:]
        if first_and_last and not key.endswith("_tokens"):
            steps = " and ".join(_format_number(step) for step, _ in first_and_last)
            tiles.append((key, " → ".join(_format_number(value) for _, value in first_and_last), f"at step {steps}"))
    if speeds := [speed for _, speed in _points(lines, "tokens_per_second") if _is_drawable(speed)]:
        tiles.append(("Tokens per second", _format_number(statistics.median(speeds)), "median, all processes"))
    if memory := [size for _, size in _points(lines, "peak_memory_mb") if _is_drawable(size)]:
        tiles.append(("Peak memory", f"{_format_number(max(memory))} MiB", "main process"))
    units = {"epoch": "epochs", "supervised_tokens": "supervised tokens"}.items()
    counts = [f"{_format_number(value)} {unit}" for key, unit in units for _, value in _points(lines, key)[-1:]]
    tiles.append(("Steps", _format_number(max((line["step"] for line in lines), default=0)), ", ".join(counts)))
    return "".join(
        f'<div class="box"><small>{_escape(label)}</small><b>{value}</b><small>{note}</small></div>'
        for label, value, note in tiles
    )


def _charts_of_evaluations(lines: list[dict[str, Any]]) -> list[str]:
    """Return a chart for each evaluated number besides the loss (rewards, accuracies), with its values in training."""
    charts = []
    for key in dict.fromkeys(key for line in lines for key in line if key.startswith("eval/")):
        name = key.removeprefix("eval/")
        series = {"train": _points(lines, name), "eval": _points(lines, key)}
        if name not in UNDRAWN and max(map(len, series.values())) > 1:
            charts.append(_draw_chart(_escape(name), series))
    return charts


def _draw_chart(title: str, series: dict[str, list[Point]], *included: float) -> str:
    """Draw a figure with a line and dots for each of `series`. The value axis also covers the values `included`."""
    all_points = [point for points in series.values() for point in points]
    drawable = [point for point in all_points if _is_drawable(point[1])]

    # The caption has the title, the legend, and the steps without a finite value.
    caption = f"{title} by step" if drawable else f"{title}: nothing to draw"
    caption += "".join(f' <span class="{name}">● {name}</span>' for name in series if series[name] and len(series) > 1)
    if broken := [_format_number(step) for step, value in all_points if not _is_drawable(value)]:
        steps_text = ", ".join(broken[:5]) + (f" and {len(broken) - 5:,} more" if len(broken) > 5 else "")
        caption += f' <span class="wrong">not a finite number at step {steps_text}</span>'
    if not drawable:
        return f'<figure class="box"><figcaption>{caption}</figcaption></figure>'

    # The drawing: axes below, then the lines.
    steps = _axis_range([step for step, _ in drawable])
    ticks = _round_ticks(_axis_range([*included, *(value for _, value in drawable)]))
    values = ticks[0], ticks[-1]
    lines = "".join(_draw_line(name, points, steps, values) for name, points in series.items())
    marks = _draw_axes(steps, ticks) + lines
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} by step">{marks}</svg>'
    return f'<figure class="box"><figcaption>{caption}</figcaption>{svg}</figure>'


def _axis_range(numbers: list[float]) -> Range:
    """Return the smallest and largest of `numbers`, moved apart if labels of six digits would look the same."""
    low, high = float(min(numbers)), float(max(numbers))
    largest = max(abs(low), abs(high))
    if high - low > max(1e-4 * largest, 1e-100):
        return low, high
    margin = 0.1 * largest if largest > 1e-90 else 1.0
    return low - margin, high + margin


def _round_ticks(axis: Range) -> list[float]:
    """Return three to six round numbers at equal distances that cover the axis, as closely as round numbers can."""
    low, high = axis
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 4 >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * k:.12g}") for k in range(first, last + 1)]


def _svg_position(step: float, value: float, steps: Range, values: Range) -> tuple[float, float]:
    """Return (x, y) of a point in SVG units, with y downwards, in a chart of these ranges."""
    x = LEFT + (step - steps[0]) / (steps[1] - steps[0]) * (WIDTH - LEFT - RIGHT)
    return x, TOP + (values[1] - value) / (values[1] - values[0]) * (HEIGHT - TOP - BOTTOM)


def _draw_axes(steps: Range, ticks: list[float]) -> str:
    """Draw a horizontal line and a label for each tick of the values, a mark and a label for each tick of the steps."""
    marks = []
    for tick in ticks:
        y = _svg_position(steps[0], tick, steps, (ticks[0], ticks[-1]))[1]
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_format_number(tick, 6)}</text>')
    for tick in (tick for tick in _round_ticks(steps) if steps[0] <= tick <= steps[1] and tick.is_integer()):
        x, y = _svg_position(tick, 0, steps, (0, 1))
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>')
        marks.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{_format_number(tick, 6)}</text>')
    return "".join(marks)


def _draw_line(name: str, points: list[Point], steps: Range, values: Range) -> str:
    """Draw a path through the finite values, with gaps elsewhere, and dots that show their values under the pointer."""
    # In an SVG path "M" moves the pen without drawing and "L" draws a line to the next point.
    path, pen = [], "M"
    for point in points:
        if _is_drawable(point[1]):
            path.append("{}{:.1f},{:.1f}".format(pen, *_svg_position(*point, steps, values)))
        pen = "L" if _is_drawable(point[1]) else "M"
    marks = [f'<path class="{name}" d="{" ".join(path)}"/>']

    # Long runs get a dot at every n-th point, counted from the end, so that the last point always has one.
    drawable = [point for point in points if _is_drawable(point[1])]
    look = f'class="{name}" r="3"' if len(drawable) <= MAX_VISIBLE_DOTS else f'class="{name} hidden" r="5"'
    for step, value in drawable[:: -max(1, math.ceil(len(drawable) / MAX_DOTS))]:
        x, y = _svg_position(step, value, steps, values)
        title = f"<title>step {_format_number(step)}: {_format_number(value)}</title>"
        marks.append(f'<circle {look} cx="{x:.1f}" cy="{y:.1f}">{title}</circle>')
    return "".join(marks) if drawable else ""


def _draw_confusions(confusions: dict[str, Any]) -> str:
    """Draw a table of the classes in which a cell is the stronger the larger its share of the texts of its true class."""
    names, counts = confusions["names"], confusions["counts"]
    cell = CELL if len(names) <= MAX_CELLS_WITH_COUNTS else SMALL_CELL
    short = [name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…" for name in names]
    letters = max(map(cell_len, short))
    left, slope = 12 + 7 * letters, 8 + 5 * letters  # room for the names, those of columns at 45 degrees
    side = cell * len(names)

    marks = []
    for k, name in enumerate(short):
        middle = cell * k + cell / 2
        x, y = left + middle, slope - 4
        marks.append(f'<text x="{left - 6}" y="{slope + middle + 4:.0f}" text-anchor="end">{_escape(name)}</text>')
        marks.append(f'<text x="{x:.0f}" y="{y}" transform="rotate(-45 {x:.0f} {y})">{_escape(name)}</text>')
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            x, y, look = left + cell * j, slope + cell * i, "right" if i == j else "wrong"
            # Up to 0.6 the text on it can be read, in light and dark.
            shade = 0.06 + 0.54 * count / sum(row) if count else 0
            title = f"{_escape(names[i])} taken for {_escape(names[j])}: {count:,}"
            place = f'x="{x}" y="{y}" width="{cell}" height="{cell}"'
            marks.append(f'<rect class="{look}" {place} fill-opacity="{shade:.2f}"><title>{title}</title></rect>')
            if count and cell == CELL:
                x, y = x + cell // 2, y + cell // 2 + 4
                marks.append(f'<text x="{x}" y="{y}" text-anchor="middle">{_format_number(count)}</text>')

    right, rows, classes = (confusions[name] for name in ("right", "rows", "classes"))
    caption = f"Rows are the true classes, columns what the model took a text for. Right: {right:,} of {rows:,} texts."
    if classes > len(names):
        caption += f" Of {classes:,} classes these are the {len(names)} that are most often confused."
    width, height = left + side + slope, slope + side + 4
    svg = f'<svg width="{width}" height="{height}" role="img" aria-label="Confusion matrix">{"".join(marks)}</svg>'
    return f'<figure class="box"><figcaption>{caption}</figcaption><div class="scroll">{svg}</div></figure>'


def _ledger_section(values: dict[str, Any]) -> str:
    ledger = Ledger.from_dict({"inputs": {}, "bins": {}, "turns_without_label": {}, "notes": []} | values)

    headings = ledger_headings(ledger)

    # A line for each source, followed by its bins.
    rows = []
    for source, total in ledger.inputs.items():
        for name, amount in [("read", total), *sorted(ledger.bins.get(source, {}).items(), reverse=True)]:
            look = "lost" if is_lost(name) else name
            cells = [source if name == "read" else "", name, *(f"{amount[quantity]:,}" for quantity in headings)]
            rows.append(f'<tr class="{_escape(look)}">{"".join(f"<td>{_escape(cell)}</td>" for cell in cells)}</tr>')

    # Remarks below the table.
    lost_rows, lost_tokens = ledger.lost_share()
    tokens = f" and {lost_tokens:.2%} of the supervised tokens" if "supervised" in headings else ""
    remarks = [f"{lost_rows:.2%} of the rows{tokens} were cut or dropped."]
    remarks += ledger_lines(ledger)
    paragraphs = "".join(f"<p>{_escape(remark)}</p>" for remark in remarks)

    head = "".join(f"<th>{name}</th>" for name in ("Source", "Bin", *headings.values()))
    table = f'<div class="scroll"><table class="ledger"><tr>{head}</tr>{"".join(rows)}</table></div>{paragraphs}'
    return table if ledger.inputs else "<p>The run wrote no ledger.</p>"


def _samples_section(samples: list[dict[str, Any]]) -> str:
    boxes = [_sample_box(sample) for sample in samples]
    first, rest = "".join(boxes[:MAX_OPEN_SAMPLES]), boxes[MAX_OPEN_SAMPLES:]
    folded = f"<details><summary>{len(rest):,} more</summary>{''.join(rest)}</details>" if rest else ""
    return first + folded or "<p>The run generated no samples.</p>"


def _sample_box(sample: dict[str, Any]) -> str:
    texts = {name: sample[name] for name in ("prompt", "expected", "generated") if sample.get(name) is not None}
    # A browser drops a newline directly after <pre>, so we add one: a text may start with a newline of its own.
    blocks = "".join(f"<small>{name}</small><pre>\n{_escape(text)}</pre>" for name, text in texts.items())
    if "expected" in texts:
        right = texts["expected"] == texts.get("generated")
        blocks += '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    return f'<div class="box">{blocks}</div>'


def _pairs_table(values: dict[str, Any]) -> str:
    """Return a table of names and values, with dicts folded."""
    rows = []
    for name, value in values.items():
        cell = _escape(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))
        if isinstance(value, dict) and value:
            cell = f"<details><summary>{len(value)} values</summary><pre>\n{cell}</pre></details>"
        rows.append(f'<tr><th scope="row">{_escape(name)}</th><td>{cell}</td></tr>')
    table = f'<div class="scroll"><table class="pairs">{"".join(rows)}</table></div>'
    return table if rows else "<p>Nothing was recorded.</p>"
