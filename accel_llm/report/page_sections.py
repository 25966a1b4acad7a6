"""The sections of a run's page: headline numbers, answers, ledger, rows, memory, settings, versions, starts."""

import re
import statistics
from datetime import datetime
from typing import Any

from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.report.ledger_text import ledger_headings, ledger_lines
from accel_llm.report.page_curves import Metrics, is_drawable, last_step
from accel_llm.report.page_html import (
    cut_text,
    escape_html,
    folded,
    format_number,
    join_within,
    pairs_table,
    plain_table,
    preformatted,
)

MAX_TILES = 40
MAX_SECTION_BYTES = 120_000  # of the texts of one section
MAX_OPEN_SAMPLES = 20  # more samples are folded
SHOWN_EVALUATIONS, ANSWER_LETTERS = 6, 500  # answers side by side, and the letters of each


def status_line(run: dict[str, Any], metrics: Metrics, written: str) -> str:
    """Return the status with its times and, while the run goes on, when the page was `written`, as in run.json.

    Takes status, started and ended out of `run`.
    """
    status, started, ended = (run.pop(name, None) for name in ("status", "started", "ended"))
    status = escape_html(status or "unknown")
    times = {"started": started, "ended": ended}
    parts = [f"{name} {escape_html(readable_time(time))}" for name, time in times.items() if time]
    if seconds := seconds_between(started, ended):
        parts.append(f"it took {short_duration(seconds)}")
    if status == "running":
        iso = escape_html(f"{written[:-2]}:{written[-2:]}")  # browsers read no time zone without a colon
        step = format_number(last_step(metrics))
        parts.append(
            f'this page was written <time id="written" datetime="{iso}">{escape_html(readable_time(written))}</time> '
            f"at step {step}; load it again to see more"
        )
    return f'<p><span class="status {status}">{status}</span> {", ".join(parts)}</p>'


def readable_time(time: Any) -> str:
    """Return a time of run.json as people write it, such as 2026-03-01 10:00:00 +0000; any other text as it is."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)([+-]\d{4})$", r"\1 \2 \3", str(time))


def seconds_between(started: Any, ended: Any) -> float | None:
    """Return the seconds between two times as run.json has them, or None."""
    try:
        first, last = (datetime.strptime(str(time), "%Y-%m-%dT%H:%M:%S%z") for time in (started, ended))
    except ValueError:
        return None
    return (last - first).total_seconds()


def short_duration(seconds: float) -> str:
    """Return a time as people say it, such as 12 min 31 s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def headline_tiles(metrics: Metrics) -> str:
    """Return the most important numbers of a run, a box for each; an evaluation has its first and its last value."""
    tiles = [
        ("Final loss", format_number(value), f"step {format_number(step)}")
        for step, value in metrics.get("loss", [])[-1:]
    ]
    for key in list(key for key in metrics if key.startswith("eval/"))[:MAX_TILES]:
        points = metrics.get(key, [])
        first_and_last = points[:1] + points[1:][-1:]
        if first_and_last and not key.endswith("_tokens"):
            steps = " and ".join(format_number(step) for step, _ in first_and_last)
            tiles.append((key, " → ".join(format_number(value) for _, value in first_and_last), f"at step {steps}"))
    if speeds := [speed for _, speed in metrics.get("tokens_per_second", []) if is_drawable(speed)]:
        tiles.append(("Tokens per second", format_number(statistics.median(speeds)), "median, all processes"))
    if memory := measured_memory(metrics):
        tiles.append(("Peak memory", f"{format_number(memory)} MiB", "main process"))
    units = {"epoch": "epochs", "supervised_tokens": "supervised tokens"}.items()
    counts = [f"{format_number(value)} {unit}" for key, unit in units for _, value in metrics.get(key, [])[-1:]]
    tiles.append(("Steps", format_number(last_step(metrics)), ", ".join(counts)))
    boxes = [
        f'<div class="box"><small>{escape_html(cut_text(label, 100))}</small><b>{value}</b><small>{note}</small></div>'
        for label, value, note in tiles
    ]
    return f'<div class="grid">{"".join(boxes)}</div>'


def measured_memory(metrics: Metrics) -> float | None:
    """Return the largest measured peak of the main process in MiB, or None without one."""
    return max((size for _, size in metrics.get("peak_memory_mb", []) if is_drawable(size)), default=None)


# --- answers ------------------------------------------------------------------------------------------------


