"""A checkpoint of one strategy and number of processes is continued by another: tests/proofs/matrix.py --resumes.

A cell has six steps: `before` does three and `after` does three. Weights and optimizer state that the second part loads
must equal those that the first part saved, to the last bit. The end must equal the end of a run that was never stopped.
There is no dropout, because another number of processes draws other random numbers.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from forks import Run, execute
from resumes import metrics, run_all, stop_after
from safetensors.numpy import load_file

STOP, STEPS, TOLERANCE = 3, 6, 1e-5
PAIRS = [("ddp", 2, "ddp", 1), ("ddp", 1, "ddp", 2), ("ddp", 2, "ddp", 3), ("fsdp2", 2, "fsdp2", 1)]
PAIRS += [("fsdp2", 1, "fsdp2", 2), ("fsdp2", 2, "fsdp2", 4), ("zero1", 2, "zero1", 1), ("zero1", 2, "zero1", 4)]
PAIRS += [("zero2", 2, "zero2", 1), ("zero2", 1, "zero2", 2), ("zero3", 2, "zero3", 1), ("zero3", 2, "zero3", 3)]
PAIRS += [("zero3_offload", 2, "zero3", 2), ("ddp", 2, "zero2", 2), ("zero2", 2, "zero3", 2), ("zero3", 2, "fsdp2", 2)]
PAIRS += [("fsdp2", 2, "zero1", 2), ("fsdp2", 2, "ddp", 2), ("zero1", 2, "cpu", 1), ("cpu", 1, "fsdp2", 2)]


class Cell(NamedTuple):
    before: str
    saved_by: int
    after: str
    continued_by: int
    method: str

    @property
    def name(self) -> str:
        return f"{self.before}-{self.saved_by}p-to-{self.after}-{self.continued_by}p-{self.method}"


CELLS = [Cell(*pair, method) for pair in PAIRS for method in ("full", "lora", "qlora")]
# The matrix tests zero3_offload with 4-bit weights.
CELLS = [cell for cell in CELLS if not (cell.before == "zero3_offload" and cell.method == "qlora")]


def script_arguments(cell: Cell, work: Path, output: Path) -> list[str]:
    words = ["--model_name_or_path", work / "model", "--train_files", work / "sft.jsonl", "--limit_rows", 40]
    words += ["--cache_dir", work / "cache", "--precision", "fp32", "--max_length", 64, "--max_steps", STEPS]
    words += ["--total_batch_size", 12, "--per_device_train_batch_size", 1, "--learning_rate", 1e-3]
    words += ["--adam_epsilon", 1e-6, "--logging_steps", 2, "--save_steps", 1, "--save_total_limit", 9]
    return [str(word) for word in [*words, "--method", cell.method, "--output_dir", output]]


def save_loaded_state(folder: Path) -> None:
    """Write weights and optimizer state of each process right after it has loaded a checkpoint."""
    from accel_llm.checkpoint import shares
    from accel_llm.checkpoint.checkpoints import Checkpoints
    from accel_llm.system.tensors import write_tensors

    resume = Checkpoints.resume

    def resume_and_save(self: Any) -> None:
        resume(self)
        local = shares.local_shares(self.accelerator, self.model, self.optimizer)
        tensors, numbers = shares.share_tensors(local, self.optimizer)
        folder.mkdir(exist_ok=True)
        rank = self.accelerator.process_index
        write_tensors(folder / f"rank-{rank:05d}.safetensors", tensors)
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps({"numbers": numbers}))

    Checkpoints.resume = resume_and_save  # type: ignore[method-assign]


def join_ranges(folder: Path) -> dict[str, np.ndarray]:
    """Join the ranges of all processes into one flat array for each parameter's weights and state."""
    ranges: dict[str, dict[int, np.ndarray]] = {}
    numbers: dict[str, Any] = {}
    for path in sorted(folder.glob("rank-*")):
        if path.suffix == ".json":
            numbers |= json.loads(path.read_text(encoding="utf-8"))["numbers"]
            continue
        for key, tensor in load_file(path).items():
            name, start = key.rsplit("|", 1)
            ranges.setdefault(name, {})[int(start)] = tensor
    arrays = {name: np.concatenate([parts[k] for k in sorted(parts)]) for name, parts in ranges.items()}
    steps = {name: value[-1] if isinstance(value, list) else value for name, value in numbers.items()}
    return arrays | {name: np.array(value) for name, value in steps.items()}


def judge(cell: Cell, work: Path) -> dict[str, Any]:
    where = work / "elastic" / cell.name
    whole, parts = where / "whole", where / "parts"
    first = partial(stop_after, STOP)
    second = partial(run_all, partial(save_loaded_state, where / "loaded"))
    runs = [
        Run(f"{cell.name}-whole", "sft", cell.before, cell.saved_by, script_arguments(cell, work, whole), whole),
        Run(f"{cell.name}-0", "sft", cell.before, cell.saved_by, script_arguments(cell, work, parts), parts, first),
        Run(
            f"{cell.name}-1",
            "sft",
            cell.after,
            cell.continued_by,
            script_arguments(cell, work, parts),
            parts,
            second,
            True,
        ),
    ]
    for run in runs:
        end = next(iter(execute([run], work)))
        if end.code and run is not runs[1]:
            return {"status": "failed", "note": f"{run.name}: exit code {end.code}: {end.cause}"}
    saved, loaded = join_ranges(parts / "checkpoints" / f"step-{STOP:08d}"), join_ranges(where / "loaded")
    changed = [name for name in saved.keys() | loaded.keys() if not same(saved.get(name), loaded.get(name))]
    if changed:
        note = f"{len(changed)} of {len(saved)} are not what was saved ({min(changed)})"
        return {"status": "different", "note": note}
    last = [join_ranges(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (whole, parts)]
    weights = [name for name in last[0] if name.endswith("|weight")]
    apart = max(float(np.abs(last[0][name] - last[1][name]).max()) for name in weights)
    lines = [[(line["step"], line["supervised_tokens"]) for line in metrics(folder)] for folder in (whole, parts)]
    status = (
        "same" if apart <= TOLERANCE * (1 if cell.method != "qlora" else 10) and lines[0] == lines[1] else "different"
    )
    return {"status": status, "tensors": len(saved), "weights": apart}


def same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    return left is not None and right is not None and left.tobytes() == right.tobytes()
