"""A step of every preference objective, on every backend and however it is cut, is that of the papers' formulas.

    python tests/proofs/preference.py --work W           # all cells; a second call goes on where the first was stopped
    python tests/proofs/preference.py --work W --only 'kto_other-*,sigmoid-fsdp2-*'
    python tests/proofs/preference.py --work W --write   # also the table, into accel_llm/preference/README.md
    python tests/proofs/preference.py --controls         # mistakes made on purpose: each must be noticed

A cell is an evaluation and then one step of plain gradient descent, tightly clipped, by the script's own main(). The
answers are of very uneven length, and some slots of the step are empty. The change of the weights divided by the
learning rate is the clipped gradient, for every engine, and must equal that of transformers' own model in float64, with
each answer computed alone and the formulas written once more (float64_answers.py); so must the losses, the reward
margins, z0 and delta. An objective whose name ends in `_other` has another model as its reference. For those without,
the policy itself is the reference, so that the loss of `sigmoid` must be ln 2. In bf16 rounding is allowed for.
"""

import argparse
import fnmatch
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import float64
import float64_answers
import matrix
import numpy as np
from float64_answers import Answer
from forks import Ended, Run, compute, execute, metric, warm
from safetensors.numpy import load_file, save_file

SCRIPTS = {"pairs": "dpo", "single": "kto"}
OBJECTIVES = {
    "sigmoid": "",
    "sum": f"--loss_type sigmoid ipo apo_zero --loss_weights 1 {float64_answers.IPO_WEIGHT} {float64_answers.APO_WEIGHT} "
    f"--rpo_alpha {float64_answers.SFT_WEIGHT}",
    "wpo": f"--use_weighting true --label_smoothing {float64_answers.SMOOTHING}",
    "simpo": f"--loss_type simpo --beta {float64_answers.SIMPO_BETA} --simpo_gamma {float64_answers.SIMPO_GAMMA}",
    "orpo": "--loss_type orpo",
    "kto": "--loss_type kto",
    "bco": "--loss_type bco",
}
SINGLE = ("kto", "bco")
# Names of objectives; `_other`: with another model as the reference.
NAMES = ("sigmoid", "sigmoid_other", "sum_other", "wpo_other", "simpo", "orpo", "kto", "kto_other", "bco_other")
STRATEGIES = ("cpu", "ddp", "zero1", "zero2", "zero3", "fsdp2")
METHODS = ("full", "lora", "qlora")
LAYOUTS = ("shared", "packed", "padded")
# Micro-batches in a step; `odd`: as many again, in a step whose size the processes do not divide.
CUTS = ("1", "4", "odd")
VALUES = {"pairs": "eval/rewards/margins", "kto": "eval/kl", "bco": "eval/delta"}
# A step has more slots than there are pairs, or answers.
PAIRS, HELD_OUT, SLOTS, LENGTH, SEED = 13, 5, 16, 176, 3
# The gradient and the losses, relative (of a loss or value below 1: absolute).
TOLERANCE = {"fp32": {"gradient": 1e-5, "loss": 1e-6, "evaluation": 1e-6, "value": 1e-5}}
TOLERANCE["bf16"] = {"gradient": 5e-2, "loss": 1e-2, "evaluation": 1e-2, "value": 5e-1}
STEP = f"--num_train_epochs 1 --lr_scheduler_type constant --optim sgd --learning_rate {matrix.RATE} "
STEP += f"--max_grad_norm {matrix.MAX_NORM} --eval_on_start true --eval_generate 0 --per_device_eval_batch_size 2"


class Cell(NamedTuple):
    objective: str
    strategy: str
    method: str
    layout: str
    cut: str
    recompute: str
    precision: str

    @property
    def name(self) -> str:
        return "-".join(self)

    @property
    def processes(self) -> int:
        return 1 if self.strategy == "cpu" else 2

    @property
    def loss_name(self) -> str:
        return self.objective.removesuffix("_other")

    @property
    def kind(self) -> str:
        return "single" if self.loss_name in SINGLE else "pairs"


