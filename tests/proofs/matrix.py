"""Training gives the same number on every backend: the scripts' own main() under every launch YAML, cell by cell.

    python tests/proofs/matrix.py --write             # the whole matrix; writes accel_llm/backend/README.md
    python tests/proofs/matrix.py --only 'zero3-*-2p-*' --launch
    python tests/proofs/matrix.py --controls          # mistakes made on purpose: each must be noticed
    python tests/proofs/matrix.py --trajectories      # 50 steps of each recipe, compared with golden/trajectories.json
    python tests/proofs/matrix.py --resumes --write   # stopped and resumed runs: resumes.py, elastic.py, sick.py

A cell has two runs. *Curve*: 20 steps whose losses and final weights must equal those of one process on the CPU.
*Gradient*: an evaluation, then one step of plain gradient descent, tightly clipped, on 32 rows of uneven length. The
change of the weights divided by the learning rate is the clipped gradient, for every engine, and must equal that of
transformers' own model in float64, on a base of dequantized weights; so must the losses and the norm (float64.py).

Everything is imported once, and each rank is a fork with the environment that `accelerate launch` would give it.
"""

import argparse
import fnmatch
import itertools
import json
import random
import re
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import elastic
import float64
import numpy as np
import resumes
import sick
import trajectories
from forks import ROOT, Ended, Run, compute, execute, metric, warm
from sabotage import CONTROLS
from safetensors.numpy import load_file, save_file