def answers_section(evaluations: dict[int, list[dict[str, Any]]], samples: list[dict[str, Any]]) -> str:
    """Return the answers to the fixed prompts, those of several evaluations side by side, and the last samples folded.

    `evaluations` are the answers by step (see answers_file.py); a folder of an older version has `samples` alone.
    """
    if not evaluations:
        return _sample_boxes(samples) or "<p>The run generated no samples.</p>"
    steps = _spread(sorted(evaluations), SHOWN_EVALUATIONS)
    # Prompts of the last evaluation come first; those of earlier ones differ if the run went on with other data.
    prompts = dict.fromkeys(answer["prompt"] for step in reversed(steps) for answer in evaluations[step])
    rows = [
        _answer_row(prompt, [(step, _find_answer(evaluations[step], prompt)) for step in steps]) for prompt in prompts
    ]
    joined, left_out = join_within(rows, MAX_SECTION_BYTES, "prompts")
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("prompt", "expected", *(f"step {step:,}" for step in steps))
    )
    note = f"<p>{len(steps)} of {len(evaluations)} evaluations are shown.</p>" if len(steps) < len(evaluations) else ""
    table = f'<div class="scroll"><table class="answers"><tr>{head}</tr>{joined}</table></div>{note}{left_out}'
    last = _sample_boxes(samples)
    return table + (folded(f"All {len(samples):,} samples of the last evaluation", last) if last else "")


