"""Every method on every backend: trained by two processes, it gives the losses and weights of one process on the CPU.

    python tests/proofs/backends.py --work W           # all cells; a second call goes on where the first was stopped
    python tests/proofs/backends.py --work W --only 'ia3-*,*-zero3-*'    # a few, named method-backend-base
    python tests/proofs/backends.py --work W --write   # also the table, into accel_llm/adapters/README.md
    python tests/proofs/backends.py --work W --resumes # each method, stopped and resumed
    python tests/proofs/backends.py --controls         # refusals and mends undone: each must be noticed

A cell has five steps of the script's own main() with two processes, accumulation and rows of uneven length. Its losses,
gradient norms and weights must equal those of one process that takes each step at once. A method that cannot run there
must say so before the model loads. The column "float64" has one step of plain gradient descent, of two processes with
accumulation, from the adapter that the one process exported: the change of each weight divided by the learning rate is
its gradient, and must equal that of plain PEFT in float64. All this is in float32; the columns "bf16" compute in bf16,
as on a GPU, and may differ by its rounding. With --resumes a cell is a run of each method with dropout that
is stopped and continued, as in resumes.py: it must be bit-equal to one that was never stopped.
"""

import argparse
import fnmatch
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import float64
import matrix
import numpy as np
import resumes
from forks import Ended, Run, compute, execute, metric, warm
from safetensors.numpy import load_file, save_file

# A base in 4 bits is sharded in packed bytes; one in 8 bits cannot be sharded. Both compute in float32.
COLUMNS = (
    *((strategy, "fp32") for strategy in ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "float64")),
    *((strategy, "bf16") for strategy in ("zero2", "zero3", "fsdp2")),
    *((strategy, "4-bit") for strategy in ("ddp", "zero2", "zero3", "fsdp2")),
    ("ddp", "8-bit"),
)
STEPS, RATE = 5, 5e-3
# A gradient norm shows what AdamW hides: a gradient that is too long by a constant factor.
CURVE = f"--max_steps {STEPS} --total_batch_size 8 --learning_rate {RATE} --adam_epsilon 1e-6"
# Losses, weights as a share of one step, and gradient norms, relative. In bf16 AdamW turns the rounding of a small
# gradient into a whole step of its weight, so only losses and norms say something there.
LOSS = {"fp32": 1e-5, "bf16": 2e-2, "4-bit": 1e-4, "8-bit": 1e-4}
WEIGHTS = {"fp32": 1e-2, "4-bit": 1e-1, "8-bit": 1e-1}
NORM = {"fp32": 1e-4, "bf16": 5e-2, "4-bit": 1e-4, "8-bit": 1e-4}
GRADIENT = f"{matrix.GRADIENT.replace('--eval_on_start true', '')} --max_steps 1"


class Cell(NamedTuple):
    method: str
    strategy: str
    base: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.strategy}-{self.base}"

    @property
    def reference(self) -> "Cell":
        return self._replace(strategy="cpu")


def methods() -> list[str]:
    from accel_llm.adapters.methods import REFUSED_METHODS, peft_methods
    from accel_llm.config.method import METHODS_WITHOUT_ADAPTER

    names = [name for name in peft_methods() if name not in (*REFUSED_METHODS, "qlora")]  # qlora is lora in 4 bits
    return [*METHODS_WITHOUT_ADAPTER, *names]


def all_cells() -> list[Cell]:
    from accel_llm.config.method import METHODS_WITHOUT_ADAPTER

    cells = [Cell(method, *column) for column, method in itertools.product(COLUMNS, methods())]
    # What has no adapter has no base in 4 bits. AdaLoRA has given up ranks when it is exported, and a network of prompts
    # is not in the file: they do not go on from there.
    return [
        cell
        for cell in cells
        if (cell.method not in METHODS_WITHOUT_ADAPTER or ("bit" not in cell.base and cell.strategy != "float64"))
        and not (cell.strategy == "float64" and cell.method in ("adalora", "prefix", "p_tuning"))
    ]


# --- runs ------------------------------------------------------------------------------------------------------------


