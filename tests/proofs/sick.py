"""A loss or gradient that is not a number, on one process of two: called by tests/proofs/matrix.py --resumes.

All processes must leave step 3 out, take the others, and say whose rows they were; and where no such step is allowed, stop
with what was saved before.
"""

import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from elastic import assembled
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
    """The second micro-batch of step 3 on rank 1."""
    import os

    import sft

    if os.environ["RANK"] != "1":
        return
    original, calls = sft.next_token_loss, iter(range(1, 999))

    def loss_of(model: Any, batch: Any) -> Any:
        loss = original(model, batch)
        if sys._getframe(1).f_code.co_name != "train" or next(calls) != 2 * SICK:
            return loss
        if where == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    sft.next_token_loss = loss_of


def words_of(cell: Cell, work: Path, output: Path, allowed: int) -> list[str]:
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
        words, name = words_of(cell, work, output, allowed), f"{cell.name}-{allowed}"
        run = Run(name, "sft", cell.strategy, 2, words, output, partial(sicken, cell.where))
        ends.append(next(iter(execute([run], work))))
    folders = {step: outputs[0] / "checkpoints" / f"step-{step:08d}" for step in range(1, STEPS + 1)}
    missing = [step for step, folder in folders.items() if not folder.is_dir()]
    if ends[0].code or missing:
        return {"status": "failed", "note": f"exit code {ends[0].code}, no {missing}: {ends[0].cause}"}
    found = {step: assembled(folder) for step, folder in folders.items()}
    problems = [] if equal(found[SICK - 1], found[SICK]) else ["step 3 changed something"]
    problems += [f"step {k} changed nothing" for k in (2, 4, 5) if equal(found[k - 1], found[k])]
    problems += [f"{name} is not finite" for name, array in found[STEPS].items() if not np.isfinite(array).all()]
    said = re.findall(
        r"^step \d+ skipped: its (\w+) is not finite \(1 of 1\); .*jsonl, row \d+", ends[0].log, re.MULTILINE
    )
    problems += [] if said == [cell.where] else [f"said {said}"]
    told = re.findall(
        rf"^error: max_skipped_steps: the {cell.where} of step {SICK} is not finite", ends[1].log, re.MULTILINE
    )
    left = sorted(path.name for path in (outputs[1] / "checkpoints").iterdir())
    problems += [] if len(told) == 1 and ends[1].code == 2 else [f"exit code {ends[1].code}: {ends[1].cause}"]
    problems += [] if left == ["step-00000001", "step-00000002"] else [f"left {left}"]
    return {"status": "failed", "note": "; ".join(problems)} if problems else {"status": "skipped alike"}


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)