def all_cells() -> list[Cell]:
    """Return cells in which every two values of two factors meet, and some that compute in bf16."""
    factors = itertools.product(NAMES, STRATEGIES, METHODS, LAYOUTS, CUTS, ("plain", "ckpt"), ("fp32",))
    cells = [cell for cell in itertools.starmap(Cell, factors) if cell.kind == "pairs" or cell.layout != "shared"]
    random.Random(0).shuffle(cells)  # so that what no pair of values asks for is a bit of everything
    layouts = {"sigmoid": "shared", "kto": "packed"}
    half = [Cell(n, s, "lora", layouts[n], "4", "plain", "bf16") for n in layouts for s in STRATEGIES if s != "zero1"]
    return [*matrix.pairwise(cells), *half]


# --- runs ------------------------------------------------------------------------------------------------------------


def build_run(cell: Cell, work: Path, sabotage: Callable[[], None] | None = None) -> Run:
    name = f"{sabotage.__name__}-{cell.name}" if sabotage else cell.name
    output = work / "runs" / name
    slots = SLOTS * (2 if cell.kind == "single" else 1)
    micro_batches = 1 if cell.cut == "1" else 4
    words = [*common_words(cell, work), "--output_dir", output, "--eval_files", work / f"{cell.kind}-eval.jsonl"]
    words += ["--precision", cell.precision, *STEP.split(), "--packing", str(cell.layout != "padded").lower()]
    words += ["--per_device_train_batch_size", slots // (cell.processes * micro_batches)]
    words += ["--total_batch_size", slots - (cell.cut == "odd")]
    words += ["--gradient_checkpointing", str(cell.recompute == "ckpt").lower()]
    if not cell.objective.endswith("_other"):
        words += ["--cache_dir", output.with_suffix(".cache")]  # the reference is computed by the run itself
    if sabotage is None and cell.layout == "packed" and cell.kind == "pairs":
        sabotage = without_sharing
    return Run(name, SCRIPTS[cell.kind], cell.strategy, cell.processes, [str(word) for word in words], output, sabotage)


def common_words(cell: Cell, work: Path) -> list[Any]:
    words = ["--model_name_or_path", work / "model", "--train_files", work / f"{cell.kind}.jsonl", "--seed", SEED]
    words += ["--max_length", LENGTH, "--logging_steps", 1, *OBJECTIVES[cell.loss_name].split()]
    if cell.kind == "single":
        words += ["--desirable_weight", float64_answers.DESIRABLE, "--undesirable_weight", float64_answers.UNDESIRABLE]
    words += matrix.METHODS[cell.method].split()
    if cell.method != "full":
        words += ["--adapter_name_or_path", work / f"adapter-{float64.ADAPTERS[cell.method]}"]
    if cell.objective.endswith("_other"):
        words += ["--cache_dir", work / "cache", "--reference_model_name_or_path", work / "reference"]
    return words


def ask_references(work: Path) -> None:
    """Let one process write what the other model says of all answers: sharded by ZeRO-3 or FSDP2 it cannot be asked."""
    lot = []
    for name in ("sigmoid_other", "kto_other"):
        cell = Cell(name, "cpu", "lora", "padded", "1", "plain", "fp32")
        run = build_run(cell, work)
        lot.append(run._replace(name=f"ask-{name}", words=[*run.words, "--check_only", "true"]))
    for end in execute(lot, work):
        if end.code:
            raise SystemExit(f"{end.run.name} failed: {end.cause}")


def without_sharing() -> None:
    """Compute the prompt of a pair for each of its answers."""
    from accel_llm.data.answers import Pairs, as_units
    from accel_llm.training import setup

    def separate(rows: Any, share: bool = True) -> Any:
        units = as_units(rows, share)
        return Pairs(units.rows, False) if isinstance(units, Pairs) else units

    setup.as_units = separate


# --- mistakes made on purpose ----------------------------------------------------------------------------------------


def mean_of_micro_batches() -> None:
    """Each micro-batch is averaged by itself, and then the micro-batches."""
    import dpo

    loss_of = dpo.preference_loss
    dpo.preference_loss = lambda model, batch, options: (
        loss_of(model, batch, options) * PAIRS / SLOTS * 4 / max(batch["total_weight"], 1)
    )


def z0_of_one_process() -> None:
    """Each process takes the z0 of its own answers."""
    from accel_llm.preference import objective

    objective.sum_over_processes = lambda accelerator, tensor: tensor  # type: ignore[assignment]


def z0_of_one_micro_batch() -> None:
    """Each micro-batch takes its own z0."""
    from accel_llm.preference import objective

    targets_of = objective.kto_targets

    def by_micro_batch(accelerator: Any, model: Any, batches: list, options: Any) -> float:
        targets = sum(targets_of(accelerator, model, [batch], options) for batch in batches)
        for batch in batches:
            batch.setdefault("z0", 0.0)  # one without answers has none
        return targets

    objective.kto_targets = by_micro_batch


def rejected_sees_chosen() -> None:
    """The rejected answer attends to the end of the chosen one in place of the prompt."""
    from accel_llm.data import answers

    keys_of = answers._keys

    def moved(starts: np.ndarray, lengths: list[int], left_out: list[int]) -> dict:
        batch = keys_of(starts, lengths, left_out)
        edges, places = batch["cu_seqlens_k"].tolist(), batch["key_positions"]
        for k, count in enumerate(left_out):
            if count:
                places[edges[k] : edges[k] + count] += lengths[k - 1] - count
        return batch

    answers._keys = moved


def reference_of_the_base() -> None:
    """The columns are those of a policy without its adapter."""
    from accel_llm.preference import reference

    columns_of = reference.reference_columns

    def by_base(accelerator: Any, model: Any, *others: Any) -> np.ndarray:
        inner: Any = accelerator.unwrap_model(model)
        with inner.disable_adapter():
            return columns_of(accelerator, model, *others)

    reference.reference_columns = by_base


CONTROLS = {
    mean_of_micro_batches: "sigmoid_other-cpu-full-padded-4-plain-fp32",
    z0_of_one_process: "kto_other-ddp-lora-padded-4-plain-fp32",
    z0_of_one_micro_batch: "kto_other-cpu-lora-padded-4-plain-fp32",
    rejected_sees_chosen: "sigmoid_other-cpu-lora-shared-1-plain-fp32",
    reference_of_the_base: "sigmoid-cpu-lora-shared-1-plain-fp32",
}


# --- the model, the answers, and a step in float64 -------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Write the models, the rows, and the step of each objective and method in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = matrix.write_model(work)
    float64.write_adapters(work)
    # A reference that is surer of itself than the policy, so that z0 is not 0.
    reference: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    with torch.no_grad():
        reference.model.norm.weight.mul_(1.2)
    reference.save_pretrained(work / "reference")
    tokenizer.save_pretrained(work / "reference")

    rows = preference_rows()
    parts = {"train": rows[:PAIRS], "eval": rows[PAIRS : PAIRS + HELD_OUT]}
    answers = {
        part: [encode(tokenizer, row["prompt"], row[side][0]) for row in some for side in ("chosen", "rejected")]
        for part, some in parts.items()
    }
    labels = {part: [k % 3 == 0 for k in range(len(some))] for part, some in answers.items()}
    for part, some in parts.items():
        single = [{"prompt": row["prompt"], "completion": row[side]} for row in some for side in ("chosen", "rejected")]
        single = [row | {"label": label} for row, label in zip(single, labels[part], strict=True)]
        for kind, lines in {"pairs": some, "single": single}.items():
            name = kind if part == "train" else f"{kind}-eval"
            (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for method, kind in itertools.product(METHODS, SCRIPTS):
        names = [name for name in NAMES if (name.removesuffix("_other") in SINGLE) == (kind == "single")]
        objectives = [(name.removesuffix("_other"), name.endswith("_other")) for name in names]
        which = labels if kind == "single" else {}
        step = float64_answers.steps(work, method, objectives, answers, which, SEED, LENGTH)
        save_file(step, work / f"{kind}-{method}-step.safetensors")


def preference_rows() -> list[dict[str, list]]:
    """Return pairs of an answer and of that of another row; every fourth one is many times as long as the other."""
    from accel_llm.demo import skills

    rows: list[dict[str, list]] = []
    chats = [row["messages"] for row in skills.demo_conversations("train")[:80]]
    for k, messages in enumerate(chats):
        chosen, other = messages[-1]["content"], chats[(k + 7) % len(chats)][-1]["content"]
        rejected = f"{other} {' '.join(chats[k - 1][-1]['content'] for _ in range(9))}" if k % 4 == 0 else other
        if chosen != rejected and len(messages) <= 4:
            sides = {"chosen": chosen, "rejected": rejected} if k % 8 else {"chosen": rejected, "rejected": chosen}
            row = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
            rows.append({"prompt": messages[:-1], **row})
    return rows


def encode(tokenizer: Any, prompt: list[dict], answer: dict) -> Answer:
    """The answer is trained up to the token that ends its turn, and not the line break after it."""
    render = partial(tokenizer.apply_chat_template, return_dict=False)
    start, ids = len(render(prompt, add_generation_prompt=True)), render([*prompt, answer])
    assert 2 * len(ids) - start <= LENGTH, f"{len(ids)} tokens: a pair may not fit into {LENGTH}"
    return Answer(ids, [*range(start, len(ids) - 1)])


# --- results ---------------------------------------------------------------------------------------------------------


def judge(cell: Cell, end: Ended, work: Path) -> dict[str, Any]:
    """Return the differences from float64, or the reason of a failure."""
    if end.code:
        return {"failed": f"exit code {end.code}: {' '.join(end.sentences) or end.cause}"[:400]}
    try:
        matrix.check_shards(cell, end.run.output)  # type: ignore[arg-type]
        return differences(cell, end.run.output, work)
    except (AssertionError, KeyError, ValueError, OSError, IndexError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def differences(cell: Cell, output: Path, work: Path) -> dict[str, Any]:
    """Return the errors by what they are of, and the loss and the value of the evaluation (`evaluated`)."""
    expected, after = load_file(work / f"{cell.kind}-{cell.method}-step.safetensors"), read_weights(output)
    prefix = f"{cell.objective} gradient "
    gradients = {name.removeprefix(prefix): g for name, g in expected.items() if name.startswith(prefix)}
    assert gradients.keys() == after.keys(), f"{gradients.keys() ^ after.keys()} on one side only"
    norm = np.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients.values()))
    assert norm > matrix.MAX_NORM, f"a gradient of {norm} is not clipped"
    scale, errors = matrix.MAX_NORM / (norm + 1e-6), []
    for name, gradient in gradients.items():
        measured = (expected[f"start {name}"] - after[name]) / matrix.RATE / scale
        errors.append(float(np.linalg.norm(measured - gradient) / np.linalg.norm(gradient)))
    value = VALUES[cell.loss_name if cell.kind == "single" else "pairs"]
    names = {"loss": "loss", "evaluation": "eval/loss", "value": value}
    result = {"gradient": max(errors)}
    for name, ours in names.items():
        wanted = float(expected[f"{cell.objective} {name}"])
        result[name] = abs(float(metric(output, ours)[0]) - wanted) / max(1.0, abs(wanted))
    if cell.objective == "sigmoid":
        result["loss"] = float(abs(metric(output, "loss")[0] - log(2)))
    return result | {"evaluated": [float(metric(output, name)[0]) for name in ("eval/loss", value)]}


def read_weights(output: Path) -> dict[str, np.ndarray]:
    """Return the exported weights; DeepSpeed has trained them in bf16, which numpy does not know."""
    from safetensors.torch import load_file as load_tensors

    paths = [*output.glob("model/*.safetensors"), *output.glob("adapter/*.safetensors")]
    return {name: tensor.double().numpy() for path in paths for name, tensor in load_tensors(path).items()}


def verdict(cell: Cell, result: dict[str, Any]) -> str:
    """Return `same`, `different` or `failed`."""
    if "failed" in result:
        return "failed"
    limits = TOLERANCE[cell.precision]
    return "same" if all(result[name] <= limit for name, limit in limits.items()) else "different"


def run_cells(cells: list[Cell], file: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Do the cells that have no result yet; add each result to `file` at once."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    left = {cell.name: cell for cell in cells if cell.name not in results}
    for cell in left.values():  # a reference of an earlier call, which was stopped, must not be found
        shutil.rmtree(build_run(cell, work).output.with_suffix(".cache"), ignore_errors=True)
    for end in execute([build_run(cell, work) for cell in left.values()], work):
        cell = left[end.run.name]
        results[cell.name] = result = judge(cell, end, work)
        print(cell.name, verdict(cell, result), json.dumps(result), f"{end.seconds:.1f} s", flush=True)
        file.write_text(json.dumps(results), encoding="utf-8")
        shutil.rmtree(end.run.output, ignore_errors=True)
        shutil.rmtree(end.run.output.with_suffix(".cache"), ignore_errors=True)
    return results


def run_controls(work: Path) -> list[str]:
    """Do the runs with a mistake made on purpose; return those that were not noticed."""
    unnoticed = []
    for sabotage, name in CONTROLS.items():
        cell = Cell(*name.split("-"))
        shutil.rmtree(build_run(cell, work, sabotage).output.with_suffix(".cache"), ignore_errors=True)
        result = next(judge(cell, end, work) for end in execute([build_run(cell, work, sabotage)], work))
        print(f"control {sabotage.__name__}: {verdict(cell, result)} {json.dumps(result)}", flush=True)
        unnoticed += [f"control {sabotage.__name__}: {result}"] if verdict(cell, result) != "different" else []
    return unnoticed


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return objectives by strategies, and the values of the other factors: the worst errors of loss and gradient."""
    cells = {name: Cell(*name.split("-")) for name in results}

    def worst(**values: str) -> str:
        chosen = [name for name, cell in cells.items() if all(getattr(cell, k) == v for k, v in values.items())]
        wrong = [word for name in chosen if (word := verdict(cells[name], results[name])) != "same"]
        numbers = [results[name] for name in chosen if "failed" not in results[name]]
        figures = " / ".join(f"{max(n[what] for n in numbers):.0e}" for what in ("loss", "gradient") if numbers)
        return ", ".join([f"{figures} ({len(chosen)})" if chosen else "", *wrong])

    lines = [f"| | {' | '.join(STRATEGIES)} |", "|---" * (len(STRATEGIES) + 1) + "|"]
    for name in NAMES:
        row = [worst(objective=name, strategy=strategy, precision="fp32") for strategy in STRATEGIES]
        lines.append(f"| {name} | {' | '.join(row)} |")
    for name in ("sigmoid", "kto"):
        row = [worst(objective=name, strategy=strategy, precision="bf16") for strategy in STRATEGIES]
        lines.append(f"| {name}, bf16 | {' | '.join(row)} |")
    lines += ["", "| | loss / gradient (cells) |", "|---|---|"]
    for factor, values in {"method": METHODS, "layout": LAYOUTS, "cut": CUTS, "recompute": ("plain", "ckpt")}.items():
        lines += [f"| {factor} {value} | {worst(**{factor: value}, precision='fp32')} |" for value in values]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERNS", help="cells whose name fits, such as kto_other-zero3-*")
    parser.add_argument("--write", action="store_true", help="write the table and tests/proofs/golden/preference.json")
    parser.add_argument(
        "--controls", action="store_true", help="do what must not go unnoticed, and only that without --only"
    )
    parser.add_argument("--work", type=Path, help="folder to work in, with the results so far")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="preference-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    if not (work / "cache").exists():
        compute(partial(prepare, work), work / "prepare.log")
        ask_references(work)
    if args.controls and (problems := run_controls(work)):
        raise SystemExit("\n".join(problems))
    if args.controls and not args.only:
        return
    patterns = (args.only or "*").split(",")
    cells = [cell for cell in all_cells() if any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)]
    if args.only and "*" not in args.only:
        cells = [Cell(*name.split("-")) for name in patterns]  # any cell, not only those of the table
    results = run_cells(cells, work / "results.json", work)
    if args.write:
        every = matrix.keep("preference", {cell.name: results[cell.name] for cell in cells})
        matrix.show("preference", table(every))
    print(table({cell.name: results[cell.name] for cell in cells}))
    wrong = [cell.name for cell in cells if verdict(cell, results[cell.name]) != "same"]
    if wrong:
        raise SystemExit("\n".join(f"{name}: {results[name]}" for name in wrong))


if __name__ == "__main__":
    main()
