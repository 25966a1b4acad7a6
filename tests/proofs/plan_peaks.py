"""Peaks of memory that real steps have on CPUs, beside the estimate of launch/plan.py and of every start.

    python tests/proofs/plan_peaks.py                  # all configurations; exit code 1 if one is off by more than 10%
    python tests/proofs/plan_peaks.py --only zero      # those whose names match
    python tests/proofs/plan_peaks.py --write          # also the table, into launch/README.md

Each configuration is a launch of launch/pretrain.py with full rows; two processes where the strategy needs them. What
torch's allocator gives to each process is summed up from the beginning of the process, and the largest sum within the
second and third step counts. The first step builds the optimizer's state. The profiler does not see what a thread of
gloo frees, so of two processes, which do the same, the smaller sum counts. The estimate is compared without its term
`context`, which is no tensor.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "launch" / "README.md"
MIB = 2**20
LIMIT = 0.10
STEPS = 3
SIZES_SHOWN = 14
LENGTH = 512
FULL, LORA = "--method full", "--method lora --lora_r 16"


class Case(NamedTuple):
    """A launch YAML, its processes, and the words of the command line."""

    yaml: str
    processes: int
    words: str


CASES = {
    "lora in bf16, one process": Case("cpu", 1, f"{LORA} --precision bf16 --gradient_checkpointing"),
    "full in bf16, fsdp2": Case("fsdp2", 2, f"{FULL} --precision bf16 --gradient_checkpointing"),
    "full in bf16, zero2": Case("zero2", 2, f"{FULL} --precision bf16 --gradient_checkpointing"),
    "full in bf16, zero3": Case("zero3", 2, f"{FULL} --precision bf16 --gradient_checkpointing"),
    "full, ddp": Case("ddp", 2, FULL),
    "full in bf16, zero1": Case("zero1", 2, f"{FULL} --precision bf16 --gradient_checkpointing"),
    "full in bf16, zero3_offload": Case("zero3_offload", 2, f"{FULL} --precision bf16 --gradient_checkpointing"),
    "lora, fsdp2": Case("fsdp2", 2, LORA),
    "lora, zero3": Case("zero3", 2, LORA),
    "full, zero2": Case("zero2", 2, FULL),
    "full, fsdp2": Case("fsdp2", 2, FULL),
    "qlora, one process": Case("cpu", 1, "--method qlora --lora_r 16"),
}


class Measured(Exception):
    """All that is measured is known; the rest of the run is not needed."""


def rank_main() -> None:
    """Run launch/pretrain.py in this process, and print what its steps allocate beside what is estimated."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from accel_llm.system.launcher import process_rank, world_size
    from accel_llm.training import loop, setup
    from accel_llm.training.memory_estimate import estimate_memory

    terms: dict[str, int] = {}
    count_targets = loop.total_targets
    steps = iter(range(1, STEPS + 2))

    def marked(*arguments: Any) -> float:
        step = next(steps)
        with record_function(f"measured step {step}"):
            pass
        if step > STEPS:
            raise Measured
        return count_targets(*arguments)

    def estimated(accelerator: Any, options: Any, config: Any, *_: Any) -> Any:
        if process_rank() == 0:
            terms.update(estimate_memory(options, config, world_size(), "cpu").terms)
        return {}

    loop.total_targets, setup.show_plan_and_memory = marked, estimated
    spec = importlib.util.spec_from_file_location("launch_pretrain", ROOT / "launch" / "pretrain.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, contextlib.suppress(Measured):
        module.main()
    facts = largest_sum(profiler.profiler.kineto_results.events())  # type: ignore
    print("MEASURED " + json.dumps(facts | {"terms": terms, "rank": process_rank()}), flush=True)
    os._exit(0)


def largest_sum(events: Any) -> dict[str, Any]:
    """Return the bytes that are allocated when the second step begins, and the most from then on.

    `largest` are the tensors that are there then, those of one size together: their bytes and their number.
    """
    events = sorted(events, key=lambda event: event.start_ns())
    live, held, most, begun = 0, 0, 0, False
    sizes: Counter[int] = Counter()
    largest: list[tuple[int, int]] = []
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            sizes[abs(event.nbytes())] += 1 if event.nbytes() > 0 else -1
        elif event.name() == "measured step 2":
            held, begun = live, True
        if begun and live > most:
            most, largest = live, sorted(sizes.items(), key=lambda item: -item[0] * item[1])[:SIZES_SHOWN]
    return {"held": held, "peak": most, "largest": largest}


def write_inputs(folder: Path) -> None:
    """Write a Llama of 11 million parameters in bf16, and text for full rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from accel_llm.demo.tokenizer import build_demo_tokenizer

    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder / "model")
    build_demo_tokenizer().save_pretrained(folder / "model")
    line = json.dumps({"text": "one two three four five six seven eight nine ten " * 2000})
    (folder / "text.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")


def measure(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return what each process has measured.

    Raises:
        RuntimeError: the launch failed.
    """
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{case.yaml}.yaml"]
    command += ["--num_processes", str(case.processes), "--main_process_port", "0"]
    command += ["tests/proofs/plan_peaks.py", "--model_name_or_path", str(folder / "model"), *case.words.split()]
    command += ["--train_files", str(folder / "text.jsonl"), "--max_length", str(LENGTH), "--max_steps", str(STEPS + 1)]
    command += ["--output_dir", str(folder / "run"), "--overwrite_output_dir", "--cache_dir", str(folder / "cache")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCEL_LLM_RANK": "1",
    }
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=600
    )
    found = re.findall(r"MEASURED (\{.*\})", ended.stdout)
    if len(found) != case.processes:
        raise RuntimeError(ended.stdout[-2000:] + ended.stderr[-4000:])
    return [json.loads(line) for line in found]


def table_row(name: str, case: Case, ranks: list[dict[str, Any]]) -> tuple[str, float]:
    """Return a line of the table, and by how much the estimate is larger than the peak, as a share of the peak."""
    (terms,) = (rank["terms"] for rank in ranks if rank["rank"] == 0)
    terms = {term: size / MIB for term, size in terms.items() if term != "context"}
    peak, estimated = min(rank["peak"] for rank in ranks) / MIB, sum(terms.values())
    difference = estimated / peak - 1
    parts = " + ".join(f"{size:.0f} {term}" for term, size in terms.items())
    return f"| {name} | {case.processes} | {peak:.0f} | {estimated:.0f} = {parts} | {difference:+.1%} |", difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines, worst = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for title, case in CASES.items():
            if re.search(arguments.only, title):
                ranks = measure(case, folder)
                line, difference = table_row(title, case, ranks)
                print(json.dumps(ranks), file=sys.stderr)
                lines.append(line)
                worst = max(worst, abs(difference))
                print(line, flush=True)
    if arguments.write:
        head = "| configuration | processes | measured | estimated | difference |\n|---|---|---|---|---|\n"
        text = PAGE.read_text(encoding="utf-8")
        table = re.compile(r"\| configuration \| processes .*?\n\n", re.S)
        PAGE.write_text(table.sub(lambda _: head + "\n".join(lines) + "\n\n", text, count=1), encoding="utf-8")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    rank_main() if os.environ.get("ACCEL_LLM_RANK") else main()
