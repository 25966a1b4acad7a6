"""What preferences do to the demo: the share of generated answers that are preferred, and what fine-tuning has taught.

    python tests/proofs/win_rates.py --work W --write        # all runs; writes the table of accel_llm/preference/README.md
    python tests/proofs/win_rates.py --work W --only dpo-*   # what is in W already is not trained again

launch/sft.py trains the demo, then dpo.py and kto.py go on with its adapter, each as a person starts it without options
(but for the method, the launch YAML and the folders); reward.py trains a reward model. Then plain transformers and PEFT
load each export and answer held-out questions greedily: of 120 with two right answers the share that got the preferred
one (win rate), and of fine-tuning's 240 the share that got the right one. What was trained on 4-bit weights answers on them.
"""

import argparse
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forks
from forks import ROOT, Run, compute, execute, metric, warm

forks.TIMEOUT = 3600  # seconds
PAGE = ROOT / "accel_llm" / "preference" / "README.md"
SCRIPTS = ("dpo", "kto", "reward")


class Place(NamedTuple):
    """Where a script runs. All processes together train with the method and seed of sft.py."""

    method: str
    seed: int = 0
    strategy: str = "cpu"
    processes: int = 1

    @property
    def tuned(self) -> str:
        """The name of the run of sft.py whose adapter dpo.py and kto.py go on with."""
        return f"sft-{self.method}{self.seed or ''}"


PLACES = {f"{method}{seed or ''}": Place(method, seed) for method in ("lora", "qlora") for seed in (0, 1, 2)}
PLACES |= {strategy: Place("lora", 0, strategy, 2) for strategy in ("zero2", "fsdp2")}


def place_of(run: Run) -> Place:
    return PLACES[run.name.split("-")[1]]


def plan(work: Path, script: str, place: str) -> Run:
    """Return the run of a script; dpo and kto go on with the adapter that sft.py has trained by the same method."""
    method, seed, strategy, processes = PLACES[place]
    output = work / f"{script}-{place}"
    words = ["--output_dir", str(output), "--cache_dir", str(work / "cache" / output.name), "--method", method]
    words += ["--seed", str(seed)]
    if script in ("dpo", "kto"):
        words += ["--adapter_name_or_path", str(work / PLACES[place].tuned)]
    return Run(output.name, script, strategy, processes, words, output)


def round_to_4_bits(model: Any) -> None:
    """Give the layers of a base the values of 4-bit weights, all but the last one.

    Each matrix is one row for bitsandbytes, because 0.50.2 unpacks rows that end inside a block wrongly on a CPU.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(module.weight.data.view(1, -1), quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(packed, state).view_as(module.weight)


def answer(folder: Path, prompts: list[list[dict[str, str]]], in_4_bits: bool) -> Iterator[str]:
    """Yield the greedy answers of an exported adapter, by plain transformers and PEFT."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter", padding_side="left")
    base = PeftConfig.from_pretrained(folder / "adapter").base_model_name_or_path
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if in_4_bits:
        round_to_4_bits(model)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    for first in range(0, len(prompts), 60):
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts[first : first + 60]
        ]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(folder: Path, in_4_bits: bool) -> None:
    """Write the win rate of an export and its exact match on the questions of fine-tuning beside it."""
    from accel_llm.demo.preferences import demo_pairs
    from accel_llm.demo.skills import demo_conversations

    pairs, chats = demo_pairs("eval"), [row["messages"] for row in demo_conversations("eval")]
    wanted = [row["chosen"][0]["content"] for row in pairs] + [chat[-1]["content"] for chat in chats]
    given = answer(folder, [row["prompt"] for row in pairs] + [chat[:-1] for chat in chats], in_4_bits)
    right = [given == wanted for given, wanted in zip(given, wanted, strict=True)]
    win_rate, exact_match = sum(right[: len(pairs)]) / len(pairs), sum(right[len(pairs) :]) / len(chats)
    folder.with_suffix(".measured").write_text(f"{win_rate} {exact_match}", encoding="utf-8")


def do(runs: list[Run], work: Path) -> bool:
    """Do the runs that are not done, and measure what they export; return whether all went well."""
    todo = [run for run in runs if not (run.output / "report.html").exists()]
    well = True
    for ended in execute(todo, work):
        print(f"{ended.run.name}: {ended.seconds:.0f} s" if not ended.code else f"{ended.run.name}: {ended.cause}")
        well = well and not ended.code
    for run in runs:
        done = (run.output / "adapter").exists() and not run.output.with_suffix(".measured").exists()
        if done and run.script != "reward":
            compute(partial(measure, run.output, place_of(run).method == "qlora"), run.output.with_suffix(".log"))
    return well


def measured(folder: Path) -> tuple[float, float]:
    win_rate, exact_match = folder.with_suffix(".measured").read_text(encoding="utf-8").split()
    return float(win_rate), float(exact_match)


def table(runs: list[Run], work: Path) -> list[str]:
    lines = ["| run | win rate before | after | exact match of fine-tuning before | after |", "|---|---|---|---|---|"]
    for run in runs:
        place = place_of(run)
        name = f"| `{run.script}.py`, {place.method}, {place.strategy} x {place.processes}, seed {place.seed} "
        if run.script == "reward":
            ranked = metric(run.output, "eval/rewards/accuracies")
            lines.append(f"{name}| ranks {ranked[0]:.1%} of held-out pairs rightly | {ranked[-1]:.1%} | | |")
        elif run.output.with_suffix(".measured").exists():
            before, after = measured(work / place.tuned), measured(run.output)
            lines.append(f"{name}| {before[0]:.1%} | {after[0]:.1%} | {before[1]:.1%} | {after[1]:.1%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="*", help="names of runs, for example dpo-* or *-fsdp2")
    parser.add_argument("--write", action="store_true", help="write the table of the page")
    args = parser.parse_args()
    args.work = args.work.resolve()
    warm()
    runs = [plan(args.work, script, place) for script in SCRIPTS for place in PLACES]
    runs = [run for run in runs if fnmatch(run.name, args.only)]
    tuned = dict.fromkeys(place_of(run).tuned.split("-")[1] for run in runs if run.script != "reward")
    well = do([plan(args.work, "sft", place) for place in tuned], args.work) and do(runs, args.work)
    lines = table(runs, args.work)
    print("\n".join(lines))
    if args.write:
        text, block = PAGE.read_text(encoding="utf-8"), "\n".join(["<!-- win rates -->", *lines, "<!-- /win rates -->"])
        text = re.sub(r"<!-- win rates -->.*<!-- /win rates -->", lambda _: block, text, flags=re.DOTALL)
        PAGE.write_text(text, encoding="utf-8")
    raise SystemExit(not well)


if __name__ == "__main__":
    main()
