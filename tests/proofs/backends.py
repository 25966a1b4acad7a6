"""Every method on every backend: trained by two processes, it gives the losses and weights of one process on the CPU.

    python tests/proofs/backends.py                    # all cells; goes on where an earlier call was stopped
    python tests/proofs/backends.py --only 'ia3-*'     # a few, named method-backend-bits
    python tests/proofs/backends.py --write            # the table, into accel_llm/adapters/README.md

A cell runs a few steps of the script's own main() with uneven rows, accumulation and two processes. Its losses, gradient
norms and weights must equal those of one process that sees the rows of a step at once. A method that cannot run on a
backend, or with a base in 4 or 8 bits, must say so before the model loads.
"""

import argparse
import fnmatch
import itertools
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matrix
import numpy as np
from forks import Ended, Run, compute, execute, metric, warm

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
# A base in 4 bits is sharded in packed bytes; one in 8 bits is never sharded.
COLUMNS = [*((strategy, 16) for strategy in STRATEGIES), ("ddp", 4), ("zero2", 4), ("zero3", 4), ("fsdp2", 4), ("ddp", 8)]
TOLERANCE = {16: 1e-5, 4: 1e-4, 8: 1e-4}
STEPS = 5
# A gradient norm shows what AdamW hides: a gradient that is too long by a constant factor.
SETTINGS = f"--max_steps {STEPS} --total_batch_size 8 --learning_rate 5e-3 --adam_epsilon 1e-6 --max_grad_norm 1"
NORM_TOLERANCE = 1e-4  # relative; DeepSpeed's ZeRO-2 adds up the norm with an error of 7e-5


class Cell(NamedTuple):
    method: str
    strategy: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.strategy}-{self.bits}"


def methods() -> list[str]:
    from accel_llm.adapters.methods import REFUSED_METHODS, peft_methods
    from accel_llm.config.options import METHODS_WITHOUT_ADAPTER

    return [*METHODS_WITHOUT_ADAPTER, *(name for name in peft_methods() if name not in REFUSED_METHODS)]


def all_cells() -> list[Cell]:
    """Return every method in every column; qlora is lora in 4 bits."""
    return [Cell(method, *column) for column, method in itertools.product(COLUMNS, methods()) if method != "qlora"]


def unblock():
    import os
    if not os.environ.get("UNBLOCK"):
        return
    from accel_llm.training import preflight, export
    preflight._check_trainable_parameters = lambda *a: None
    from safetensors.torch import save_file

    def save(inner, folder, state, *_):
        folder.mkdir(exist_ok=True)
        save_file(state, folder / "adapter_model.safetensors")

    export.save_adapter = save
    export.read_export_back = lambda *_: {}


