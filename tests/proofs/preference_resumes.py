"""Preference runs that are killed and continued end like one that was never killed, on every backend.

    python tests/proofs/preference_resumes.py --work W
    python tests/proofs/preference_resumes.py --only '*-zero2-*,kto-*'

A cell has two runs of `launch/dpo.py` or `launch/kto.py`. One is never killed. The other one is killed before it has
computed its reference, while it writes it, and after two steps, and then continued by new processes. Dropout is on. The
held-out answers prefer the opposite, so the first evaluation is the best, and both runs stop early, at the same step;
the second one has read the reference that it had computed itself. Files must be equal to the last bit.

A cell whose name ends in `-moved` is continued on another backend by another number of processes, without dropout. Its
losses must be the same but for rounding.
"""

import argparse
import fnmatch
import json
import os
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from forks import Run, compute, execute, metric, warm
from resumes import differences, run_all, stop_after

STEPS, EVERY, PATIENCE, STOP, BATCH = 12, 2, 2, 3, 8
LAST = EVERY * (1 + PATIENCE)  # the first evaluation is the best
TOLERANCE = 1e-5


class Cell(NamedTuple):
    script: str
    strategy: str
    method: str
    processes: int
    moved: bool = False

    @property
    def name(self) -> str:
        return f"{self.script}-{self.strategy}-{self.method}-{self.processes}p{'-moved' * self.moved}"


CELLS = [Cell("dpo", "cpu", "lora", 1), Cell("kto", "cpu", "lora", 1)]
CELLS += [Cell("dpo", strategy, "lora", 2) for strategy in ("ddp", "zero2", "zero3", "fsdp2")]
CELLS += [Cell("kto", strategy, "lora", 2) for strategy in ("ddp", "zero2", "zero3", "fsdp2")]
CELLS += [Cell("dpo", strategy, "qlora", 2) for strategy in ("zero2", "fsdp2")] + [Cell("dpo", "zero3", "full", 2)]
CELLS += [Cell(script, "zero2", "lora", 2, moved=True) for script in ("dpo", "kto")]
THEN = ("fsdp2", 1)  # where a moved run goes on


