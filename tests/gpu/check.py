"""Prove the project on this machine's GPU: one command, no network, eight minutes at most.

    python tests/gpu/check.py                # all parts
    python tests/gpu/check.py a d c b        # these, in this order
    python tests/gpu/check.py b g --only "fsdp2|zero3 qlora"    # of these the cells whose names match

It prints one line for each cell, with its figure and what is required, and writes tests/gpu/results/DATE-CARD.json anew
after each cell. A part that fails does not stop the others. Without a GPU it runs what can run there and says what it
left out. README.md beside this file says what each part shows and how to prepare a machine without a network.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import features
import launches
import speed
from runner import HERE, ROOT, Cell, Ended, Part, python
from turns import VARIABLE, give_turns

FIRST_PORT = 29600
# Seconds for each part, in the order in which they run. The programs of those in `TIMED` set up beside the others and
# wait for their turn; for these turns `KEPT` seconds of the whole time are kept.
LIMITS = {"a": 120, "d": 120, "c": 120, "b": 240, "g": 210, "e": 360, "f": 360}
TIMED, KEPT = "ef", 90
GPU_ONLY = {"d": "the 8B shape", "e": "the profile", "f": "the comparison with TRL"}


class Job(NamedTuple):
    """A part of a part: it runs commands one after the other and returns its cells."""

    letter: str
    name: str
    work: Callable[[Part], list[Cell]]


class Report:
    """Prints each cell when it is known, and writes the results as JSON."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.lock = path, facts | {"parts": {}}, threading.Lock()
        self.failed, self.cells = 0, {}

    def add(self, letter: str, cells: list[Cell], log: list[str]) -> None:
        with self.lock:
            part = self.facts["parts"].setdefault(letter, {"limit_s": LIMITS[letter], "cells": []})
            self.cells |= {cell.name: cell for cell in cells}
            for cell in cells:
                mark = {True: "ok", False: "FAILED", None: "left out"}[cell.ok]
                self.failed += cell.ok is False
                need = f"  [{cell.required}]" if cell.required else ""
                print(f"{letter}  {mark:8}  {cell.name}: {cell.figure}{need}", flush=True)
                part["cells"].append({k: v for k, v in cell._asdict().items() if v not in (None, "")} | {"ok": cell.ok})
            if log and any(cell.ok is False for cell in cells):
                part["cells"][-1]["log"] = log
            self.write()

    def write(self) -> None:
        self.facts["seconds"] = round(time.monotonic() - STARTED, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.facts, indent=1, default=str) + "\n", encoding="utf-8")


STARTED = time.monotonic()
FIRST_CELLS = 5  # of the matrix: all methods on one GPU; after them comes what has run least


def printed_cells(ended: Ended, name: str) -> list[Cell]:
    """Return the cells that a program printed, and one more if it did not end well."""
    lines = [line.removeprefix("CELL ") for line in ended.text.splitlines() if line.startswith("CELL ")]
    cells = [Cell(**json.loads(line)) for line in lines]
    if ended.code or not cells:
        cells.append(Cell(name, False, ended.cause, "ends with cells and without an error"))
    return cells


def program(name: str, *words: str) -> Callable[[Part], list[Cell]]:
    return lambda part: printed_cells(part.run(name, python(HERE / f"{name}.py", *words)), name)


# --- part a ---


