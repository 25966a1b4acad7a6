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

import launches
from runner import ROOT, Cell, Ended, Part, python

HERE = Path(__file__).resolve().parent

FIRST_PORT = 29600
# Seconds for each part, in the order in which they run. Those marked alone need the machine for themselves; for each of
# them so many seconds of the whole time are kept.
LIMITS = {"a": 100, "d": 100, "c": 90, "b": 170, "g": 110, "e": 140, "f": 110}
ALONE, KEPT = "ef", 100
GPU_ONLY = {"d": "the 8B shape", "e": "the profile", "f": "the comparison with TRL"}
MEMORY_LIMIT = 7.5  # GiB
TRAINED_8B = "--method qlora --precision bf16 --gradient_checkpointing --max_length 2048 --train_on all"
EIGHT_BILLION = "meta-llama/Llama-3.1-8B-Instruct"


class Job(NamedTuple):
    """A part of a part: it runs commands one after the other and returns its cells."""

    letter: str
    name: str
    work: Callable[[Part], list[Cell]]


class Report:
    """Prints each cell when it is known, and writes the results as JSON."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.lock = path, facts | {"parts": {}}, threading.Lock()
        self.failed = 0

    def add(self, letter: str, cells: list[Cell], log: list[str]) -> None:
        with self.lock:
            part = self.facts["parts"].setdefault(letter, {"limit_s": LIMITS[letter], "cells": []})
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


# --- parts d and e ---


def shape(part: Part, name: str, size: str, options: str, work: Path, *more: str) -> tuple[Ended, dict[str, Any]]:
    """Train a model of a published shape with random weights, and return what was measured."""
    folder = work / f"shape-{name.replace(' ', '-')}"
    words = [size, "--folder", str(folder), *more, *options.split(), "--overwrite_output_dir"]
    ended = part.run(name, python(HERE / "shapes.py", *words))
    measured = re.findall(r"^MEASURED (.*)$", ended.text, re.M)
    return ended, json.loads(measured[-1]) if measured else {}


def eight_billion(part: Part, name: str, options: str, limit: float | None, work: Path) -> list[Cell]:
    """Memory of QLoRA on the 8B shape, with and without a limit on what the process may take."""
    limited = ["--limit_gib", str(limit)] if limit else []
    ended, facts = shape(part, name, "llama_8b", f"{TRAINED_8B} --max_steps 4 {options}", work, *limited)
    if not facts:
        return [Cell(name, False, ended.cause, f"at most {MEMORY_LIMIT} GiB")]
    peak, reserved = facts["peak_allocated_gib"], facts["peak_reserved_gib"]
    steps = len(facts.get("losses", []))
    figure = (
        f"peak {peak:.2f} GiB, reserved {reserved:.2f}, after {steps} lines of "
        f"metrics; weights {facts.get('after_assemble_model', {}).get('now_gib', 0):.2f}; estimated {estimate():.2f}"
        f"; expandable segments: {facts.get('expandable')}"
    )
    if "out_of_memory" in facts:
        figure = f"out of memory; {figure}"
    good = reserved <= MEMORY_LIMIT and steps > 0 and "out_of_memory" not in facts
    return [Cell(name, good, figure, f"at most {MEMORY_LIMIT} GiB", facts)]


def estimate() -> float:
    """Return the GiB that tests/proofs/memory.py estimates for the 8B shape, without CUDA's own memory."""
    import memory

    from accel_llm.config.options import TrainOptions

    values = {"model_name_or_path": EIGHT_BILLION, "method": "qlora", "gradient_checkpointing": True}
    parts = memory.parts(TrainOptions(**values, max_length=2048))
    return sum(size for term, size in parts.items() if term != "CUDA") / 2**30


def profiled(part: Part, name: str, size: str, options: str, work: Path) -> list[Cell]:
    """A profiled step: waits of the host, launches, and the share of the time in which the device works."""
    required = "less than 2 waits a step"
    ended, facts = shape(part, name, size, f"{options} --max_steps 8 --logging_steps 100", work, "--profile")
    if "waits_a_step" not in facts:
        return [Cell(name, False, ended.cause, required, facts)]
    figure = (
        f"{facts['tokens_a_second']:,.0f} tokens/s, {facts['ms_a_step']:.0f} ms/step, busy {facts['busy_share']:.0%}, "
        f"a step: {facts['waits_a_step']:.0f} waits, {facts['copies_to_host_a_step']:.0f} copies to the host, "
        f"{facts['launches_a_step']:,.0f} launches; peak {facts['peak_allocated_gib']:.2f} GiB"
    )
    return [Cell(name, facts["waits_a_step"] < 2, figure, required, facts)]


