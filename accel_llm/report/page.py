"""report.html: a run on one page that opens from disk, drawn from run.json and metrics.jsonl alone."""

import html
import json
import math
import statistics
from pathlib import Path
from typing import Any

from accel_llm.data.ledger import CUT, DROPPED, QUANTITIES, Ledger
from accel_llm.system.disk import write_atomically
from accel_llm.system.secrecy import hide_secrets

Pair = tuple[float, float]  # a point (step, value), the value possibly NaN or infinite; or the ends of a range

# Sizes in SVG units. A chart is about one phone wide, so that its labels keep their size there.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 56, 14, 10, 30
MOST_DOTS, FEW_DOTS, MOST_SAMPLES = 200, 60, 20
# Curves beside the loss, all from zero up: key of metrics.jsonl and heading.
CURVES = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second"}

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
.train { color: var(--train); } .eval { color: var(--eval); } circle.hidden:not(:hover) { fill: transparent; }
"""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from its run.json and, where there is one, its metrics.jsonl; returns the page's path.

    Raises:
        FileNotFoundError: there is no run.json.
    """
    run = json.loads(hide_secrets((folder / "run.json").read_text(encoding="utf-8")))
    path = folder / "report.html"
    write_atomically(path, _page(run, _read_metrics(folder / "metrics.jsonl"), folder.resolve().name))
    return path


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
            continue
        if isinstance(line, dict) and _finite(line.get("step")):
            # What was not finite is written as null, JSON's only word for it.
            lines.append({key: math.nan if value is None else value for key, value in line.items()})
    return lines


def _page(run: dict[str, Any], lines: list[dict[str, Any]], folder_name: str) -> str:
    options, python, commit = run.pop("options", None) or {}, run.pop("python", None), run.pop("git_commit", None)
    name = _text(run.pop("run_name", None) or options.get("run_name") or folder_name)
    status, error = _text(run.pop("status", None) or "unknown"), run.pop("error", None)
    times = ", ".join(f"{key} {_text(run.pop(key))}" for key in ("started", "ended") if run.get(key))
    losses = {"train": _points(lines, "loss"), "eval": _points(lines, "eval/loss")}
    charts = [_chart(title, {"train": _points(lines, key)}, 0.0) for key, title in CURVES.items()]
    sections = {
        "Curves": f'<div class="grid charts">{_chart("Loss", losses)}{"".join(charts)}</div>',
        "Ledger": _ledger(run.pop("ledger", None) or {}),
        "Samples": _samples(run.pop("samples", None) or []),
        "Settings": _pairs(options),
        "In force": _pairs(run.pop("accelerate", None) or {}),
        "Versions": _pairs({"python": python, "git_commit": commit} | (run.pop("packages", None) or {})),
        "Also recorded": _pairs(run),  # what no section above took
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n" for title, content in sections.items())
    failure = f'<pre class="failed">\n{_text(error)}</pre>' if error else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: {status}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body>
<h1>{name}</h1><p><span class="status {status}">{status}</span> {times}</p>{failure}
<div class="grid">{_headline(lines)}</div>
{body}</body></html>
"""


def _text(value: object) -> str:
    """Escaped for HTML; half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _finite(value: Any) -> bool:
    """Whether `value` is a number that can be drawn; the bound keeps the difference of two such numbers finite."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _figure(value: float, digits: int = 4) -> str:
    """A number as a person reads it, of so many significant digits: 0.01234, 12.35, 12,346."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e7 else f"{value:,.{digits}g}"


def _points(lines: list[dict[str, Any]], key: str) -> list[Pair]:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _headline(lines: list[dict[str, Any]]) -> str:
    """The numbers that a run is judged by; of an evaluation the first value and the last."""
    tiles = [("Final loss", _figure(value), f"step {_figure(step)}") for step, value in _points(lines, "loss")[-1:]]
    for key in dict.fromkeys(key for line in lines for key in line if key.startswith("eval/")):
        points = _points(lines, key)
        ends = points[:1] + points[1:][-1:]
        if ends and not key.endswith("_tokens"):
            steps = " and ".join(_figure(step) for step, _ in ends)
            tiles.append((key, " → ".join(_figure(value) for _, value in ends), f"at step {steps}"))
    if speeds := [speed for _, speed in _points(lines, "tokens_per_second") if _finite(speed)]:
        tiles.append(("Tokens per second", _figure(statistics.median(speeds)), "median, all processes"))
    if memory := [size for _, size in _points(lines, "peak_memory_mb") if _finite(size)]:
        tiles.append(("Peak memory", f"{_figure(max(memory))} MiB", "main process"))
    counts = {"epoch": "epochs", "supervised_tokens": "supervised tokens"}.items()
    reached = [f"{_figure(value)} {unit}" for key, unit in counts for _, value in _points(lines, key)[-1:]]
    tiles.append(("Steps", _figure(max((line["step"] for line in lines), default=0)), ", ".join(reached)))
    return "".join(f'<div class="box"><small>{_text(a)}</small><b>{b}</b><small>{c}</small></div>' for a, b, c in tiles)


def _chart(title: str, series: dict[str, list[Pair]], *included: float) -> str:
    """A figure with a dotted line for each of `series`; the axis of its values also holds those `included`."""
    drawn = [point for points in series.values() for point in points if _finite(point[1])]
    caption = f"{title} by step" if drawn else f"{title}: nothing to draw"
    caption += "".join(f' <span class="{name}">● {name}</span>' for name in series if series[name] and len(series) > 1)
    if broken := [_figure(step) for points in series.values() for step, value in points if not _finite(value)]:
        shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5:,} more" if len(broken) > 5 else "")
        caption += f' <span class="wrong">not a finite number at step {shown}</span>'
    if not drawn:
        return f'<figure class="box"><figcaption>{caption}</figcaption></figure>'
    steps = _spread([step for step, _ in drawn])
    ticks = _ticks(_spread([*included, *(value for _, value in drawn)]))
    values = ticks[0], ticks[-1]
    marks = _axes(steps, ticks) + "".join(_line(name, points, steps, values) for name, points in series.items())
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} by step">{marks}</svg>'
    return f'<figure class="box"><figcaption>{caption}</figcaption>{svg}</figure>'


