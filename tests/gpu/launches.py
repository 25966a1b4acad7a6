"""Parts b, g and half of c: launch/sft.py as a person starts it, one step of every combination, stops and resumes."""

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from runner import Cell, Ended, Part, launch, python

LORA = "--method lora --lora_r 8"
METHODS = {
    "full": "--method full",
    "lora": LORA,
    "qlora": LORA.replace("lora", "qlora", 1),
    "dora+qlora": LORA.replace("lora", "qlora", 1) + " --use_dora",
    "lora8": f"{LORA} --load_in_8bit",
}
STRATEGIES = ("single", "fsdp2", "zero2", "zero3", "zero3_offload")
YAMLS = {"single": "single_gpu"}
# What cannot be sharded is refused with a sentence that names the option.
REFUSED = {("lora8", strategy): "error: load_in_8bit: " for strategy in ("fsdp2", "zero3", "zero3_offload")}
REFUSED |= {("dora+qlora", strategy): "error: use_dora: " for strategy in ("zero3", "zero3_offload")}
NUMBER = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Combination(NamedTuple):
    """One cell of the matrix of part b."""

    method: str
    strategy: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.strategy} {self.precision}"


def combinations(gpu: bool) -> list[Combination]:
    """Return the whole matrix; without a GPU a few cells of it, as fp16 needs one."""
    if not gpu:
        few = (("full", "zero2"), ("qlora", "single"), ("dora+qlora", "single"), ("lora8", "zero3"))
        return [Combination(method, strategy, "bf16") for method, strategy in few]
    bf16 = [Combination(method, strategy, "bf16") for strategy in STRATEGIES for method in METHODS]
    return bf16 + [Combination(method, strategy, "fp16") for strategy in ("single", "zero2") for method in METHODS]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def inputs(work: Path) -> list[str]:
    files = ["--model_name_or_path", "accel_llm/demo_base", "--train_files", str(work / "chats.jsonl")]
    return [*files, "--max_length", "256", "--total_batch_size", "4"]


def check_combination(part: Part, cell: Combination, work: Path, port: int) -> list[Cell]:
    """Take one step with `--check_only`; in fp16, where the first step may overflow, six steps and a checkpoint."""
    yaml = YAMLS.get(cell.strategy, cell.strategy)
    words = [*inputs(work), *METHODS[cell.method].split(), "--precision", cell.precision]
    folder = work / cell.name.replace(" ", "-")
    words += (
        ["--max_steps", "6", "--output_dir", str(folder)] if cell.precision == "fp16" else ["--check_only", "--verbose"]
    )
    # A single process has no port. Method full leaves `num_processes: auto` as it is, but on a CPU that is one a core.
    grouped, auto = cell.strategy != "single", cell.method == "full" and has_gpu()
    processes = 1 if grouped and not auto else None
    command = launch(yaml, "launch/sft.py", *words, port=port if grouped else 0, processes=processes)
    ended = part.run(cell.name, command)
    if sentence := REFUSED.get((cell.method, cell.strategy)):
        refused = ended.code != 0 and sentence in ended.text
        return [Cell(cell.name, refused, "refused" if refused else ended.cause, f"refused with {sentence!r}")]
    facts = facts_of_record(folder) if cell.precision == "fp16" else facts_of_table(ended.text)
    problems = problems_of(cell, ended, facts)
    figure = f"{ended.seconds:.0f} s; " + ("; ".join(problems) if problems else describe(facts))
    return [Cell(cell.name, not problems, figure, "trains, own loss, packed, all gradients, expected dtypes", facts)]


def facts_of_table(text: str) -> dict[str, Any]:
    """Read the table that --check_only prints: a name, two or more spaces, a JSON value."""
    facts: dict[str, Any] = {}
    for line in text.partition("In force, checked in")[2].splitlines():
        if found := re.match(r"\s(\S.*?)\s{2,}(.+?)\s*$", line):
            name, value = found.groups()
            try:
                facts[name] = json.loads(value)
            except ValueError:
                continue
    return facts