def _spread(items: list[Any], count: int) -> list[Any]:
    """Return at most `count` of `items`, evenly spread, the first and the last one among them."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def _find_answer(answers: list[dict[str, Any]], prompt: str) -> dict[str, Any]:
    return next((answer for answer in answers if answer["prompt"] == prompt), {})


def _answer_row(prompt: str, answers: list[tuple[int, dict[str, Any]]]) -> str:
    expected = next((answer["expected"] for _, answer in reversed(answers) if answer.get("expected") is not None), None)
    cells = [preformatted(cut_text(prompt, ANSWER_LETTERS))]
    cells.append("" if expected is None else preformatted(cut_text(expected, ANSWER_LETTERS)))
    for _, answer in answers:
        text = answer.get("generated")
        look = "right" if text is not None and text == answer.get("expected") else ""
        cells.append("" if text is None else preformatted(cut_text(text, ANSWER_LETTERS), look))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _sample_boxes(samples: list[dict[str, Any]]) -> str:
    boxes = [_sample_box(sample) for sample in samples]
    first, rest = boxes[:MAX_OPEN_SAMPLES], boxes[MAX_OPEN_SAMPLES:]
    opened, left_out = join_within(first, MAX_SECTION_BYTES, "samples")
    more, left_out_more = join_within(rest, MAX_SECTION_BYTES, "samples")
    return opened + left_out + (folded(f"{len(rest):,} more", more + left_out_more) if rest else "")


def _sample_box(sample: dict[str, Any]) -> str:
    texts = {name: str(sample[name]) for name in ("prompt", "expected", "generated") if sample.get(name) is not None}
    blocks = "".join(f"<small>{name}</small>{preformatted(cut_text(text, 2_000))}" for name, text in texts.items())
    if "expected" in texts:
        right = texts["expected"] == texts.get("generated")
        blocks += '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    return f'<div class="box">{blocks}</div>'


# --- data ---------------------------------------------------------------------------------------------------


def ledger_section(values: dict[str, Any]) -> str:
    """Return the ledger as a table, a line for each bin of a source, and its remarks below."""
    ledger = Ledger.from_dict({"inputs": {}, "bins": {}, "turns_without_label": {}, "notes": []} | values)
    if not ledger.inputs:
        return "<p>The run wrote no ledger.</p>"
    headings = ledger_headings(ledger)

    # A line for each source, followed by its bins.
    rows = []
    for source, total in ledger.inputs.items():
        for name, amount in [("read", total), *sorted(ledger.bins.get(source, {}).items(), reverse=True)]:
            look = "lost" if is_lost(name) else name
            cells = [source if name == "read" else "", name, *(f"{amount[quantity]:,}" for quantity in headings)]
            cells = [escape_html(cut_text(cell, 300)) for cell in cells]
            rows.append(
                f'<tr class="{escape_html(cut_text(look, 100))}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
            )
    joined, left_out = join_within(rows, MAX_SECTION_BYTES, "lines")

    # Remarks below the table.
    lost_rows, lost_tokens = ledger.lost_share()
    tokens = f" and {lost_tokens:.2%} of the supervised tokens" if "supervised" in headings else ""
    remarks = [f"{lost_rows:.2%} of the rows{tokens} were cut or dropped.", *ledger_lines(ledger)]
    paragraphs, more = join_within(
        (f"<p>{escape_html(cut_text(line, 2_000))}</p>" for line in remarks), MAX_SECTION_BYTES, "remarks"
    )

    head = "".join(f"<th>{name}</th>" for name in ("Source", "Bin", *headings.values()))
    return (
        f'<div class="scroll"><table class="ledger"><tr>{head}</tr>{joined}</table></div>{left_out}{paragraphs}{more}'
    )


def rows_section(rows: dict[str, Any]) -> str:
    """Return the lengths of the rows, whose histogram page.js draws, and a few rows with trained tokens in green."""
    if not rows:
        return "<p>The run recorded no rows.</p>"
    unit, lengths = escape_html(rows["unit"]), rows["lengths"]
    numbers = ", ".join(f"{name} {lengths[name]:,}" for name in ("shortest", "median", "longest"))
    summary = f"<b>Tokens of a {unit}</b>: {numbers}; {rows['count']:,} {unit}s"
    figure = (
        f'<figure class="box wide"><figcaption>{summary}</figcaption><div class="plot" id="lengths"></div></figure>'
    )
    boxes = [_row_box(row) for row in rows["shown"]]
    joined, left_out = join_within(boxes, MAX_SECTION_BYTES, "rows")
    colors = '<span class="trained">trained</span>, <span class="context">context</span>'
    legend = f"<p>The first {unit}s, as the model reads them: {colors}.</p>"
    return figure + legend + joined + left_out


def _row_box(row: dict[str, Any]) -> str:
    """Return a box with a row: its name, and each of its texts, such as chosen and rejected, in runs of equal kind."""
    blocks = [f"<small>{escape_html(cut_text(row['name'], 300))}</small>"]
    for title, parts in row["texts"].items():
        spans = [
            f'<span class="{"trained" if trained else "context"}">{escape_html(text)}</span>' for trained, text in parts
        ]
        heading = f"<small>{escape_html(title)}</small>" if title else ""
        blocks.append(f"{heading}<pre>\n{''.join(spans)}</pre>")
    return f'<div class="box">{"".join(blocks)}</div>'


# --- the machine, and how the run was started ---------------------------------------------------------------


def memory_section(memory: dict[str, Any], metrics: Metrics) -> str:
    """Return the estimate of the memory by term beside the measured peak, both in MiB of the main process."""
    estimated, measured = memory.get("estimated_mb") or {}, measured_memory(metrics)
    if not estimated and measured is None:
        return "<p>Nothing was recorded.</p>"
    sizes = [(str(name), size) for name, size in estimated.items() if is_drawable(size)]
    total = memory.get("peak_memory_mb")
    if is_drawable(total):
        sizes.append(("estimated peak", total))
    if measured is not None:
        sizes.append(("measured peak", measured))
    if is_drawable(memory.get("device_mb")):
        sizes.append(("the device has", memory["device_mb"]))
    largest = max(size for name, size in sizes if name != "the device has" or len(sizes) == 1)
    rows = []
    for name, size in sizes:
        bar = f'<meter min="0" max="{max(largest, 1):g}" value="{min(size, largest):g}"></meter>'
        look = ' class="read"' if name in ("estimated peak", "measured peak") else ""
        cells = f'<th scope="row">{escape_html(cut_text(name, 100))}</th><td>{format_number(size)} MiB</td>'
        rows.append(f"<tr{look}>{cells}<td>{bar if name != 'the device has' else ''}</td></tr>")
    difference = ""
    if is_drawable(total) and total and measured:
        difference = f"<p>The measured peak is {measured / total:.0%} of the estimate.</p>"
    return f'<div class="scroll"><table class="memory">{"".join(rows)}</table></div>{difference}'


def settings_section(options: dict[str, Any], changed: list[str] | None) -> str:
    """Return the settings that differ from the defaults, then all others folded; all, if it is unknown which differ."""
    if changed is None:
        return pairs_table(options)
    first = {name: options[name] for name in options if name in changed}
    others = {name: value for name, value in options.items() if name not in first}
    shown = pairs_table(first) if first else "<p>All settings have their defaults.</p>"
    return shown + folded(f"{len(others)} settings with their defaults", pairs_table(others))


def starts_section(starts: list[dict[str, Any]]) -> str:
    """Return a line for each start of the run: when, from which step, on how many processes, and how it ended."""
    headings = ["Started", "After step", "Processes", "Ended", "Versions that differ from the start before"]
    rows = []
    for start in starts:
        ended = " ".join(readable_time(start[name]) for name in ("status", "ended") if start.get(name))
        differ = [f"{name} {old} → {new}" for name, (old, new) in (start.get("differ") or {}).items()]
        started = readable_time(start["started"]) if start.get("started") else None
        cells = [started, start.get("step"), start.get("processes"), ended or None, ", ".join(differ)]
        rows.append(["" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells])
    return plain_table(headings, rows, "starts") if rows else "<p>Nothing was recorded.</p>"
