"""Classifiers under every launch YAML: losses, metrics and weights of a run in one process; resumes after SIGKILL.

    python tests/proofs/classification.py --work W
    python tests/proofs/classification.py --work W --only zero3-lora

Two processes train for 4 steps of plain gradient descent on texts of uneven length, packed or padded; some slots of the
last step are empty. The weights, head included, the losses and the metrics of an evaluation must be those of one
process. Then the runs are killed (SIGKILL) in the middle and continued: every bit must be that of a run without a stop.
"""

import argparse
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from forks import Ended, Run, compute, execute, metric, warm
from resumes import differences as differences_of_files
from resumes import stop_after
from rewards import trained

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
METHODS = {
    "full": "--method full --packing true --class_weights balanced",
    "lora": "--method lora --lora_r 4 --lora_target_modules query value --packing true",
    "padded": "--method lora --lora_r 4 --packing false --per_device_train_batch_size 3 --gradient_checkpointing true",
    "qlora": "--method qlora --lora_r 4 --packing true",
}
TRAINING = "--max_length 48 --num_train_epochs 1 --total_batch_size 6 --lr_scheduler_type constant --optim sgd "
TRAINING += "--learning_rate 0.05 --logging_steps 1 --eval_on_start true --seed 3"
METRICS = ("loss", "grad_norm", "accuracy", "eval/loss", "eval/accuracy")
RESUMED = ("ddp-full", "ddp-lora", "zero2-lora", "zero3-lora", "fsdp2-lora", "fsdp2-full", "ddp-qlora")
VOCABULARY = "the a film movie plot was is not good great bad poor but and so this that"
WORDS = VOCABULARY.split()


def write_inputs(work: Path) -> None:
    """Write a small BERT without dropout, and texts with one of three labels."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: k for k, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **shape, **rates))
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    shutil.copytree(work / "model", work / "dropout", dirs_exist_ok=True)
    config = work / "dropout" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict.fromkeys(rates, 0.1)))
    draw = random.Random(0)
    for name, count in (("train", 61), ("eval", 23)):
        lines = ["sentence1,sentence2,label"]
        for _ in range(count):
            first, second = (" ".join(draw.choices(WORDS, k=draw.randint(1, n))) for n in (12, 6))
            lines.append(f"{first},{second},{draw.choice(('no', 'no', 'yes', 'maybe'))}")
        (work / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def words_of(work: Path, method: str, output: Path) -> list[str]:
    words = f"--model_name_or_path {work}/model --train_files {work}/train.csv --eval_files {work}/eval.csv "
    return f"{words} --cache_dir {work}/cache --output_dir {output} {METHODS[method]} {TRAINING}".split()


def plan(work: Path, strategy: str, method: str) -> Run:
    output, processes = work / "runs" / f"{strategy}-{method}", 1 if strategy == "cpu" else 2
    return Run(f"{strategy}-{method}", "classify", strategy, processes, words_of(work, method, output), output)


def differences(output: Path, alone: Path) -> dict[str, float]:
    """Return the largest differences of metrics and weights."""
    result = {name: float(np.abs(metric(output, name) - metric(alone, name)).max()) for name in METRICS}
    ours, theirs = trained(output), trained(alone)
    assert ours.keys() == theirs.keys() and any("classifier" in name for name in ours)
    result["weights"] = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
    return result


def check(ended: Ended, work: Path, method: str) -> dict[str, float]:
    if ended.code:
        raise SystemExit(f"{ended.run.name}: {ended.cause}\n{ended.log[-3000:]}")
    found = differences(ended.run.output, work / "runs" / f"cpu-{method}")
    wrong = {name: value for name, value in found.items() if not value <= (1e-4 if name == "grad_norm" else 1e-5)}
    print(f"{ended.run.name}: {'different ' + json.dumps(wrong) if wrong else 'same'}", flush=True)
    return wrong


def is_resumed(name: str, work: Path) -> bool:
    """Kill a run with dropout after its second step, continue it, and tell whether every file equals that of a whole run."""
    strategy, method = name.split("-")
    place = work / "resumes" / name
    shutil.rmtree(place, ignore_errors=True)

    def run(folder: str, sabotage: Callable[[], None] | None, resumed: bool) -> Run:
        output = place / folder / "run"
        words = words_of(work, method, output)
        words[words.index("--model_name_or_path") + 1] = str(work / "dropout")
        words += ["--save_steps", "1", "--optim", "adamw", "--learning_rate", "0.01"]
        return Run(f"resumed-{name}-{folder}", "classify", strategy, 2, words, output, sabotage, resumed)

    for each in (run("whole", None, False), run("parts", partial(stop_after, 2), False), run("parts", None, True)):
        end = next(iter(execute([each], work)))
        if (end.code == 0) == (each.sabotage is not None):
            raise SystemExit(f"{each.name}: {end.cause}\n{end.log[-3000:]}")
    different = differences_of_files(place / "whole" / "run", place / "parts" / "run")
    print(f"resumed {name}: {'different ' + ', '.join(different) if different else 'same'}", flush=True)
    return not different


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    warm()
    compute(partial(write_inputs, work), work / "inputs.log")
    names = [(s, m) for m in METHODS for s in STRATEGIES if options.only in f"{s}-{m}"]
    for ended in execute([plan(work, "cpu", method) for method in dict(map(reversed, names))], work):
        check(ended, work, ended.run.name.split("-")[1])
    runs = [plan(work, *name) for name in names]
    wrong = [ended.run.name for ended in execute(runs, work) if check(ended, work, ended.run.name.split("-")[1])]
    wrong += [f"resumed {name}" for name in RESUMED if options.only in name and not is_resumed(name, work)]
    raise SystemExit(f"different: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