def build_run(cell: Cell, work: Path) -> Run:
    processes, accumulation = (1, 1) if cell.strategy == "cpu" else (2, 2)
    output = work / "runs" / cell.name
    words = ["--model_name_or_path", work / "model", "--train_files", work / "sft.jsonl", "--output_dir", output]
    words += ["--cache_dir", work / "cache", "--precision", "fp32", "--logging_steps", 1, "--max_length", 80]
    words += [*SETTINGS.split(), "--per_device_train_batch_size", 8 // processes // accumulation]
    words += ["--method", cell.method]
    words += {16: [], 4: ["--load_in_4bit"], 8: ["--load_in_8bit"]}[cell.bits]
    words += OPTIONS.get(cell.method, [])
    return Run(cell.name, "sft", cell.strategy, processes, [str(word) for word in words], output, unblock)


# Options of methods whose defaults are too large for the test model.
OPTIONS: dict[str, list[str]] = {
    name: ["--method_options", *values.split()]
    for name, values in {
        "c3a": "block_size=16",
        "cartridge": "num_virtual_tokens=4",
        "prefix": "num_virtual_tokens=4",
        "prompt": "num_virtual_tokens=4",
        "p_tuning": "num_virtual_tokens=4",
        "p_tuning_v2": "num_virtual_tokens=4",
        "fourierft": "n_frequency=64",
        "road": "group_size=16",
        "shira": "r=4",
        "vblora": "vector_length=16 num_vectors=32",
        "waveft": "n_frequency=64",
        "trainable_tokens": "token_indices=[5,6,7,8,9,10,11,12]",
    }.items()
}


def reference_cell(cell: Cell) -> Cell:
    return cell._replace(strategy="cpu")


def judge(cell: Cell, end: Ended, work: Path) -> dict[str, Any]:
    """Compare a run with its reference."""
    seconds = {"seconds": round(end.seconds, 1)}
    if end.sentences:
        early = end.code == 2 and not end.run.output.exists() and len(end.sentences) == 1
        return {"status": "refused" if early else "failed", "note": " ".join(end.sentences)[:600]} | seconds
    if end.code:
        return {"status": "failed", "note": f"exit code {end.code}: {end.cause}"} | seconds
    if cell.strategy == "cpu":
        return {"status": "same"} | seconds
    reference = build_run(reference_cell(cell), work).output
    try:
        check_shards(cell, end.run.output)
        numbers = {
            "loss": float(np.abs(metric(end.run.output, "loss") - metric(reference, "loss")).max()),
            "norm": float(np.abs(metric(end.run.output, "grad_norm") / metric(reference, "grad_norm") - 1).max()),
            "weights": matrix.largest_difference(
                matrix.read_weights(end.run.output), matrix.read_weights(reference)
            ),
        }
    except (AssertionError, KeyError, ValueError, OSError) as error:
        return {"status": "failed", "note": f"{type(error).__name__}: {error}"[:400]} | seconds
    limits = {"loss": TOLERANCE[cell.bits], "weights": TOLERANCE[cell.bits], "norm": NORM_TOLERANCE}
    same = all(numbers[name] <= limit for name, limit in limits.items())
    return {"status": "same" if same else "different", **numbers} | seconds


def check_shards(cell: Cell, output: Path) -> None:
    """Each process must hold much less than the whole model if the strategy shards it."""
    parameters = json.loads((output / "run.json").read_text(encoding="utf-8"))["accelerate"]["parameters"]
    held, total = parameters["this_process"], parameters["total"]
    if cell.strategy in matrix.SHARDED:
        assert held / total < 0.6, f"not sharded: {held} of {total} parameters are held by this process"


def run_cells(cells: list[Cell], work: Path, again: bool) -> dict[str, dict[str, Any]]:
    """Do the cells that have no result yet, each after its reference; write each result at once."""
    file = work / "backends.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted = [cell for cell in cells if again or cell.name not in results]
    references = list(dict.fromkeys(map(reference_cell, wanted)))
    for lot in (references, wanted):
        lot = [
            cell
            for cell in lot
            if cell.strategy == "cpu"
            and not (build_run(cell, work).output / "metrics.jsonl").exists()
            or cell.strategy != "cpu"
            and results.get(reference_cell(cell).name, {}).get("status") == "same"
        ]
        by_name = {cell.name: cell for cell in lot}
        for end in execute([build_run(cell, work) for cell in lot], work):
            results[end.run.name] = judge(by_name[end.run.name], end, work)
            print(end.run.name, json.dumps(results[end.run.name]), flush=True)
            file.write_text(json.dumps(results), encoding="utf-8")
            if by_name[end.run.name].strategy != "cpu":
                shutil.rmtree(end.run.output, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cells whose name fits, such as ia3-zero3-16")
    parser.add_argument("--again", action="store_true", help="also the cells that have a result")
    parser.add_argument("--work", type=Path, help="folder to work in and to keep everything in")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="backends-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    if not (work / "sft.jsonl").exists():
        compute(partial(matrix.prepare, work), work / "prepare.log")
    cells = [cell for cell in all_cells() if any(fnmatch.fnmatch(cell.name, p) for p in args.only.split(","))]
    run_cells(cells, work, args.again)


if __name__ == "__main__":
    main()