GOLDEN = ROOT / "tests" / "proofs" / "golden"
# The page that shows each table.
PAGES = {"matrix": "accel_llm/backend/README.md", "resumes": "accel_llm/checkpoint/README.md"}
PAGES["backends"] = "accel_llm/adapters/README.md"
PAGES["preference"] = "accel_llm/preference/README.md"
GOLDEN_METHODS = ("full", "lora", "qlora")
STRATEGIES = ("cpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
SHARDED = ("zero3", "zero3_offload", "fsdp2")
LORA = "--method lora --lora_r 8 --lora_alpha 16"
METHODS = {
    "full": "--method full",
    "lora": LORA,
    "dora": f"{LORA} --use_dora",
    "qlora": LORA.replace("lora", "qlora", 1),
    "lora8": f"{LORA} --load_in_8bit",
}
TOLERANCE = {"full": 1e-5, "lora": 1e-5, "dora": 1e-5, "qlora": 1e-4, "lora8": 1e-4}
GRADIENT_TOLERANCE = 1e-5  # relative, of each tensor's norm, and of losses
EVALUATION_8_BITS = 1e-3  # in eval mode bitsandbytes also rounds the inputs of 8-bit layers, which float64 does not
NORM_TOLERANCE = 5e-7  # relative; torch's own norm on a CPU is off by 7e-7 for this small model
MOVED = 1e-3  # every trained tensor has to move by more than this somewhere, or equality would mean nothing
STEPS, ROWS, LENGTH = 20, 32, 64
# AdamW divides by the size of a gradient, so a rounding error of a tiny gradient becomes a whole step. With the usual
# epsilon of 1e-8 weights differed by up to 6e-6, too close to the limit of 1e-5.
CURVE = f"--max_steps {STEPS} --total_batch_size 8 --learning_rate 1e-3 --adam_epsilon 1e-6"
# The step is so long that float32 loses nothing of the gradient when the old weights are subtracted from the new ones.
RATE, MAX_NORM = 1e6, 0.01
HELD_OUT = 8  # rows of an evaluation, those after the trained ones
WHOLE = f"--total_batch_size {ROWS} --limit_rows {ROWS} --lr_scheduler_type constant --eval_on_start true"
GRADIENT = f"{WHOLE} --optim sgd --learning_rate {RATE} --max_grad_norm {MAX_NORM}"
# Torch's AdamW, with evaluations between the steps.
PATH_STEPS, PATH_EVERY, ADAMW = 10, 5, {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.0}
PATH = f"{WHOLE} --max_steps {PATH_STEPS} --eval_steps {PATH_EVERY} --learning_rate {ADAMW['lr']} "
PATH += f"--adam_epsilon {ADAMW['eps']} --weight_decay 0 --max_grad_norm 1"


class Cell(NamedTuple):
    strategy: str
    method: str
    packing: str
    accumulation: int
    recompute: str
    processes: int
    script: str

    @property
    def name(self) -> str:
        strategy, method, packing, accumulation, recompute, processes, script = self
        return f"{strategy}-{method}-{packing}-acc{accumulation}-{recompute}-{processes}p-{script}"

    @property
    def must(self) -> bool:
        """Whether the cell must work. The others may be refused with an error before the model loads."""
        impossible = {"qlora": ("zero3_offload",), "lora8": SHARDED}
        return self.strategy not in impossible.get(self.method, ())


def all_cells() -> list[Cell]:
    product = itertools.product(
        STRATEGIES, METHODS, ("packed", "padded"), (1, 4), ("ckpt", "plain"), (1, 2), ("sft", "pretrain")
    )
    cells = [cell for cell in itertools.starmap(Cell, product) if cell.strategy != "cpu" or cell.processes == 1]
    random.Random(0).shuffle(cells)  # so that a run that is cut short covers a bit of everything
    return cells


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Return few of `cells`, in which every two values of two factors that can meet do meet at least once."""
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in cells}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs[cell] & missing)))
        missing -= pairs[chosen[-1]]
    return sorted(chosen)


# --- runs ------------------------------------------------------------------------------------------------------------


def script_arguments(cell: Cell, kind: str, work: Path, output: Path) -> list[str]:
    """The script's command line."""
    data = work / f"{cell.script}.jsonl"
    rows = ROWS if kind in ("gradient", "path") else 8
    each = rows // (cell.processes * cell.accumulation)
    words = ["--model_name_or_path", work / "model", "--train_files", data, "--output_dir", output]
    words += ["--cache_dir", work / "cache", "--precision", "fp32", "--logging_steps", 1, "--max_length", LENGTH]
    words += {"gradient": GRADIENT, "path": PATH}.get(kind, CURVE).split()
    words += ["--packing", str(cell.packing == "packed").lower(), "--per_device_train_batch_size", each]
    words += ["--gradient_checkpointing", str(cell.recompute == "ckpt").lower(), *METHODS[cell.method].split()]
    if kind in ("gradient", "path"):
        words += ["--eval_files", work / f"{cell.script}-eval.jsonl"]
        words += ["--eval_generate", 0]
        if cell.method != "full":
            words += ["--adapter_name_or_path", work / f"adapter-{float64.ADAPTERS[cell.method]}"]
    return [str(word) for word in words]


def build_run(cell: Cell, kind: str, work: Path, sabotage: Callable[[], None] | None = None) -> Run:
    name = f"{sabotage.__name__ if sabotage else kind}-{cell.name}"
    output = work / "runs" / name
    words = script_arguments(cell, kind, work, output)
    return Run(name, cell.script, cell.strategy, cell.processes, words, output, sabotage)


def reference_cell(cell: Cell) -> Cell:
    """Return the cell to compare with: one process on the CPU, which cuts the step in a way that no cell does."""
    return Cell("cpu", cell.method, cell.packing, 2, "plain", 1, cell.script)


# --- results of a run -------------------------------------------------------------------------------------------------


def read_weights(output: Path) -> dict[str, np.ndarray]:
    paths = [*output.glob("model/*.safetensors"), *output.glob("adapter/*.safetensors")]
    return {name: tensor.astype(np.float64) for path in paths for name, tensor in load_file(path).items()}


def largest_difference(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert weights.keys() == expected.keys(), f"{weights.keys() ^ expected.keys()} on one side only"
    return max(float(np.abs(weights[name] - tensor).max()) for name, tensor in expected.items())


def judge_curve(cell: Cell, output: Path, work: Path) -> dict[str, float]:
    """Return the largest differences of loss and weights from the reference run."""
    reference = build_run(reference_cell(cell), "reference", work).output
    expected, weights, before = (
        read_weights(reference),
        read_weights(output),
        load_file(work / "model" / "model.safetensors"),
    )
    # The first values of an adapter's A and of DoRA's magnitudes are not on the disk; B was zero.
    start = {
        name: before.get(name, 0 * tensor) for name, tensor in expected.items() if name in before or "lora_B" in name
    }
    still = [name for name, tensor in start.items() if np.abs(expected[name] - tensor).max() < MOVED]
    assert start and not still, f"hardly trained: {still}"
    for name in ("learning_rate", "supervised_tokens"):
        assert (metric(output, name) == metric(reference, name)).all(), f"{name} differs"
    losses = metric(output, "loss") - metric(reference, "loss")
    return {"loss": float(np.abs(losses).max()), "weights": largest_difference(weights, expected)}


def check_shards(cell: Cell, output: Path) -> None:
    """Each process must hold the whole model, or half of it if the strategy shards and there are two processes."""
    parameters = json.loads((output / "run.json").read_text(encoding="utf-8"))["accelerate"]["parameters"]
    held, total = parameters["this_process"], parameters["total"]
    if cell.strategy in SHARDED and cell.processes == 2:
        assert abs(held / total - 1 / 2) < 0.01, f"not sharded: {held} of {total} parameters are held by this process"


def judge_gradient(cell: Cell, output: Path, work: Path) -> dict[str, float]:
    """Return the largest relative error of a tensor's clipped gradient, and those of the losses and the norm."""
    expected, after = load_file(work / f"{cell.script}-{cell.method}-step.safetensors"), read_weights(output)
    gradients = {name.split()[1]: tensor for name, tensor in expected.items() if name.startswith("gradient ")}
    assert gradients.keys() == after.keys(), f"{gradients.keys() ^ after.keys()} on one side only"
    errors = []
    for name, gradient in gradients.items():
        measured = (expected[f"start {name}"] - after[name]) / RATE
        errors.append(float(np.linalg.norm(measured - gradient) / np.linalg.norm(gradient)))
    scalars = {"loss error": ("loss", "loss"), "norm": ("grad_norm", "norm"), "evaluation": ("eval/loss", "evaluation")}
    wrong = {k: float(abs(metric(output, ours)[0] / expected[name] - 1)) for k, (ours, name) in scalars.items()}
    return {"gradient": max(errors), **wrong}


def judge_path(cell: Cell, output: Path, work: Path) -> dict[str, float]:
    """Return the largest relative errors of the losses, evaluations and norms of several steps."""
    curves = json.loads((work / f"{cell.script}-{cell.method}-path.json").read_text(encoding="utf-8"))
    return {name: float(np.abs(metric(output, name) / curve - 1).max()) for name, curve in curves.items()}


def judge(cell: Cell, kind: str, end: Ended, work: Path) -> dict[str, Any]:
    if end.sentences:
        early = end.code == 2 and not end.run.output.exists() and len(end.sentences) == 1
        return {"status": "refused" if early else "failed", "note": " ".join(end.sentences)}
    if end.code:
        return {"status": "failed", "note": f"exit code {end.code}: {end.cause}"}
    try:
        check_shards(cell, end.run.output)
        numbers = JUDGES.get(kind, judge_curve)(cell, end.run.output, work)
    except (AssertionError, KeyError, ValueError, OSError) as error:
        return {"status": "failed", "note": f"{type(error).__name__}: {error}"}
    limits = dict.fromkeys(numbers, TOLERANCE[cell.method] if kind == "curve" else GRADIENT_TOLERANCE)
    limits |= {"norm": NORM_TOLERANCE}
    if cell.method == "lora8":
        limits |= {"evaluation": EVALUATION_8_BITS, "eval/loss": EVALUATION_8_BITS}
    return {"status": "same" if all(value <= limits[k] for k, value in numbers.items()) else "different", **numbers}


JUDGES = {"gradient": judge_gradient, "path": judge_path}


# --- the model and the data -------------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Write the model, adapters for it, and rows of uneven length; and what float64 makes of a step."""
    from accel_llm.demo import skills

    tokenizer = write_model(work)
    float64.write_adapters(work)

    chats = [
        encoded
        for row in skills.demo_conversations("train")[:400]
        if len((encoded := chat(tokenizer, row))[1]) <= LENGTH
    ]
    texts = [text(tokenizer, page[: 8 + 13 * k % 48]) for k, page in enumerate(skills.demo_documents(0, 300))]
    for script, rows in {"sft": chats, "pretrain": texts}.items():
        for name, part in ((script, rows), (f"{script}-eval", rows[ROWS : ROWS + HELD_OUT])):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row, *_ in part), encoding="utf-8")
        for method in METHODS:
            step = float64.clipped_step(work, method, rows[:ROWS], rows[ROWS : ROWS + HELD_OUT], MAX_NORM)
            save_file(step, work / f"{script}-{method}-step.safetensors")