def prepare(work: Path) -> None:
    """Write the model, and answers whose preferences the held-out ones turn round."""
    from matrix import write_model

    from accel_llm.demo.skills import demo_conversations

    write_model(work)
    files: dict[str, list[dict[str, Any]]] = {"dpo": [], "dpo-eval": [], "kto": [], "kto-eval": []}
    for k, row in enumerate(demo_conversations("train")[:40]):
        *prompt, last = row["messages"]
        wrong, name = {"role": "assistant", "content": "no " + last["content"]}, "-eval" * (k >= 32)
        sides = (wrong, last) if name else (last, wrong)
        files[f"dpo{name}"].append({"prompt": prompt, "chosen": [sides[0]], "rejected": [sides[1]]})
        files[f"kto{name}"] += [{"messages": [*prompt, side], "label": side is sides[0]} for side in sides]
    for name, rows in files.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def script_arguments(cell: Cell, work: Path, output: Path, processes: int) -> list[str]:
    words = ["--model_name_or_path", work / "model", "--train_files", work / f"{cell.script}.jsonl"]
    words += ["--eval_files", work / f"{cell.script}-eval.jsonl", "--cache_dir", output.with_name("cache")]
    words += ["--precision", "fp32", "--max_length", 128, "--max_steps", STEPS, "--learning_rate", 1e-2]
    words += ["--total_batch_size", BATCH, "--per_device_train_batch_size", BATCH // (2 * processes)]
    words += ["--logging_steps", 5, "--save_steps", 1, "--eval_steps", EVERY, "--eval_generate", 0]
    words += ["--metric_for_best_model", "eval/loss", "--early_stopping_patience", PATIENCE]
    words += ["--method", cell.method, "--output_dir", output]
    words += ["--lora_dropout", 0.1] if cell.method != "full" and not cell.moved else []
    return [str(word) for word in words]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_before_reference() -> None:
    from accel_llm.preference.reference import Reference

    Reference.compute = lambda *_: kill()  # type: ignore[assignment, method-assign]


def stop_in_reference() -> None:
    """Kill the process that writes while its second file is incomplete; the launcher ends the others."""
    from accel_llm.preference import reference

    original, written = reference.atomic_file, []

    def atomic_file(path: Path) -> Any:
        if written:
            path.with_name(f".{path.name}.{os.getpid()}.partial").write_bytes(b"half")
            kill()
        written.append(path)
        return original(path)

    reference.atomic_file = atomic_file  # type: ignore[assignment]


def without_count() -> None:
    """A mistake made on purpose: a resumed run forgets how many evaluations had no new best."""
    from accel_llm.checkpoint import resume
    from accel_llm.training.best import Best

    original = resume._best_so_far
    resume._best_so_far = lambda *arguments: Best(*(original(*arguments).step, original(*arguments).value))


def new_reference() -> None:
    """A mistake made on purpose: a resumed run takes another reference."""
    from accel_llm.preference.reference import Reference

    find = Reference.find

    def find_and_change(self: Any, resumed: bool) -> None:
        find(self, resumed)
        self.columns = {part: column - 0.1 * np.arange(len(column)) % 2 for part, column in self.columns.items()}

    Reference.find = find_and_change  # type: ignore[method-assign]


def runs_of(cell: Cell, work: Path, control: Callable[[], None] | None = None) -> tuple[Run, list[Run]]:
    """Return the run that is never killed and the parts of the other one; the last part does `control`."""
    where = work / "runs" / f"{control.__name__ if control else ''}{cell.name}"

    def run(output: Path, sabotage: Callable[[], None] | None, resumed: bool, last: bool = False) -> Run:
        strategy, processes = THEN if cell.moved and last else (cell.strategy, cell.processes)
        words = script_arguments(cell, work, output, processes)
        return Run(f"{cell.name}-{output.name}", cell.script, strategy, processes, words, output, sabotage, resumed)

    stops = [stop_before_reference, stop_in_reference, partial(stop_after, STOP)]
    parts = [run(where / "parts" / "run", stop, k > 0) for k, stop in enumerate(stops)]
    parts.append(run(where / "parts" / "run", partial(run_all, control) if control else None, True, last=True))
    return run(where / "whole" / "run", None, False), parts


def judge(cell: Cell, work: Path, control: Callable[[], None] | None = None) -> dict[str, Any]:
    whole, parts = runs_of(cell, work, control)
    for run in [whole, *parts]:
        end = next(iter(execute([run], work)))
        killed = run in parts[:-1]
        if (end.code == 0) == killed:
            return {"status": "failed", "note": f"{run.name}: exit code {end.code}: {end.cause}"}
    if "reference: log-probabilities read from" not in parts[-1].log.read_text(encoding="utf-8"):
        return {"status": "failed", "note": "the resumed run has not read its reference"}
    facts = [json.loads((run.output / "run.json").read_text(encoding="utf-8")) for run in (whole, parts[-1])]
    ends = [(run.get("early_stopping", "").split(":")[0], run["exported_step"]) for run in facts]
    if ends != [(f"stopped after step {LAST} of {STEPS}", EVERY)] * 2:
        return {"status": "different", "note": f"ends: {ends}"}
    if cell.moved:
        losses = [metric(run.output, name) for name in ("loss", "eval/loss") for run in (whole, parts[-1])]
        apart = max(float(np.abs(losses[k] - losses[k + 1]).max()) for k in (0, 2))
        return {"status": "same" if apart <= TOLERANCE else "different", "losses apart": apart}
    different = differences(whole.output, parts[-1].output)
    return {"status": "different" if different else "same"} | ({"note": ", ".join(different)} if different else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="patterns of names of cells, with commas")
    parser.add_argument("--controls", action="store_true", help="mistakes made on purpose: each must be noticed")
    parser.add_argument("--work", type=Path, help="folder to work in and to keep everything in")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="preference-resumes-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    compute(partial(prepare, work), work / "prepare.log")
    problems = []
    for cell in CELLS if not args.controls else ():
        if any(fnmatch.fnmatch(cell.name, pattern) for pattern in args.only.split(",")):
            result = judge(cell, work)
            print(cell.name, json.dumps(result), flush=True)
            problems += [cell.name] if result["status"] != "same" else []
    for control in (without_count, new_reference) if args.controls else ():
        result = judge(CELLS[0], work, control)
        print(f"control {control.__name__}: {json.dumps(result)}", flush=True)
        problems += [control.__name__] if result["status"] != "different" else []
    if problems:
        raise SystemExit(f"not as expected: {', '.join(problems)}; see {work}")


if __name__ == "__main__":
    main()