def facts_of_record(folder: Path) -> dict[str, Any]:
    """Read the same facts from run.json, and the losses of the run."""
    if not (folder / "run.json").is_file():
        return {}
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts = {"status": record["status"]}
    for name, value in record.get("accelerate", {}).items():
        inner = value if isinstance(value, dict) else {"": value}
        facts |= {f"{name} {key}".strip(): part for key, part in inner.items()}
    return facts | {"losses": [line["loss"] for line in metrics(folder) if "loss" in line]}


def problems_of(cell: Combination, ended: Ended, facts: dict[str, Any]) -> list[str]:
    """Return what differs from what the combination should do."""
    if ended.code or not facts:
        return [ended.cause]
    sharded = cell.strategy.startswith("zero")
    expected: dict[str, Any] = {
        "strategy": cell.strategy.removesuffix("_offload"),
        "precision": cell.precision,
        "loss_path": "own",
        "attention": "packed",
        "first_step without": [],
        "dtypes stepped": ["float32"],
    }
    if cell.precision == "fp16":
        expected["status"] = "done"
    if "cpu" in str(facts.get("device")) and cell.strategy == "fsdp2":
        del expected["strategy"]  # one process on a CPU has nobody to share with
    problems = [f"{name} is {facts.get(name)!r}" for name, value in expected.items() if facts.get(name) != value]
    trained = {NUMBER[cell.precision] if sharded else "float32"}
    if set(facts.get("dtypes trained", {})) != trained:
        problems.append(f"trained in {facts.get('dtypes trained')}")
    small = {"qlora": {"uint8", NUMBER[cell.precision]}, "lora8": {"int8"}}.get(
        cell.method.removeprefix("dora+"), set()
    )
    if small and not small & set(facts.get("dtypes frozen", {})):
        problems.append(f"frozen in {facts.get('dtypes frozen')}")
    if any(loss is None for loss in facts.get("losses", [])):
        problems.append(f"losses {facts['losses']}")
    return problems


def describe(facts: dict[str, Any]) -> str:
    names = ("dtypes trained", "dtypes frozen", "dtypes optimizer_state", "first_step gradients", "losses")
    return ", ".join(f"{name.split()[-1]} {facts[name]}" for name in names if name in facts)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without what was measured."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_mb")} for row in rows]


def compare_with_cpu(part: Part, work: Path) -> list[Cell]:
    """Twenty steps in float32 on the GPU and on the CPU: the same losses."""
    words = [
        *inputs(work),
        *METHODS["lora"].split(),
        "--precision",
        "fp32",
        "--max_steps",
        "20",
        "--logging_steps",
        "1",
    ]
    # AdamW divides by the size of a gradient, so the usual epsilon would make a step of a rounding error.
    words += ["--learning_rate", "1e-3", "--adam_epsilon", "1e-6"]
    losses = {}
    for yaml in ("single_gpu", "cpu"):
        folder = work / f"twenty-{yaml}"
        ended = part.run(f"20 steps {yaml}", launch(yaml, "launch/sft.py", *words, "--output_dir", str(folder)))
        losses[yaml] = [line["loss"] for line in metrics(folder)]
        if ended.code or len(losses[yaml]) != 20:
            return [Cell("20 steps on GPU and CPU", False, ended.cause, "both run")]
    difference = max(abs(a - b) for a, b in zip(losses["single_gpu"], losses["cpu"], strict=True))
    figure = f"losses differ by {difference:.1e} at most, last {losses['cpu'][-1]:.4f}"
    return [Cell("20 steps on GPU and CPU", difference < 1e-4, figure, "at most 1e-04", losses)]


# --- stop and resume ---