def write_model(work: Path) -> Any:
    """Write a tiny Qwen3 with tied embeddings, in sizes that bitsandbytes' blocks divide; return its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from accel_llm.demo.tokenizer import build_demo_tokenizer

    tokenizer = build_demo_tokenizer()
    torch.manual_seed(0)
    width = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    rest = {"num_hidden_layers": 2, "tie_word_embeddings": True, "initializer_range": 0.1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **width, **rest))
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    return tokenizer


def prepare_paths(work: Path) -> None:
    """Write the curves of `PATH_STEPS` steps in float64 for each method, of the conversations."""
    from accel_llm.demo.tokenizer import build_demo_tokenizer

    tokenizer = build_demo_tokenizer()
    rows = [
        chat(tokenizer, json.loads(line))
        for line in (work / "sft.jsonl").read_text("utf-8").splitlines()[: ROWS + HELD_OUT]
    ]
    for method in METHODS:
        curves = float64.path(work, method, rows[:ROWS], rows[ROWS:], PATH_STEPS, PATH_EVERY, **ADAMW)
        (work / f"sft-{method}-path.json").write_text(json.dumps(curves), encoding="utf-8")


def chat(tokenizer: Any, row: dict) -> float64.EncodedRow:
    """Return a conversation, its ids and the trained positions: each answer up to the token that ends its turn."""
    messages, trained = row["messages"], set()
    render = partial(tokenizer.apply_chat_template, return_dict=False)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(render(messages[:k], add_generation_prompt=True))
            trained |= set(range(start, len(render(messages[: k + 1])) - 1))  # not the line break after it
    return {"messages": messages}, render(messages), trained


def text(tokenizer: Any, page: str) -> float64.EncodedRow:
    """Return the same for a plain text, of which every token and the end token are trained."""
    ids = [*tokenizer(page)["input_ids"], tokenizer.eos_token_id]
    return {"text": page}, ids, set(range(len(ids)))


# --- all cells -------------------------------------------------------------------------------------------------------


def run_cells(
    kinds: dict[Cell, list[str]], work: Path, launch: bool = False, keep: bool = False
) -> dict[str, dict[str, Any]]:
    """Do the runs of the given kinds for each cell; print a line for each cell and return the results by name."""
    references = {reference_cell(cell) for cell in kinds if "curve" in kinds[cell]}
    for end in execute([build_run(cell, "reference", work) for cell in sorted(references)], work):
        if end.code:
            raise SystemExit(f"{end.run.name}, the reference, failed: {end.cause}")
    runs = {build_run(cell, kind, work).name: (cell, kind) for cell in kinds for kind in kinds[cell]}
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for end in execute([build_run(cell, kind, work) for cell, kind in runs.values()], work, launch):
        cell, kind = runs[end.run.name]
        result = results[cell.name]
        result |= merge_results(result, judge(cell, kind, end, work))
        result["seconds"] = round(result.get("seconds", 0) + end.seconds, 1)
        kinds[cell].remove(kind)
        if not kinds[cell]:
            print(f"{len(results)}/{len(kinds)} {cell.name} {json.dumps(result)}", flush=True)
        if not keep:
            shutil.rmtree(end.run.output, ignore_errors=True)
    return results


def merge_results(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge the results of a cell's two runs; the status is the worse one."""
    order = ["same", "refused", "different", "failed"]
    return old | new | {"status": max(old.get("status", "same"), new["status"], key=order.index)}