def gpu_tests(part: Part) -> list[Cell]:
    """The suite's own tests that need a GPU, without plugins of the machine that the suite does not know."""
    files = [path for path in sorted((ROOT / "tests").glob("*/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    words = ["-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    ended = part.run("pytest", python(*words, "-W", "default", *files), {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    summary = (re.findall(r"^=*\s*((?:\d+ \w+,? ?)+in .*?)=*$", ended.text, re.M) or [ended.cause])[-1]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.text, re.M)
    figure = summary.strip() + (f"; {', '.join(name.split('::')[-1] for name in failed[:12])}" if failed else "")
    return [Cell("pytest -m gpu", ended.code == 0, figure, "none failed", {"failed": failed} if failed else None)]


# --- all parts ---


def jobs_of(letter: str, gpu: bool, work: Path, ports: Any) -> list[Job]:
    """Return the jobs of one part, the most telling first."""

    def job(name: str, function: Callable[..., list[Cell]], *arguments: Any) -> Job:
        return Job(letter, name, lambda part: function(part, *arguments))

    if letter == "a":
        return [Job("a", "basics", program("basics")), job("pytest", gpu_tests)]
    if letter == "b":
        cells = launches.combinations(gpu)
        jobs = [job(cell.name, launches.check_combination, cell, work, next(ports)) for cell in cells]
        if not gpu:
            return jobs
        more = [job(name, features.check_feature, name, work, next(ports)) for name in features.FEATURES]
        return [*jobs[:FIRST_CELLS], *more, job("out of memory", features.out_of_memory, work), *jobs[FIRST_CELLS:]]
    if letter == "c":
        compared = [job("20 steps", launches.compare_with_cpu, work)] if gpu else []
        return [Job("c", "exact", program("exact")), *compared]
    if letter == "d":
        return [job(name, speed.fits, name, work) for name in speed.FITS]
    if letter == "e":
        return [job(name, speed.profiled, name, work) for name in speed.PROFILES]
    if letter == "f":
        ours = [job(f"{name} unpacked", speed.ours_unpacked, name, work) for name in speed.COMPARED]
        return [*ours, *(job(f"{name} trl", speed.trl, name, work) for name in speed.COMPARED)]
    names = launches.RESUMES if gpu else launches.SMALL_RESUMES
    return [job(name, launches.stop_and_resume, name, work, next(ports)) for name in names]


def do(job: Job, part: Part, report: Report) -> None:
    """Run a job in a thread of its own; an error of this program is a failed cell too."""
    if part.remaining() <= 5:
        return report.add(job.letter, [Cell(job.name, None, "the part's time was up")], [])
    try:
        cells = job.work(part)
    except Exception as error:
        cells = [Cell(job.name, False, f"{type(error).__name__}: {error}"[:300], "no error in check.py")]
    logs = sorted(
        part.logs.glob(f"{job.letter}-{job.name.replace(' ', '-')}*.log"), key=lambda path: path.stat().st_mtime
    )
    tail = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()[-60:] if logs else []
    report.add(job.letter, cells, [line[:300] for line in tail])


def run_parts(letters: str, args: argparse.Namespace, gpu: bool, work: Path, report: Report) -> None:
    """Run the jobs of all parts side by side, those whose programs wait for a turn last."""
    end = STARTED + 60 * args.minutes
    ports = iter(range(FIRST_PORT, 65000, 8))
    kept = KEPT * gpu * bool(set(letters) & set(TIMED))
    jobs: list[tuple[Job, Part]] = []
    for letter in sorted(letters, key=lambda letter: letter in TIMED):
        if not gpu and letter in GPU_ONLY:
            report.add(letter, [Cell(GPU_ONLY[letter], None, "needs a GPU")], [])
            continue
        part = Part(letter, LIMITS[letter] * args.patience, args.logs, end - (0 if letter in TIMED else kept))
        jobs += [(job, part) for job in jobs_of(letter, gpu, work, ports) if re.search(args.only, job.name)]

    running, turns = Running(), work / "turns"
    turns.mkdir()
    os.environ[VARIABLE] = str(turns)
    all_done = threading.Event()
    giver = threading.Thread(target=give_turns, args=(turns, lambda: running.count, all_done.is_set))
    giver.start()
    with ThreadPoolExecutor(args.workers) as pool:
        for job, part in jobs:
            pool.submit(running.run, do, job, part, report)
    all_done.set()
    giver.join()
    if "f" in letters and gpu:
        for name in speed.COMPARED:
            report.add("f", speed.comparison(name, report.cells), [])


class Running:
    """Counts the jobs that run now."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        with self.lock:
            self.count += 1
        try:
            function(*arguments)
        finally:
            with self.lock:
                self.count -= 1


def prepare(work: Path) -> None:
    """Write the rows of the demo, and set what all commands need: no network, one cache, wide tables."""
    from accel_llm.demo.skills import demo_conversations

    rows = demo_conversations("train")[:1000]
    lines = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows)
    (work / "chats.jsonl").write_text(lines, encoding="utf-8")
    features.write_mixture(work / features.MIXTURE)
    os.environ |= {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "4000", "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def machine() -> tuple[str, dict[str, Any]]:
    """Return a short name of the card, and what is written at the top of the results."""
    import platform
    from importlib.metadata import version

    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "trl")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except ImportError:
            continue
    facts = {"card": card, "date": time.strftime("%Y-%m-%d %H:%M"), "python": platform.python_version()}
    short = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")
    return short, facts | {"cores": os.cpu_count(), "packages": versions}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(LIMITS), help="letters of the parts, in their order")
    parser.add_argument("--minutes", type=float, default=8, help="limit for everything together")
    parser.add_argument("--patience", type=float, default=1, help="factor on the limit of each part")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) * 3 // 4)))
    parser.add_argument("--only", default="", help="regular expression that the names of the cells must match")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON file")
    parser.add_argument("--logs", type=Path, help="folder that keeps the output of every command")
    args = parser.parse_args()
    if unknown := set("".join(args.parts)) - LIMITS.keys():
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known are {', '.join(LIMITS)}")
    return args


def main() -> None:
    args = arguments()
    sys.path.append(str(ROOT))
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        args.logs = (args.logs or work / "logs").resolve()
        args.logs.mkdir(parents=True, exist_ok=True)
        short, facts = machine()
        gpu = short != "cpu"
        report = Report(args.results / f"{facts['date'][:10]}-{short}.json", facts)
        print(f"{facts['card']}, {facts['cores']} cores, {args.workers} commands at once", flush=True)
        prepare(work)
        run_parts("".join(args.parts), args, gpu, work, report)
        report.write()
        print(f"{report.failed} failed, {time.monotonic() - STARTED:.0f} s; {report.path}", flush=True)
    sys.exit(report.failed > 0)


if __name__ == "__main__":
    main()