STEPS, STOP = 30, 6
# Name: the launch YAML (none: `python launch/sft.py`) and the options. Method full, as 8-bit state needs large tensors.
# The slowest comes first; a step of ZeRO-3 takes a second.
RESUMES: dict[str, tuple[str, str]] = {
    "zero3 qlora": ("zero3", METHODS["qlora"]),
    "fsdp2 qlora": ("fsdp2", METHODS["qlora"]),
    "zero2 fp16": ("zero2", f"{LORA} --precision fp16"),
    "adamw lora": ("", f"{LORA} --lora_dropout 0.1"),
    "adamw full": ("", "--method full"),
    "adamw_8bit": ("", "--method full --optim adamw_8bit"),
    "paged_adamw_8bit": ("", "--method full --optim paged_adamw_8bit"),
    "save_async": ("", "--method full --save_async --save_steps 3"),
    "fp16": ("", f"{LORA} --precision fp16"),
}
SMALL_RESUMES = ("save_async",)


def stop_and_resume(part: Part, name: str, work: Path, port: int) -> list[Cell]:
    """A run that is stopped by SIGTERM and started again has the bits of one that was never stopped."""
    yaml, options = RESUMES[name]
    steps = STEPS // 2 if yaml == "zero3" else STEPS
    words = [*inputs(work), *options.split(), "--max_steps", str(steps), "--logging_steps", "1"]
    straight, stopped, again = (work / f"{name}-{kind}".replace(" ", "-") for kind in ("straight", "stopped", "again"))

    def command(folder: Path, k: int) -> list[str]:
        line = ["launch/sft.py", *words, "--output_dir", str(folder)]
        return launch(yaml, *line, port=port + k, processes=1) if yaml else python(*line)

    required = "preempted, then the same weights and metrics"
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(part.run, f"{name} straight", command(straight, 0))
        part.run(f"{name} stopped", command(stopped, 1), stop=lambda: send_sigterm(stopped))
        ended = waiting.result()
    if ended.code:
        return [Cell(name, False, ended.cause, required)]
    status, steps = status_of(stopped), len(metrics(stopped))
    if status != "preempted":
        return [Cell(name, False, f"status {status} after {steps} steps", required)]
    ended = part.run(f"{name} resumed", command(stopped, 2))
    if ended.code:
        return [Cell(name, False, f"stopped after step {steps}; resumed: {ended.cause}", required)]
    difference = differences(straight, stopped)
    if difference:  # perhaps no two runs are equal on this card
        part.run(f"{name} straight again", command(again, 3))
        difference += f"; two straight runs: {differences(straight, again) or 'equal'}"
    return [Cell(name, not difference, f"stopped after step {steps}: {difference or 'equal bits'}", required)]


def send_sigterm(folder: Path) -> bool:
    """Once the run has done some steps, ask its main process to stop. Return whether that has happened."""
    if len(metrics(folder)) < STOP or not (folder / "run.json").is_file():
        return False
    os.kill(json.loads((folder / "run.json").read_text(encoding="utf-8"))["pid"], signal.SIGTERM)
    return True


def status_of(folder: Path) -> str:
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["status"] if path.is_file() else "none"


def same_bits(left: Any, right: Any) -> bool:
    """Return whether two tensors have equal shapes, types and bytes."""
    import torch

    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(*as_bytes)


def differences(left: Path, right: Path) -> str:
    """Say how the exports and metrics of two runs differ; empty if they are equal."""
    from safetensors.torch import load_file  # numpy has no bfloat16

    paths = [next(iter(sorted(folder.glob("*/*model.safetensors"))), None) for folder in (left, right)]
    if None in paths:
        return "an export is missing"
    ours, theirs = (load_file(path) for path in paths if path)
    unequal = [name for name in ours if name not in theirs or not same_bits(ours[name], theirs[name])]
    lines = [a["step"] for a, b in zip(metrics(left), metrics(right), strict=False) if a != b]
    if not unequal and not lines:
        return ""
    largest = max((float((ours[name] - theirs[name]).abs().max()) for name in unequal if name in theirs), default=0.0)
    return f"{len(unequal)} of {len(ours)} tensors differ (by {largest:.1e}), metrics from step {lines[:1]}"