def fill_memory() -> None:
    """Let torch fill memory that a tensor is made of with NaN, so that nothing can depend on what stood there before."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)


def without_noise() -> None:
    """As `fill_memory`, and let PVeRA, which samples in training, take the means instead."""
    from peft.tuners.pvera.layer import PveraLayer

    fill_memory()
    PveraLayer._reparametrize = lambda self, mu, logvar, adapter_name: mu  # type: ignore[method-assign]


def build_run(cell: Cell, work: Path) -> Run:
    gradient, alone = cell.strategy == "float64", cell.strategy == "cpu"
    output, rows = work / "runs" / cell.name, matrix.ROWS if gradient else 8
    model = "biased" if cell.method == "bitfit" else "model"
    words = ["--model_name_or_path", work / model, "--train_files", work / "sft.jsonl", "--output_dir", output]
    words += ["--cache_dir", work / "cache", "--precision", "bf16" if cell.base == "bf16" else "fp32"]
    words += ["--logging_steps", 1, "--max_length", 80]
    words += ["--packing", "false"] if gradient else []
    words += ["--per_device_train_batch_size", rows if alone else rows // 4, "--eval_generate", 0]
    words += [*(GRADIENT if gradient else CURVE).split(), "--method", cell.method]
    words += {"4-bit": ["--load_in_4bit"], "8-bit": ["--load_in_8bit"]}.get(cell.base, [])
    if gradient:
        words += ["--adapter_name_or_path", adapter(cell, work)]
        words += ["--learning_rate_patterns", f"vblora_logits={matrix.RATE}"] if cell.method == "vblora" else []
    elif cell.method in resumes.OPTIONS:
        words += ["--method_options", *resumes.OPTIONS[cell.method].split()]
    strategy, processes = ("ddp" if gradient else cell.strategy), 1 if alone else 2
    sabotage = without_noise if cell.method == "pvera" else fill_memory
    return Run(cell.name, "sft", strategy, processes, [str(word) for word in words], output, sabotage)


def adapter(cell: Cell, work: Path) -> Path:
    return build_run(cell.reference, work).output / "adapter"


def prepare(work: Path) -> None:
    """Write the model and the rows of the matrix, and the same model with biases."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    matrix.prepare(work)
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(work / "model", attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "biased")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(work / "biased")


def nothing_refused() -> None:
    from accel_llm.adapters import refusals

    refusals.REFUSALS = ()


def shared_in_a_layer() -> None:
    """Each weight is sharded with the first layer that uses it, also one that all layers share."""
    from accel_llm.model import placement

    placement._shared_by_units = lambda model: set()


def controls() -> list[tuple[Cell, Callable[[], None]]]:
    """Return the cells that cannot be the same: what is refused, and a mend undone."""
    from accel_llm.adapters.refusals import REFUSALS

    refused = [
        Cell(refusal.method, strategy, "4-bit" if refusal.only_in_4_bits else "fp32")
        for refusal in REFUSALS
        for strategy in refusal.strategies
    ]
    undone = [(Cell(method, "fsdp2", "fp32"), shared_in_a_layer) for method in ("vblora", "unilora")]
    return [*((cell, nothing_refused) for cell in refused), *undone]


# --- results ---------------------------------------------------------------------------------------------------------


def judge(cell: Cell, end: Ended, work: Path) -> dict[str, Any]:
    """Return the sentence of a refusal, the reason of a failure, or the differences from the reference."""
    output = end.run.output
    if end.sentences and end.code == 2 and not (output / "run.json").exists():
        return {"refused": end.sentences[0].removeprefix("error: ")}
    if end.code and cell.strategy != "float64":
        return {"failed": f"exit code {end.code}: {' '.join(end.sentences) or end.cause}"[:400]}
    try:
        if cell.strategy == "cpu":
            return {}
        if cell.strategy == "float64":
            return judge_gradient(cell, output, work)
        check_shards(cell, output)
        return judge_curve(cell.base, output, build_run(cell.reference, work).output)
    except (AssertionError, KeyError, ValueError, OSError, IndexError, RuntimeError) as error:
        return {"failed": f"{type(error).__name__}: {error}; {end.cause if end.code else ''}"[:400]}


def judge_curve(base: str, output: Path, reference: Path) -> dict[str, float]:
    losses, norms = (metric(output, name) - metric(reference, name) for name in ("loss", "grad_norm"))
    norm = float(np.abs(norms / metric(reference, "grad_norm")).max())
    differences = {"loss": float(np.abs(losses).max()), "norm": norm}
    if base in WEIGHTS:
        differences["weights"] = matrix.largest_difference(checkpointed(output), checkpointed(reference)) / RATE
    return differences


