"""report.html: a run on one page, from the files in its folder. It opens from disk, without network; see README.md."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from accel_llm.report.answers_file import read_answers
from accel_llm.report.page_confusion import draw_confusions
from accel_llm.report.page_curves import Metrics, as_metrics, chart_data, chart_figures, charts_of, is_drawable
from accel_llm.report.page_html import (
    cut_text,
    escape_html,
    folded,
    join_within,
    page_document,
    pairs_table,
    preformatted,
)
from accel_llm.report.page_sections import (
    answers_section,
    headline_tiles,
    ledger_section,
    memory_section,
    rows_section,
    settings_section,
    starts_section,
    status_line,
)
from accel_llm.system.disk import write_atomically
from accel_llm.system.secrecy import hide_secrets

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
CONTROLS = """<form id="controls" hidden>
<label>Smoothing <select id="smoothing"><option value="0">none</option><option>0.6</option><option>0.9</option>
<option>0.97</option><option>0.99</option></select></label>
<label><input type="checkbox" id="log"> log axis</label>
<label>Steps <input type="number" id="first" aria-label="first step"></label>
<label>to <input type="number" id="last" aria-label="last step"></label>
<button type="button" id="all">all steps</button>
<small>Drag in a chart to zoom, double-click for all steps, click on a name in a legend to hide it.</small></form>
<noscript><p>The curves need JavaScript, which is turned off.</p></noscript>
"""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html; return its path. Raises the errors of `report_page`."""
    path = folder / "report.html"
    write_atomically(path, report_page(folder))
    return path


def report_page(folder: Path) -> str:
    """Return the page of a run from the folder's run.json and, where they are, metrics.jsonl and answers.jsonl.

    Raises:
        FileNotFoundError: there is no run.json.
    """
    run = json.loads(hide_secrets((folder / "run.json").read_text(encoding="utf-8")))
    return _page(run, as_metrics(read_metrics(folder / "metrics.jsonl")), folder)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have a step. A null stands for a number that is not finite: NaN."""
    if not path.is_file():
        return []
    lines = [
        line
        for line in _parse_lines(path.read_text(encoding="utf-8", errors="replace"))
        if isinstance(line, dict) and is_drawable(line.get("step"))
    ]
    for line in lines:
        if None in line.values():
            line |= {key: math.nan for key, value in line.items() if value is None}
    return lines


def _parse_lines(text: str) -> list[Any]:
    """Return the JSON values in the lines of `text`, without lines that hold none."""
    texts = [line for line in text.split("\n") if line.strip()]
    try:
        return json.loads(f"[{','.join(texts)}]")  # three times as fast as line by line
    except ValueError:  # the run was killed while it wrote its last line
        values = []
        for line in texts:
            with suppress(ValueError):
                values.append(json.loads(line))
        return values


def run_name(run: dict[str, Any], folder: Path) -> str:
    """Return the name of a run: its own, else the option, else that of its folder."""
    return str(run.get("run_name") or (run.get("options") or {}).get("run_name") or folder.resolve().name)


def _page(run: dict[str, Any], metrics: Metrics, folder: Path) -> str:
    """Return the HTML of the page. Each section takes its keys out of `run`; the last one shows what is left."""
    name, status = cut_text(run_name(run, folder), 200), cut_text(str(run.get("status") or "unknown"), 100)
    run.pop("run_name", None)
    options, rows = (run.pop(key, None) or {} for key in ("options", "rows"))
    starts: list[dict[str, Any]] = run.pop("starts", None) or []
    if starts and "status" not in starts[-1]:  # how the last start ended, run.json tells of the run
        starts[-1] |= {name: run[name] for name in ("status", "ended") if run.get(name)}
    error, problems = run.pop("error", None), run.pop("problems", None) or []
    failures = [preformatted(cut_text(str(text), 5_000), "failed") for text in [*([error] if error else []), *problems]]
    top = status_line(run, metrics, time.strftime(TIME_FORMAT)) + "".join(join_within(failures, 100_000, "problems"))

    charts = charts_of({name: metrics})
    drawn, thinned = chart_data(charts)
    data = {"charts": drawn, "marks": _marks(starts), "lengths": rows.get("lengths")}
    versions = {"python": run.pop("python", None), "git_commit": run.pop("git_commit", None)}
    confusions = run.pop("confusion_matrix", None)
    checkpoints = ", ".join(path.name for path in sorted(folder.glob("checkpoints/step-*")))
    sections = {
        "Curves": f"{CONTROLS}{chart_figures(charts)}<p>{thinned}</p>",
        **({"Confusion matrix": draw_confusions(confusions)} if confusions else {}),
        "Answers": answers_section(read_answers(folder), run.pop("samples", None) or []),
        "Ledger": ledger_section(run.pop("ledger", None) or {}),
        "Rows": rows_section(rows),
        "Memory": memory_section(run.pop("memory", None) or {}, metrics),
        "Settings": settings_section(options, run.pop("changed_options", None)),
        "Starts": starts_section(starts),
        "In force": _folded_pairs(run.pop("accelerate", None) or {}),
        "Versions": pairs_table(versions | (run.pop("packages", None) or {})),
        "Also recorded": pairs_table(run | ({"checkpoints": checkpoints} if checkpoints else {})),
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n" for title, content in sections.items())
    heading = f"<h1>{escape_html(name)}</h1>{top}{headline_tiles(metrics)}\n"
    return page_document(f"{name}: {status}", heading + body, data)


def _folded_pairs(values: dict[str, Any]) -> str:
    return folded(f"{len(values)} values", pairs_table(values)) if values else pairs_table(values)


def _marks(starts: list[dict[str, Any]]) -> list[int]:
    """Return the steps at which the run was started again, for lines in the charts."""
    return [start["step"] for start in starts if isinstance(start.get("step"), int) and start["step"]][-100:]
