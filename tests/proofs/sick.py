"""A loss or gradient that is not finite, on one of two processes; run by tests/proofs/matrix.py --resumes.

All processes must skip step 3, do the other steps, and name the rows of step 3. Where no step may be skipped, they must
stop and keep the checkpoints from before.
"""

import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from elastic import join_ranges
from forks import Run, execute

SICK, STEPS = 3, 5


class Cell(NamedTuple):
    strategy: str
    method: str
    where: str

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.method}-{self.where}"


STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CELLS = [
    Cell(strategy, method, where)
    for strategy in STRATEGIES
    for method, where in (("full", "loss"), ("lora", "gradient"))
]


def sicken(where: str) -> None:
    """Break the second micro-batch of step 3 on rank 1."""
    import os

    import sft

    if os.environ["RANK"] != "1":
        return
    original, calls = sft.next_token_loss, iter(range(1, 999))

    def sick_loss(model: Any, batch: Any) -> Any:
        loss = original(model, batch)
        if sys._getframe(1).f_code.co_name != "train" or next(calls) != 2 * SICK:
            return loss
        if where == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    sft.next_token_loss = sick_loss


def script_arguments(cell: Cell, work: Path, output: Path, allowed: int) -> list[str]:
    words = ["--model_name_or_path", work / "model", "--train_files", work / "sft.jsonl", "--limit_rows", 40]
    words += ["--cache_dir", work / "cache", "--precision", "fp32", "--max_length", 64, "--max_steps", STEPS]
    words += [
        "--total_batch_size",
        8,
        "--per_device_train_batch_size",
        2,
        "--learning_rate",
        1e-3,
        "--packing",
        "false",
    ]
    words += ["--logging_steps", 1, "--save_steps", 1, "--save_total_limit", 9, "--max_skipped_steps", allowed]
    return [str(word) for word in [*words, "--method", cell.method, "--output_dir", output]]


def judge(cell: Cell, work: Path) -> dict[str, Any]:
    outputs = [work / "sick" / f"{cell.name}-{allowed}" for allowed in (1, 0)]
    ends = []
    for allowed, output in zip((1, 0), outputs, strict=True):
        words, name = script_arguments(cell, work, output, allowed), f"{cell.name}-{allowed}"
        run = Run(name, "sft", cell.strategy, 2, words, output, partial(sicken, cell.where))
        ends.append(next(iter(execute([run], work))))
    folders = {step: outputs[0] / "checkpoints" / f"step-{step:08d}" for step in range(1, STEPS + 1)}
    missing = [step for step, folder in folders.items() if not folder.is_dir()]
    if ends[0].code or missing:
        return {"status": "failed", "note": f"exit code {ends[0].code}, no {missing}: {ends[0].cause}"}
    states = {step: join_ranges(folder) for step, folder in folders.items()}
    problems = [] if equal(states[SICK - 1], states[SICK]) else ["step 3 changed something"]
    problems += [f"step {k} changed nothing" for k in (2, 4, 5) if equal(states[k - 1], states[k])]
    problems += [f"{name} is not finite" for name, array in states[STEPS].items() if not np.isfinite(array).all()]
    skipped = re.findall(
        r"^step \d+ skipped: its (\w+) is not finite \(1 of 1\); .*jsonl, row \d+", ends[0].log, re.MULTILINE
    )
    problems += [] if skipped == [cell.where] else [f"said {skipped}"]
    errors = re.findall(
        rf"^error: max_skipped_steps: the {cell.where} of step {SICK} is not finite", ends[1].log, re.MULTILINE
    )
    left = sorted(path.name for path in (outputs[1] / "checkpoints").iterdir())
    problems += [] if len(errors) == 1 and ends[1].code == 2 else [f"exit code {ends[1].code}: {ends[1].cause}"]
    problems += [] if left == ["step-00000001", "step-00000002"] else [f"left {left}"]
    return {"status": "failed", "note": "; ".join(problems)} if problems else {"status": "skipped alike"}


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