def _spread(numbers: list[float]) -> Pair:
    """Smallest and largest of `numbers`, moved apart where labels of six digits could not tell them."""
    low, high = float(min(numbers)), float(max(numbers))
    largest = max(abs(low), abs(high))
    if high - low > max(1e-4 * largest, 1e-100):
        return low, high
    margin = 0.1 * largest if largest > 1e-90 else 1.0
    return low - margin, high + margin


def _ticks(span: Pair) -> list[float]:
    """Three to six round numbers at even distances, from the span's start or just below it to its end or just above."""
    low, high = span
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 4 >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * k:.12g}") for k in range(first, last + 1)]


def _place(step: float, value: float, steps: Pair, values: Pair) -> Pair:
    """(x, y) in SVG units, y downwards, of a point in a chart of these ranges."""
    x = LEFT + (step - steps[0]) / (steps[1] - steps[0]) * (WIDTH - LEFT - RIGHT)
    return x, TOP + (values[1] - value) / (values[1] - values[0]) * (HEIGHT - TOP - BOTTOM)


def _axes(steps: Pair, ticks: list[float]) -> str:
    marks = []
    for tick in ticks:
        y = _place(steps[0], tick, steps, (ticks[0], ticks[-1]))[1]
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_figure(tick, 6)}</text>')
    for tick in (tick for tick in _ticks(steps) if steps[0] <= tick <= steps[1] and tick.is_integer()):
        x, y = _place(tick, 0, steps, (0, 1))
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>')
        marks.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{_figure(tick, 6)}</text>')
    return "".join(marks)


