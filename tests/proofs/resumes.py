"""A run that is stopped and resumed is bit-equal to one that was never stopped: tests/proofs/matrix.py --resumes.

A cell has two runs of ten steps. One is never stopped. The other one is killed after each step in STOPS and continued
by new processes: twice within an epoch, at the end of an epoch, and in a later one. Dropout and NEFTune are on, and
metrics are not logged at the stops.
"""

import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from forks import Run, execute

STOPS = (2, 3, 4, 9)  # an epoch has 4 steps without packing
STEPS, ROWS, BATCH = 10, 32, 8
METHODS = ("full", "lora", "qlora")
# Options of the other methods, whose defaults are too large for the test model, or which need some.
OPTIONS = {
    "adalora": "tinit=1 tfinal=2 deltaT=1",
    "c3a": "block_size=16",
    "fourierft": "n_frequency=64",
    "freeze": "layers=1 norms=true",
    "p_tuning": "num_virtual_tokens=4",
    "p_tuning_v2": "num_virtual_tokens=4",
    "prefix": "num_virtual_tokens=4 encoder_hidden_size=32",
    "prompt": "num_virtual_tokens=4",
    "road": "group_size=16",
    "shira": "r=4",
    "trainable_tokens": "token_indices=[5,6,7,8,9,10,11,12]",
    "vblora": "vector_length=16 num_vectors=32",
    "waveft": "n_frequency=64",
}
# Metrics that differ from run to run.
MEASURED = ("tokens_per_second", "peak_memory_mb")


class Cell(NamedTuple):
    strategy: str
    method: str
    processes: int
    accumulation: int
    workers: int  # processes that encode the rows, and again before the last part

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.method}-{self.processes}p-acc{self.accumulation}-workers{self.workers}"


def all_cells() -> list[Cell]:
    product = itertools.product(("cpu", "ddp", "zero2", "zero3", "fsdp2"), METHODS, (1, 2), (1, 4), (0, 2))
    cells = [cell for cell in itertools.starmap(Cell, product) if cell.strategy != "cpu" or cell.processes == 1]
    random.Random(0).shuffle(cells)
    return cells


def script_arguments(cell: Cell, work: Path, output: Path, last: bool) -> list[str]:
    each = BATCH // (cell.processes * cell.accumulation)
    cache = output / ".cache" if cell.workers and last else work / "cache"
    model = "biased" if cell.method == "bitfit" else "dropout"
    words = ["--model_name_or_path", work / model, "--train_files", work / "sft.jsonl", "--limit_rows", ROWS]
    words += ["--cache_dir", cache, "--precision", "fp32", "--max_length", 64, "--max_steps", STEPS]
    words += ["--total_batch_size", BATCH, "--per_device_train_batch_size", each or 1, "--learning_rate", 1e-2]
    words += ["--packing", str(cell.accumulation == 4).lower(), "--logging_steps", 3, "--save_steps", 1]
    words += ["--neftune_noise_alpha", 5, "--method", cell.method, "--output_dir", output]
    words += method_words(cell.method)
    words += ["--preprocessing_num_workers", cell.workers] if cell.workers and last else []
    return [str(word) for word in words]


def method_words(method: str) -> list[str]:
    """Return the options of a method: its own, and dropout where it has some."""
    if method in ("lora", "qlora", "adalora"):
        words, options = ["--lora_dropout", "0.1"], OPTIONS.get(method, "").split()
    else:
        words, options = [], [*OPTIONS.get(method, "").split(), *(f"{name}=0.1" for name in dropout_options(method))]
    return [*words, *(["--method_options", *options] if options else [])]


def dropout_options(method: str) -> list[str]:
    """Return the names of the options of a method that switch off activations at random."""
    from accel_llm.adapters.method_options import option_names
    from accel_llm.adapters.methods import config_class_of
    from accel_llm.config.method import METHODS_WITHOUT_ADAPTER

    names = [] if method in METHODS_WITHOUT_ADAPTER else option_names(config_class_of(method))
    # Without a whole module DDP would wait for its gradients; only an LSTM encoder drops anything.
    return [name for name in names if name.endswith("dropout") and name not in ("module_dropout", "encoder_dropout")]


def stop_after(last: int) -> None:
    """Kill the process when everything due at step `last` is done."""
    from accel_llm.checkpoint.checkpoints import Checkpoints

    when_due = Checkpoints.when_due

    def killing_when_due(self: Any, meter: Any, evaluation: Any, bad_steps: Any, step: int) -> None:
        when_due(self, meter, evaluation, bad_steps, step)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.when_due = killing_when_due  # type: ignore[method-assign]