# --- part f ---


def beside_trl(part: Part, how: str, size: str, work: Path) -> list[Cell]:
    """LoRA with the same rows, weights and settings, here and in TRL: the speed, the memory and the first loss."""
    packed = how == "packed"
    options = "--method lora --precision bf16 --max_length 2048 --train_on all --order source --max_steps 7"
    options += " --logging_steps 1" + ("" if packed else " --packing false --per_device_train_batch_size 16")
    ended, ours = shape(part, how, size, options, work)
    words = [size, "--folder", str(work / f"trl-{how}"), *(["--packing"] if packed else [])]
    trl = part.run(f"{how} trl", python(HERE / "beside.py", *words))
    measured = re.findall(r"^MEASURED (.*)$", trl.text, re.M)
    if not ours or not measured:
        return [Cell(how, False, ended.cause if not ours else f"TRL: {trl.cause}", "both run")]
    theirs = json.loads(measured[-1])
    texts = [
        f"{name} {facts['tokens_a_second']:,.0f} tokens/s, {facts.get('peak_allocated_gib', 0):.2f} GiB, first loss "
        f"{facts['losses'][0]:.4f}"
        for name, facts in (("here", ours), ("TRL", theirs))
    ]
    # Packed rows hold other documents in the two programs, so their first losses are only near.
    near = abs(ours["losses"][0] - theirs["losses"][0]) < 0.02
    return [Cell(how, near, "; ".join(texts), "first losses within 0.02", {"here": ours, "trl": theirs})]


# --- all parts ---


def jobs_of(letter: str, gpu: bool, work: Path, ports: Any) -> list[Job]:
    """Return the jobs of one part, the most telling first."""

    def job(name: str, function: Callable[..., list[Cell]], *arguments: Any) -> Job:
        return Job(letter, name, lambda part: function(part, *arguments))

    if letter == "a":
        return [Job("a", "basics", program("basics")), job("pytest", gpu_tests)]
    if letter == "b":
        cells = launches.combinations(gpu)
        return [job(cell.name, launches.check_combination, cell, work, next(ports)) for cell in cells]
    if letter == "c":
        compared = [job("20 steps", launches.compare_with_cpu, work)] if gpu else []
        return [Job("c", "exact", program("exact")), *compared]
    if letter == "d":
        cases = {"8B adamw": ("", None), "8B adamw 7.5 GiB": ("", MEMORY_LIMIT)}
        cases["8B adamw_8bit 7.5 GiB"] = ("--optim adamw_8bit", MEMORY_LIMIT)
        return [job(name, eight_billion, name, options, limit, work) for name, (options, limit) in cases.items()]
    if letter == "e":
        small = "--precision bf16 --max_length 2048 --train_on all"
        cases = {
            "8B qlora": ("llama_8b", TRAINED_8B),
            "0.6B lora": ("qwen3_0.6b", f"--method lora {small}"),
            "0.6B full": ("qwen3_0.6b", f"--method full {small}"),
        }
        return [job(name, profiled, name, size, options, work) for name, (size, options) in cases.items()]
    if letter == "f":
        return [job(how, beside_trl, how, "qwen3_0.6b", work) for how in ("packed", "unpacked")]
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
    """Run the jobs of all parts side by side, but those of `ALONE` one by one."""
    end = STARTED + 60 * args.minutes
    ports = iter(range(FIRST_PORT, 65000, 8))
    pool, waiting = ThreadPoolExecutor(args.workers), []
    for place, letter in enumerate(letters):
        kept = KEPT * sum(later in ALONE for later in letters[place + 1 :]) * gpu
        part = Part(letter, LIMITS[letter] * args.patience, args.logs, end - kept)
        if not gpu and letter in GPU_ONLY:
            report.add(letter, [Cell(GPU_ONLY[letter], None, "needs a GPU")], [])
            continue
        if letter in ALONE:
            for future in waiting:
                future.result()
            waiting = []
        for job in jobs_of(letter, gpu, work, ports):
            if not re.search(args.only, job.name):
                continue
            if letter in ALONE:
                do(job, part, report)
            else:
                waiting.append(pool.submit(do, job, part, report))
    for future in waiting:
        future.result()
    pool.shutdown()


def prepare(work: Path) -> None:
    """Write the rows of the demo, and set what all commands need: no network, one cache, wide tables."""
    from accel_llm.demo.skills import demo_conversations

    rows = demo_conversations("train")[:1000]
    lines = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows)
    (work / "chats.jsonl").write_text(lines, encoding="utf-8")
    os.environ |= {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
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
    sys.path += [str(ROOT), str(ROOT / "tests" / "proofs")]
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