def _line(name: str, points: list[Pair], steps: Pair, values: Pair) -> str:
    """A path through every finite value, with gaps at the others; dots that tell their value, thinned on long runs."""
    path, pen = [], "M"
    for point in points:
        if _finite(point[1]):
            path.append("{}{:.1f},{:.1f}".format(pen, *_place(*point, steps, values)))
        pen = "L" if _finite(point[1]) else "M"
    shown = [point for point in points if _finite(point[1])]
    look = f'class="{name}" r="3"' if len(shown) <= FEW_DOTS else f'class="{name} hidden" r="5"'
    marks = [f'<path class="{name}" d="{" ".join(path)}"/>']
    for step, value in shown[:: -max(1, math.ceil(len(shown) / MOST_DOTS))]:  # from the end: the last always stays
        x, y = _place(step, value, steps, values)
        title = f"<title>step {_figure(step)}: {_figure(value)}</title>"
        marks.append(f'<circle {look} cx="{x:.1f}" cy="{y:.1f}">{title}</circle>')
    return "".join(marks) if shown else ""


def _ledger(written: dict[str, Any]) -> str:
    ledger = Ledger.from_dict({"inputs": {}, "bins": {}, "turns_without_label": {}, "notes": []} | written)
    rows = []
    for source, held in ledger.inputs.items():
        for bin, amount in [("read", held), *sorted(ledger.bins.get(source, {}).items(), reverse=True)]:
            look = "lost" if bin.split(":")[0] in (CUT, DROPPED) else bin
            cells = [source if bin == "read" else "", bin, *(f"{amount[quantity]:,}" for quantity in QUANTITIES)]
            rows.append(f'<tr class="{_text(look)}">{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>')
    lost_rows, lost_tokens = ledger.lost_share()
    remarks = [f"{lost_rows:.2%} of the rows and {lost_tokens:.2%} of the supervised tokens were cut or dropped."]
    remarks += [f"{count:,} turns without a label: {reason}" for reason, count in ledger.turns.items()] + ledger.notes
    remarks += [f"dropped, {reason}: {one}" for reason, some in ledger.examples.items() for one in some]
    told = "".join(f"<p>{_text(remark)}</p>" for remark in remarks)
    head = "".join(f"<th>{name}</th>" for name in ("Source", "Bin", "Rows", "Supervised tokens", "Context tokens"))
    table = f'<div class="scroll"><table class="ledger"><tr>{head}</tr>{"".join(rows)}</table></div>{told}'
    return table if ledger.inputs else "<p>The run wrote no ledger.</p>"


def _samples(samples: list[dict[str, Any]]) -> str:
    blocks = [_sample(sample) for sample in samples]
    rest = f"<details><summary>{len(blocks) - MOST_SAMPLES:,} more</summary>{''.join(blocks[MOST_SAMPLES:])}</details>"
    shown = blocks[:MOST_SAMPLES] + [rest] * (len(blocks) > MOST_SAMPLES)
    return "".join(shown) or "<p>The run generated no samples.</p>"


def _sample(sample: dict[str, Any]) -> str:
    texts = {name: sample[name] for name in ("prompt", "expected", "generated") if sample.get(name) is not None}
    # A browser drops a newline that directly follows <pre>, so one is given to it.
    blocks = "".join(f"<small>{name}</small><pre>\n{_text(text)}</pre>" for name, text in texts.items())
    if "expected" in texts:
        right = texts["expected"] == texts.get("generated")
        blocks += '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    return f'<div class="box">{blocks}</div>'


def _pairs(values: dict[str, Any]) -> str:
    """Names and values as a table; what holds values of its own is folded."""
    rows = []
    for name, value in values.items():
        cell = _text(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))
        if isinstance(value, dict) and value:
            cell = f"<details><summary>{len(value)} values</summary><pre>\n{cell}</pre></details>"
        rows.append(f'<tr><th scope="row">{_text(name)}</th><td>{cell}</td></tr>')
    table = f'<div class="scroll"><table class="pairs">{"".join(rows)}</table></div>'
    return table if rows else "<p>Nothing was recorded.</p>"