def checkpointed(output: Path) -> dict[str, np.ndarray]:
    """Return the flat trained weights in the last checkpoint of a run, which the processes wrote in pieces."""
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted((output / "checkpoints").iterdir())[-1].glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            name, field, start = key.rsplit("|", 2)
            if field == "weight":
                pieces.setdefault(name, {})[int(start)] = tensor.reshape(-1).astype(np.float64)
    return {name: np.concatenate([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def check_shards(cell: Cell, output: Path) -> None:
    """Each process must hold much less than the whole model if the strategy shards it."""
    parameters = json.loads((output / "run.json").read_text(encoding="utf-8"))["accelerate"]["parameters"]
    held, total = parameters["this_process"], parameters["total"]
    if cell.strategy in matrix.SHARDED:
        assert held / total < 0.6, f"not sharded: {held} of {total} parameters are held by this process"


def judge_gradient(cell: Cell, output: Path, work: Path) -> dict[str, float]:
    """Return the largest relative error of a weight's clipped gradient."""
    file = work / f"{cell.method}-step.safetensors"
    compute(partial(write_step, cell, work, file), file.with_suffix(".log"))
    return {"gradient": largest_gradient_error(load_file(file), checkpointed(output))}


def largest_gradient_error(expected: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    """Return the largest relative error of a weight's gradient, which its change `after` one step tells.

    Raises:
        AssertionError: other weights are trained than expected.
    """
    names = [name.removeprefix("gradient ") for name in expected if name.startswith("gradient ")]
    # A checkpoint also holds parts that are not trained, such as DeLoRA's norms of the base's weights.
    trained = after.keys() - {name.removeprefix("buffer ") for name in expected if name.startswith("buffer ")}
    assert set(names) == trained, f"{set(names) ^ trained} on one side only"
    whole = np.linalg.norm([np.linalg.norm(expected[f"gradient {name}"]) for name in names])
    errors = {}
    for name in names:
        gradient, start = (expected[f"{kind} {name}"].reshape(-1) for kind in ("gradient", "start"))
        measured = (start - after[name]) / matrix.RATE
        # A weight of a single number may have a gradient near 0, which is what is left of large ones of many tokens.
        size = max(np.linalg.norm(gradient), whole / 1000)
        errors[name] = float(np.linalg.norm(measured - gradient) / size)
    return max(errors.values())


def write_step(cell: Cell, work: Path, file: Path) -> None:
    """Write the step of plain PEFT in float64 from the exported adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from accel_llm.config.method import PROMPT_METHODS
    from accel_llm.demo.tokenizer import build_demo_tokenizer

    if cell.method == "pvera":
        without_noise()
    lines = (work / "sft.jsonl").read_text("utf-8").splitlines()[: matrix.ROWS]
    rows = [matrix.chat(build_demo_tokenizer(), json.loads(line)) for line in lines]
    base: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    prompts = cell.method in PROMPT_METHODS  # PEFT 0.21 does not load them to be trained
    model = PeftModel.from_pretrained(base, adapter(cell, work), is_trainable=not prompts).double().train()
    if prompts:
        model.active_peft_config.inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):  # AdaMSS casts its input to what the base was before
            vars(module)["dtype"] = torch.float64
    float64.mean_loss(model, rows).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    torch.nn.utils.clip_grad_norm_(trained.values(), matrix.MAX_NORM)
    save_file(
        {f"gradient {name}": np.array(p.grad) for name, p in trained.items()}
        | {f"start {name}": np.array(p.detach()) for name, p in trained.items()}
        | {f"buffer {name}": np.zeros(1) for name, _ in model.named_buffers()},
        file,
    )


def verdict(cell: Cell, result: dict[str, Any]) -> str:
    """Return `same`, `refused`, `different` or `failed`."""
    if word := next((word for word in ("refused", "failed") if word in result), None):
        return word
    limits = {"loss": LOSS[cell.base], "norm": NORM[cell.base], "gradient": matrix.GRADIENT_TOLERANCE}
    limits |= {"weights": WEIGHTS[cell.base]} if cell.base in WEIGHTS else {}
    return "same" if all(result.get(name, 0.0) <= limit for name, limit in limits.items()) else "different"


def run_cells(cells: list[Cell], file: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Do the cells that have no result yet, each after its reference; add each result to `file` at once."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    left = [cell for cell in cells if cell.name not in results]
    references = [
        cell
        for cell in dict.fromkeys(cell.reference for cell in left)
        if cell.name not in results or (not build_run(cell, work).output.exists() and not results[cell.name])
    ]

    def do(lot: list[Cell]) -> None:
        by_name = {cell.name: cell for cell in lot}
        for end in execute([build_run(cell, work) for cell in lot], work):
            cell, result = by_name[end.run.name], judge(by_name[end.run.name], end, work)
            results[cell.name] = result
            print(cell.name, verdict(cell, result), json.dumps(result), f"{end.seconds:.1f} s", flush=True)
            file.write_text(json.dumps(results), encoding="utf-8")
            if cell.strategy != "cpu":
                shutil.rmtree(end.run.output, ignore_errors=True)

    do(references)
    for cell in left:
        if reference := results[cell.reference.name]:  # what one process cannot do, two need not try
            results[cell.name] = reference
    do([cell for cell in left if not results[cell.reference.name]])
    return results


def run_controls(work: Path) -> list[str]:
    """Do the controls; return those that went unnoticed."""
    chosen = controls()
    run_cells(list(dict.fromkeys(cell.reference for cell, _ in chosen)), work / "results.json", work)
    unnoticed = []
    for cell, sabotage in chosen:
        run = build_run(cell, work)._replace(sabotage=sabotage)
        result = judge(cell, next(iter(execute([run], work))), work)
        print(f"control {sabotage.__name__} {cell.name}: {verdict(cell, result)} {json.dumps(result)}", flush=True)
        unnoticed += [f"control {cell.name}: {result}"] if verdict(cell, result) in ("same", "refused") else []
    return unnoticed


def run_resumes(chosen: list[str], work: Path) -> list[str]:
    """Stop and continue a run of each method, by two processes; return those that differ from one never stopped."""
    if not (work / "dropout").exists():
        resumes.prepare(work)
    different = []
    for method in chosen:
        result = resumes.judge(resumes.Cell("ddp", method, 2, 1, 0), work, stops=(3,))
        print(f"resumed {method}: {json.dumps(result)}", flush=True)
        different += [f"resumed {method}: {result}"] if result["status"] != "bit-equal" else []
    return different


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return methods by columns: the largest difference of gradients, weights or (bf16) losses, or what became of it."""
    heads = [strategy if base == "fp32" else f"{base} {strategy}" for strategy, base in COLUMNS]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in methods():
        row = []
        for cell in (Cell(method, *column) for column in COLUMNS):
            result = results.get(cell.name)
            word = "" if result is None else verdict(cell, result)
            number = next((result[what] for what in ("gradient", "weights", "loss") if what in (result or {})), 0.0)
            row.append(f"{number:.0e}" if word == "same" else word)
        lines.append(f"| {method} | {' | '.join(row)} |")
    reasons = sorted({result["refused"] for result in results.values() if "refused" in result})
    return "\n".join([*lines, "", *(f"- {reason}" for reason in reasons)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERNS", default="*", help="cells whose name fits, such as ia3-zero3-fp32")
    parser.add_argument("--write", action="store_true", help="write the table and tests/proofs/golden/backends.json")
    parser.add_argument("--resumes", action="store_true", help="stop and continue a run of each method instead")
    parser.add_argument("--controls", action="store_true", help="do what must not go unnoticed instead")
    parser.add_argument("--work", type=Path, help="folder to work in, with the results so far")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="backends-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    if not (work / "biased").exists():
        compute(partial(prepare, work), work / "prepare.log")
    patterns = args.only.split(",")
    if args.controls or args.resumes:
        chosen = [name for name in methods() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if problems := run_controls(work) if args.controls else run_resumes(chosen, work):
            raise SystemExit("\n".join(problems))
        return
    cells = [cell for cell in all_cells() if any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)]
    results = run_cells(cells, work / "results.json", work)
    if args.write:
        every = matrix.keep("backends", {cell.name: results[cell.name] for cell in all_cells() if cell.name in results})
        matrix.show("backends", table(every))
    wrong = [cell.name for cell in cells if verdict(cell, results[cell.name]) not in ("same", "refused")]
    print(table({cell.name: results[cell.name] for cell in cells}))
    if wrong:
        raise SystemExit("\n".join(f"{name}: {results[name]}" for name in wrong))


if __name__ == "__main__":
    main()