def without_randomness() -> None:
    from accel_llm.checkpoint import load

    load.set_generator_states = lambda *_: None  # type: ignore[assignment]


def without_schedule() -> None:
    from accel_llm.checkpoint import load

    load.set_rates = lambda *_: None  # type: ignore[assignment]


def without_position() -> None:
    from accel_llm.checkpoint import resume

    original: Callable[..., Any] = resume._continue_from
    resume._continue_from = lambda *arguments: replace(original(*arguments), rows=0)


def without_moments() -> None:
    from accel_llm.checkpoint import shares

    shares._allocate_state = lambda *_: {}  # type: ignore[assignment]


CONTROLS = (without_randomness, without_schedule, without_position, without_moments)


def run_all(*parts: Callable[[], None]) -> None:
    for part in parts:
        part()


def prepare(work: Path) -> None:
    """Copy the matrix's model and give the copy dropout, which full training has from the model alone."""
    shutil.copytree(work / "model", work / "dropout", dirs_exist_ok=True)
    config = work / "dropout" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))


def build_runs(
    cell: Cell, work: Path, stops: tuple[int, ...], control: Callable[[], None] | None = None
) -> tuple[Run, list[Run]]:
    """Return the run that is never stopped and the parts of the other one; all parts but the first do `control`."""
    where = work / "resumes" / f"{control.__name__ if control else ''}{cell.name}"
    parts = []
    for k, stop in enumerate([*stops, None]):
        sabotage = [*([control] if control and k else []), *([partial(stop_after, stop)] if stop else [])]
        words = script_arguments(cell, work, where / "parts", stop is None)
        name = f"{cell.name}-{k}"
        sabotage_all = partial(run_all, *sabotage) if sabotage else None
        parts.append(
            Run(name, "sft", cell.strategy, cell.processes, words, where / "parts", sabotage_all, resumed=k > 0)
        )
    words = script_arguments(cell, work, where / "whole", False)
    return Run(f"{cell.name}-whole", "sft", cell.strategy, cell.processes, words, where / "whole"), parts


def differences(whole: Path, parts: Path) -> list[str]:
    """Return the names of files that are not the same to the last bit in two output folders."""
    names = [] if metrics(whole) == metrics(parts) else ["metrics.jsonl"]
    last = sorted((whole / "checkpoints").iterdir())[-1]
    for path in [*sorted(last.iterdir()), *whole.glob("*/*.safetensors")]:
        other = parts / path.relative_to(whole)
        if path.name == "manifest.json":
            continue
        same = other.is_file() and comparable_content(path) == comparable_content(other)
        names += [] if same else [str(path.relative_to(whole))]
    return names


def comparable_content(path: Path) -> Any:
    """Return the content of a file without its times and the name of its folder."""
    if path.suffix != ".json":
        return path.read_bytes()
    state = json.loads(path.read_text(encoding="utf-8"))
    if "meter" in state:
        state["meter"].pop(4)  # seconds
    if "options" in state:
        state["options"] |= dict.fromkeys(("output_dir", "cache_dir", "preprocessing_num_workers"))
    return state


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def judge(cell: Cell, work: Path, stops: tuple[int, ...], control: Callable[[], None] | None = None) -> dict[str, Any]:
    whole, parts = build_runs(cell, work, stops, control)
    seconds = 0.0
    for run in [whole, *parts]:
        end = next(iter(execute([run], work)))
        seconds += end.seconds
        stopped = run in parts[:-1] and end.code == -signal.SIGKILL
        if end.code and not stopped:
            return {"status": "failed", "note": f"{run.name}: exit code {end.code}: {end.cause}"}
    different = differences(whole.output, parts[-1].output)
    note = {"note": ", ".join(different)} if different else {}
    return {"status": "different" if different else "bit-equal", **note, "seconds": round(seconds, 1)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a table of strategies and processes by method: how many of the cells that ran are bit-equal."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    kinds = sorted({(name.split("-")[0], name.split("-")[2]) for name in results})
    for strategy, processes in kinds:
        row = [f"{strategy}, {processes.removesuffix('p')} process{'es' if processes != '1p' else ''}"]
        for method in METHODS:
            statuses = [r["status"] for n, r in results.items() if n.startswith(f"{strategy}-{method}-{processes}-")]
            row.append(f"{statuses.count('bit-equal')} of {len(statuses)}" if statuses else "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
