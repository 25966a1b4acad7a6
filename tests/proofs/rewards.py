"""Reward models under every launch YAML: the losses, gradients and weights of a run in one process.

    python tests/proofs/rewards.py --work W
    python tests/proofs/rewards.py --work W --only zero3-lora

Two processes train for 4 steps of plain gradient descent on pairs of uneven length, some with a margin, with prompts that
are shared, packed twice or padded; some slots of the last step are empty. The change of the weights, head included, the
losses and the metrics of an evaluation must be those of one process.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import numpy as np
from forks import Ended, Run, compute, execute, metric, warm
from safetensors.numpy import load_file

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
METHODS = {
    "full": "--method full --packing true",
    "lora": "--method lora --lora_r 4 --packing true --gradient_checkpointing true",
    "padded": "--method lora --lora_r 4 --packing false --per_device_train_batch_size 2",
    "qlora": "--method qlora --lora_r 4 --packing true",
}
TRAINING = "--max_length 160 --num_train_epochs 1 --total_batch_size 6 --lr_scheduler_type constant --optim sgd "
TRAINING += "--learning_rate 0.05 --logging_steps 1 --eval_on_start true --center_rewards_coefficient 0.1 --seed 3"
METRICS = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "eval/loss", "eval/rewards/accuracies")


def write_inputs(work: Path) -> None:
    """Write a tiny model, and pairs of answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from accel_llm.demo.tokenizer import build_demo_tokenizer

    torch.manual_seed(0)
    tokenizer = build_demo_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    draw = random.Random(0)
    for name, count in (("train", 22), ("eval", 5)):
        rows = []
        for k in range(count):
            prompt, chosen, rejected = (
                " ".join(draw.choice(("one", "two", "three")) for _ in range(draw.randint(1, n))) for n in (9, 6, 6)
            )
            rows.append({"prompt": prompt, "chosen": f"{chosen}.", "rejected": f"{rejected}!"} | {"margin": k % 3 / 2})
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plan(work: Path, strategy: str, method: str) -> Run:
    words = f"--model_name_or_path {work}/model --train_files {work}/train.jsonl --eval_files {work}/eval.jsonl "
    words += f"--cache_dir {work}/cache --output_dir {work}/runs/{strategy}-{method} {METHODS[method]} {TRAINING}"
    processes = 1 if strategy == "cpu" else 2
    return Run(
        f"{strategy}-{method}", "reward", strategy, processes, words.split(), work / "runs" / f"{strategy}-{method}"
    )


def trained(output: Path) -> dict[str, np.ndarray]:
    (file,) = [*output.glob("adapter/adapter_model.safetensors"), *output.glob("model/model.safetensors")]
    return load_file(file)


def differences(output: Path, alone: Path) -> dict[str, float]:
    """The largest differences of metrics and weights, and how far the head moved."""
    result = {name: float(np.abs(metric(output, name) - metric(alone, name)).max()) for name in METRICS}
    ours, theirs = trained(output), trained(alone)
    assert ours.keys() == theirs.keys()
    result["weights"] = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
    return result


def check(ended: Ended, work: Path, method: str) -> dict[str, float]:
    if ended.code:
        raise SystemExit(f"{ended.run.name}: {ended.cause}\n{ended.log[-3000:]}")
    found = differences(ended.run.output, work / "runs" / f"cpu-{method}")
    wrong = {name: value for name, value in found.items() if not value <= (1e-4 if name == "grad_norm" else 1e-5)}
    print(f"{ended.run.name}: {'different ' + json.dumps(wrong) if wrong else 'same'}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    warm()
    compute(partial(write_inputs, work), work / "inputs.log")
    methods = [m for m in METHODS if not options.only or options.only.endswith(f"-{m}")]
    for ended in execute([plan(work, "cpu", method) for method in methods], work):
        check(ended, work, ended.run.name.split("-")[1])
    runs = [plan(work, strategy, method) for method in methods for strategy in STRATEGIES]
    runs = [run for run in runs if options.only in run.name]
    wrong = [ended.run.name for ended in execute(runs, work) if check(ended, work, ended.run.name.split("-")[1])]
    raise SystemExit(f"different: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