def failures(cells: list[Cell], results: dict[str, dict[str, Any]]) -> list[str]:
    allowed = {cell.name: {"same"} if cell.must else {"same", "refused"} for cell in cells}
    return [f"{name}: {result}" for name, result in results.items() if result["status"] not in allowed[name]]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return strategies by methods: the worst differences of loss, weights and gradient, and the number of cells."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for strategy in STRATEGIES:
        row = [strategy]
        for method in METHODS:
            cells = [result for name, result in results.items() if name.startswith(f"{strategy}-{method}-")]
            same = [result for result in cells if result["status"] == "same"]
            worst = [max((r[n] for r in same if n in r), default=None) for n in ("loss", "weights", "gradient")]
            differences = " / ".join(f"{value:.0e}" for value in worst if value is not None)
            others = Counter(result["status"] for result in cells if result["status"] != "same")
            parts = ([(differences, len(same))] if same else []) + list(others.items())
            row.append(", ".join(f"{what} ({count})" for what, count in parts))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write(results: dict[str, dict[str, Any]]) -> None:
    """Add each cell's result to tests/proofs/golden/matrix.json, and write the table of all of them into its page."""
    results = keep("matrix", results)
    show("matrix", table(results))


def keep(name: str, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add results to those of earlier runs in tests/proofs/golden, and return all of them."""
    file = GOLDEN / f"{name}.json"
    results = (json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else {}) | results
    lines = ",\n".join(f'"{name}": {json.dumps(result)}' for name, result in sorted(results.items()))
    head = json.dumps({"versions": trajectories.versions()})[1:-1]
    file.write_text(f'{{{head}, "cells": {{\n{lines}\n}}}}\n', encoding="utf-8")
    return results


def show(name: str, text: str) -> None:
    """Write a table into the page that shows it, between the marks of its name."""
    readme, marks = ROOT / PAGES[name], (f"<!-- {name} -->\n", f"<!-- /{name} -->")
    before, rest = readme.read_text(encoding="utf-8").split(marks[0])
    readme.write_text(f"{before}{marks[0]}{text}\n{marks[1]}{rest.split(marks[1])[1]}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="cells whose name fits, zero3-qlora-*-2p-sft")
    parser.add_argument("--pairwise", action="store_true", help="a few cells that have every two values of two factors")
    parser.add_argument("--paths", action="store_true", help="steps and evaluations of each method against float64")
    parser.add_argument("--controls", action="store_true", help="what must not go unnoticed")
    parser.add_argument("--trajectories", action="store_true", help="compare with the recorded ones")
    parser.add_argument("--record", action="store_true", help="record the trajectories")
    parser.add_argument("--resumes", action="store_true", help="stopped and resumed runs; with --pairwise a few")
    parser.add_argument("--launch", action="store_true", help="by accelerate launch instead of forks")
    parser.add_argument("--write", action="store_true", help="write the table and tests/proofs/golden/matrix.json")
    parser.add_argument("--work", type=Path, help="folder to work in and to keep everything in")
    return parser.parse_args()


def run_controls(work: Path) -> list[str]:
    """Do the runs with a mistake made on purpose; return the controls that were not noticed."""
    unnoticed = []
    cells = {cell.name: cell for cell in all_cells()}
    for sabotage, (name, kind, expected) in CONTROLS.items():
        run = build_run(cells[name], kind, work, sabotage)
        result = next(judge(cells[name], kind, end, work) for end in execute([run], work))
        verdict = f"{result['status']} {result.get('note', '')}".strip()
        print(f"control {sabotage.__name__}: {verdict} {result.get('gradient', '')}", flush=True)
        if not re.match(expected, verdict):
            unnoticed.append(f"control {sabotage.__name__}: {result}, but {expected!r} was expected")
    return unnoticed


def run_resumes(work: Path, args: argparse.Namespace) -> list[str]:
    """Do the cells and controls of stopped and resumed runs; return those with a wrong result."""
    resumes.prepare(work)
    cells, pairs, ill, stops = resumes.all_cells(), elastic.CELLS, sick.CELLS, resumes.STOPS
    if args.pairwise:
        cells, pairs, ill, stops = pairwise(cells)[::2], pairs[1::16], ill[1::3], stops[1:2]
    kinds: list[tuple[list[Any], Callable[[Any], dict[str, Any]], str]] = [
        (cells, lambda cell: resumes.judge(cell, work, stops), "bit-equal"),
        (pairs, lambda cell: elastic.judge(cell, work), "same"),
        (ill, lambda cell: sick.judge(cell, work), "skipped alike"),
    ]
    results, problems = {}, []
    for chosen, judge_cell, expected in kinds:
        for cell in [cell for cell in chosen if fnmatch.fnmatch(cell.name, args.only or "*")]:
            results[cell.name] = judge_cell(cell)
            print(cell.name, json.dumps(results[cell.name]), flush=True)
            problems += [f"{cell.name}: {results[cell.name]}"] if results[cell.name]["status"] != expected else []
    for control in resumes.CONTROLS if not args.only else ():
        seen = resumes.judge(resumes.Cell("cpu", "lora", 1, 1, 0), work, (3,), control)
        print(f"control {control.__name__}: {seen['status']} {seen.get('note', '')}", flush=True)
        problems += [f"control {control.__name__}: {seen}"] if seen["status"] != "different" else []
    if args.write:
        every = keep("resumes", results)
        text = resumes.table({name: every[name] for name in every if "-workers" in name})
        print(text)
        show("resumes", text)
    return problems


def main() -> None:
    args, since = arguments(), time.monotonic()
    work = args.work or Path(tempfile.mkdtemp(prefix="matrix-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    compute(partial(prepare, work), work / "prepare.log")
    plain = [Cell("cpu", method, "packed", 1, "plain", 1, "sft") for method in GOLDEN_METHODS]
    tiny = {cell.method: script_arguments(cell, "curve", work, work) for cell in plain}
    if args.record:
        trajectories.record(work, tiny)
    everything = not (args.only or args.pairwise or args.controls or args.trajectories or args.record or args.resumes)
    everything = everything and not args.paths
    problems = []
    if args.resumes:
        problems = run_resumes(work, args)
    elif everything or args.only or args.pairwise:
        cells = [cell for cell in all_cells() if fnmatch.fnmatch(cell.name, args.only or "*")]
        kinds = {cell: ["curve", "gradient"] for cell in cells}
        if args.pairwise:
            # One run a cell: what a float64 gradient proves of a step needs no reference run.
            kinds = {cell: ["gradient"] for cell in pairwise([cell for cell in cells if cell.must])}
        results = run_cells(kinds, work, args.launch, keep=args.work is not None)
        problems = failures(list(kinds), results)
        print(f"{table(results)}\n{len(results)} cells, {time.monotonic() - since:.0f} s", flush=True)
        if args.write:
            write(results)
    if everything or args.paths:
        compute(partial(prepare_paths, work), work / "prepare.log")
        cells = [Cell("cpu", method, "padded", 2, "ckpt", 1, "sft") for method in METHODS]  # 32 rows: a step
        results = run_cells({cell: ["path"] for cell in cells}, work, keep=args.work is not None)
        problems += failures(cells, results)
    if everything or args.controls:
        problems += run_controls(work)
    if everything or args.trajectories:
        problems += trajectories.check(work, tiny)
    if problems:
        raise SystemExit("\n".join(problems))
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
