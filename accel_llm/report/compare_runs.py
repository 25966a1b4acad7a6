"""Several runs beside one another: their results, and what differs between their settings, data, code and versions."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_llm.errors import ConfigError
from accel_llm.report.page import read_metrics, run_name
from accel_llm.report.page_curves import Metrics, as_metrics, is_drawable, last_step
from accel_llm.report.page_html import format_number
from accel_llm.report.page_sections import measured_memory, seconds_between, short_duration
from accel_llm.system.secrecy import hide_secrets

NOT_COMPARED = {"output_dir", "run_name", "overwrite_output_dir"}  # settings that differ between any two runs
COMPARED_IN_FORCE = ("strategy", "num_processes", "device", "precision", "attention", "optimizer", "loss_path")
MISSING = "-"

# A line of a table: what it is about, and a text for each run.
Line = tuple[str, list[str]]


@dataclass(frozen=True)
class RunFiles:
    """What the files in the folder of a run tell: run.json, and the numbers of metrics.jsonl."""

    folder: Path
    facts: dict[str, Any]
    metrics: Metrics


def read_run(folder: str) -> RunFiles:
    """Read the files of the run in `folder`.

    Raises:
        ConfigError: the folder holds no run.
    """
    file = Path(folder) / "run.json"
    try:
        facts = json.loads(hide_secrets(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise ConfigError(
            f"runs: {folder} holds no run, for its run.json cannot be read ({reason}); give the output_dir of a run."
        ) from None
    if not isinstance(facts, dict) or "status" not in facts:
        raise ConfigError(f"runs: {file} was not written by a run; give the output_dir of a run.")
    return RunFiles(Path(folder), facts, as_metrics(read_metrics(file.with_name("metrics.jsonl"))))


def name_runs(runs: list[RunFiles]) -> dict[str, RunFiles]:
    """Return the runs by their names; those of the same name by their folders.

    Raises:
        ConfigError: a folder is given twice.
    """
    folders = [run.folder.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"runs: {run.folder} is given twice; give each folder once.")
    names = [run_name(run.facts, run.folder) for run in runs]
    return {name if names.count(name) == 1 else str(run.folder): run for name, run in zip(names, runs, strict=True)}


def compare_runs(runs: list[RunFiles]) -> dict[str, list[Line]]:
    """Return tables of what differs, by their title, and of the results, which stand there in any case."""
    return {
        "Results": _result_lines(runs),
        "Settings": differing_lines([_settings(run) for run in runs]),
        "Data": differing_lines([_data(run) for run in runs]),
        "Code": differing_lines([{"git commit": run.facts.get("git_commit")} for run in runs]),
        "Versions": differing_lines([_versions(run) for run in runs]),
        "In force": differing_lines([_in_force(run) for run in runs]),
    }


def comparison_notes(runs: list[RunFiles]) -> list[str]:
    """Return what a reader of the tables should know: code that was not committed, and runs that still go on."""
    notes = []
    dirty = [str(run.folder) for run in runs if str(run.facts.get("git_commit")).endswith("-dirty")]
    if dirty:
        notes.append(
            f"Files were changed since the commit, so the code may differ in other ways too: {', '.join(dirty)}."
        )
    if live := [str(run.folder) for run in runs if run.facts.get("status") == "running"]:
        notes.append(f"Not at its end, or killed: {', '.join(live)}.")
    return notes


def differing_lines(of_runs: list[dict[str, Any]]) -> list[Line]:
    """Return a line for each name whose values are not all equal; a run without the name has a "-"."""
    names = dict.fromkeys(name for values in of_runs for name in values)
    missing = object()
    lines = []
    for name in names:
        values = [values.get(name, missing) for values in of_runs]
        if any(value != values[0] for value in values):
            lines.append((name, [MISSING if value is missing else _as_text(value) for value in values]))
    return lines


def _as_text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(run: RunFiles) -> dict[str, Any]:
    options = run.facts.get("options") or {}
    return {name: value for name, value in options.items() if name not in NOT_COMPARED}


def _data(run: RunFiles) -> dict[str, Any]:
    """Return the hash of the encoded rows, and the counts of each source in the ledger."""
    ledger = run.facts.get("ledger") or {}
    facts: dict[str, Any] = {"hash of the encoded rows": run.facts.get("data")}
    for source, amount in (ledger.get("inputs") or {}).items():
        facts[f"{source}: rows read"] = format_number(amount.get("rows", 0))
        for name, of_bin in ((ledger.get("bins") or {}).get(source) or {}).items():
            tokens = f", {format_number(of_bin.get('supervised', 0))} supervised tokens"
            facts[f"{source}: {name}"] = f"{format_number(of_bin.get('rows', 0))} rows{tokens}"
    return facts


def _versions(run: RunFiles) -> dict[str, Any]:
    return {"python": run.facts.get("python")} | (run.facts.get("packages") or {})


def _in_force(run: RunFiles) -> dict[str, Any]:
    here = run.facts.get("accelerate") or {}
    return {name: here[name] for name in COMPARED_IN_FORCE if name in here}


def _result_lines(runs: list[RunFiles]) -> list[Line]:
    """Return status, steps, losses, evaluated numbers (first, best or last), speed, memory and time of each run."""
    lines = [("status", [str(run.facts.get("status")) for run in runs])]
    lines.append(("last step", [format_number(last_step(run.metrics)) for run in runs]))
    keys = [
        "loss",
        *dict.fromkeys(key for run in runs for key in run.metrics if key.startswith("eval/")),
    ]
    for key in (key for key in keys if not key.endswith("_tokens")):
        lines.append((f"last {key}", [_last(run.metrics.get(key, [])) for run in runs]))
        if key == "eval/loss":
            lines.append((f"lowest {key}", [_of_drawable(run, key, min) for run in runs]))
    lines.append(
        ("tokens per second, median", [_of_drawable(run, "tokens_per_second", statistics.median) for run in runs])
    )
    memory = [measured_memory(run.metrics) for run in runs]
    lines.append(("peak memory, MiB", [MISSING if size is None else format_number(size) for size in memory]))
    seconds = [seconds_between(run.facts.get("started"), run.facts.get("ended")) for run in runs]
    lines.append(("time since its last start", [MISSING if time is None else short_duration(time) for time in seconds]))
    return [(name, values) for name, values in lines if set(values) != {MISSING}]


def _last(points: list[tuple[float, float]]) -> str:
    return format_number(points[-1][1]) if points else MISSING


def _of_drawable(run: RunFiles, key: str, choose: Callable[[list[float]], float]) -> str:
    values = [value for _, value in run.metrics.get(key, []) if is_drawable(value)]
    return format_number(choose(values)) if values else MISSING
