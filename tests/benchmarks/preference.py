"""Train on preferences beside TRL's DPOTrainer and KTOTrainer: pairs a second, memory and losses, on two CPU cores.

python tests/benchmarks/preference.py
python tests/benchmarks/preference.py --only "dpo lora" --repeat 3 --gradient_checkpointing true

Needs `pip install -e ".[bench]"`. Both programs start from the same weights, take the same rows in the same steps, and use
float32 and AdamW. Ours is launch/dpo.py or launch/kto.py, packed. TRL pads: its `padding_free` is off. The rows are the
first ones of dpo_en_demo and kto_en_demo that are short enough, or made up where these files are absent; the tokenizer
is learnt from all of them. KTO's answers are mismatched here as TRL does it, so that both have the same z0.

TRL runs in three ways. "reference in steps" is its default; "before" is `precompute_ref_log_probs`. "labels only" is
"before" as on a GPU: there TRL projects labelled positions to the vocabulary, but on a CPU all of them.

Each way has forks of its own, and the ways take turns. "steps" counts the seconds of all steps but the first; "epoch" adds
to them what the reference took before. Memory is the peak of a process while it trains, without mapped files, above
that after the imports. Ratios are medians, with the lowest and the highest of the turns. Losses are those of all steps.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "launch"))

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import accel_llm.system.chatter

import dpo
import kto
import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from accel_llm.data.stream import Stream
from accel_llm.preference import reference
from accel_llm.preference.reference import Reference
from accel_llm.report.metrics import Meter
from accel_llm.system.exit import run_script

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "preference"
VOCABULARY = 32_000
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "head_dim": 64}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
UNITS, STEPS = {"dpo": 4, "kto": 8}, 3  # pairs or answers in a step
MAX_LENGTH, RATE = 384, 2e-5
WAYS = ("reference in steps", "before", "labels only")
CELLS = ("dpo lora", "dpo full", "kto lora", "kto full")
NOW = time.perf_counter
Row = dict[str, Any]


def read_rows(objective: str) -> list[Row]:
    """Return rows in TRL's format: prompts of one or more turns, and their answers. Labels take turns."""
    file = DATA / f"{objective}_en_demo.json"
    if not file.is_file():
        return [made_up_row(objective, np.random.default_rng(k), k % 2 == 0) for k in range(300)]
    rows = json.loads(file.read_text(encoding="utf-8"))
    if objective == "dpo":
        return [
            {
                "prompt": turns(row["conversations"]),
                "chosen": turns([row["chosen"]]),
                "rejected": turns([row["rejected"]]),
            }
            for row in rows
        ]
    rows = [
        {"prompt": turns(row["messages"][:-1]), "completion": turns(row["messages"][-1:]), "label": row["label"]}
        for row in rows
    ]
    desirable = [row for row in rows if row["label"]]
    undesirable = [row for row in rows if not row["label"]]
    return [row for pair in zip(desirable, undesirable, strict=False) for row in pair]


def turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return messages as role and content; white space at the ends would join with the tokens around it."""
    pairs = ((m.get("role") or ROLES[m["from"]], m.get("content") or m["value"]) for m in messages)
    return [{"role": role, "content": text.strip()} for role, text in pairs]


def made_up_row(objective: str, rng: np.random.Generator, label: bool) -> Row:
    """Return a prompt of about 60 words and answers of about 40, with lengths as unequal as in real rows."""

    def turn(role: str, middle: float) -> list[dict[str, str]]:
        count = int(np.clip(rng.lognormal(np.log(middle), 0.9), 2, 200))
        return [{"role": role, "content": " ".join(f"w{k}" for k in rng.integers(3000, size=count))}]

    prompt, answer = turn("user", 60), turn("assistant", 40)
    if objective == "kto":
        return {"prompt": prompt, "completion": answer, "label": label}
    return {"prompt": prompt, "chosen": answer, "rejected": turn("assistant", 40)}


def turns_of(row: Row) -> list[dict[str, str]]:
    return [turn for part in row.values() if isinstance(part, list) for turn in part]


def token_count(row: Row, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return at least as many tokens as the row has with the template around its turns."""
    return sum(len(ids) + 8 for ids in tokenizer([turn["content"] for turn in turns_of(row)])["input_ids"])


def write_inputs(folder: Path) -> None:
    """Write the tokenizer, the models' weights, and the rows of both objectives that fit."""
    rows = {objective: read_rows(objective) for objective in UNITS}
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [turn["content"] for part in rows.values() for row in part for turn in turns_of(row)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY - 8, initial_alphabet=alphabet))
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    backend.add_special_tokens([AddedToken(text, special=True) for text in ["<|im_start|>", *special.values()]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPE, **ids))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for objective, part in rows.items():
        fitting = [row for row in part if token_count(row, tokenizer) <= MAX_LENGTH]
        text = "".join(json.dumps(row) + "\n" for row in fitting[: UNITS[objective] * STEPS])
        (folder / f"{objective}.jsonl").write_text(text, encoding="utf-8")


def status() -> dict[str, float]:
    """Return the memory of this process from /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = (line.split() for line in lines if line.startswith(("VmHWM:", "RssAnon:", "RssFile:")))
    return {name[:-1]: int(value) / 1024 for name, value, _ in values}


class Clock(TrainerCallback):
    """When each step ended, what came before the steps, and the peak of the memory."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before, self.peak, self.floor = 0.0, 0.0, status()["RssAnon"]

    def tick(self) -> None:
        self.ends.append(NOW())
        now = status()
        self.peak = now["VmHWM"] - now["RssFile"] - self.floor

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tick()

    def timed(self, function: Callable) -> Callable:
        """Return a function that does the same, and adds its seconds to those before the first step."""

        def wrapper(*args: Any) -> Any:
            start = NOW()
            result = function(*args)
            self.before += NOW() - start
            return result

        return wrapper

    def result(self, losses: list[float], units: int) -> Row:
        """Return seconds of a unit in the steps, and with its reference, MiB, and the losses."""
        seconds = (self.ends[-1] - self.ends[0]) / units / (STEPS - 1)
        epoch = seconds + self.before / units / STEPS
        return {"steps": seconds, "epoch": epoch, "memory": self.peak, "losses": losses}


def train_ours(objective: str, method: str, folder: Path, words: list[str]) -> Row:
    """Train by launch/dpo.py or launch/kto.py, with the units of each step as TRL takes them."""
    clock, units = Clock(), UNITS[objective]

    def units_of_step(stream: Any, step: int, micro: int, rank: int) -> list[int]:
        return list(range(step * units, (step + 1) * units))

    def log(meter: Any, *args: Any) -> None:
        write(meter, *args)
        clock.tick()

    def mismatch_as_trl(*args: Any) -> Any:
        rows = mismatch(*args)
        rows.partners[:] = np.roll(np.arange(len(rows)).reshape(-1, units), 1, 1).reshape(-1)
        return rows

    write, mismatch = Meter.log, reference.mismatch
    Stream.row_indices, Meter.log = units_of_step, log  # type: ignore[method-assign]
    Reference.compute, reference.mismatch = clock.timed(Reference.compute), mismatch_as_trl  # type: ignore[method-assign]

    options: Row = {"model_name_or_path": folder / "model", "train_files": folder / f"{objective}.jsonl"}
    options |= {"method": method, "per_device_train_batch_size": 4, "warmup_steps": 0, "seed": 42}
    options |= {"output_dir": folder / "ours", "cache_dir": folder / "cache", "max_steps": STEPS, "logging_steps": 1}
    options |= {"learning_rate": RATE, "lr_scheduler_type": "constant", "order": "source", "max_length": MAX_LENGTH}
    words = [*words, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    sys.argv = [f"{objective}.py", *words]
    run_script({"dpo": dpo, "kto": kto}[objective].main)
    lines = (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return clock.result([line["loss"] for line in map(json.loads, lines) if "loss" in line], units)


def train_trl(objective: str, method: str, folder: Path, way: str, recompute: bool) -> Row:
    """Train by TRL's trainer, with its defaults but for what launch/dpo.py has too."""
    clock, units = Clock(), UNITS[objective]
    config, trainer_class = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[objective]
    if way == "labels only":
        trl.trainer.utils._use_triton = lambda device: True
    trainer_class._precompute_ref_logps = clock.timed(trainer_class._precompute_ref_logps)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    rows = (folder / f"{objective}.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = trainer_class(
        model=str(folder / "model"),
        args=config(
            output_dir=str(folder / "trl"),
            precompute_ref_log_probs=way != "reference in steps",
            gradient_checkpointing=recompute,
            bf16=False,
            use_cpu=True,
            per_device_train_batch_size=units,
            max_steps=STEPS,
            max_length=MAX_LENGTH,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([json.loads(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=adapter if method == "lora" else None,
        callbacks=[clock],
    )
    trainer.train()
    return clock.result([line["loss"] for line in trainer.state.log_history if "loss" in line], units)


def in_fork(task: Callable[[], Any], log: Path) -> Any:
    """Do `task` in a fork, whose output goes to `log`, and return its result."""
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sender.send(task())

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"it failed:\n{log.read_text(encoding='utf-8')[-3000:]}") from None
    finally:
        process.join()


def measure(cell: str, way: str, work: Path, recompute: bool) -> Row:
    """Train a cell in one way, in a fork and a folder of its own."""
    objective, method = cell.split()
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        for path in ("model", f"{objective}.jsonl"):
            (folder / path).symlink_to(work / path)
        if way == "ours":
            words = ["--gradient_checkpointing", str(recompute)]
            return in_fork(lambda: train_ours(objective, method, folder, words), work / "log")
        return in_fork(lambda: train_trl(objective, method, folder, way, recompute), work / "log")


def show(cell: str, way: str, theirs: list[Row], ours: list[Row]) -> bool:
    """Print a line of the table with rates and memory of this way; return whether ours is as required."""
    turns_of_both, middles, line = list(zip(theirs, ours, strict=True)), {}, f"{cell:10}{way:20}"
    for name in ("steps", "epoch", "memory"):
        # Of seconds theirs by ours, which is the ratio of the rates; of memory ours by theirs.
        ratios = [(b / a) if name == "memory" else (a / b) for a, b in ((a[name], b[name]) for a, b in turns_of_both)]
        middles[name], value = median(ratios), median(row[name] for row in theirs)
        line += f"{value:>8.0f}" if name == "memory" else f"{1 / value:>8.2f}"
        line += f"{middles[name]:>8.2f} x {f'({min(ratios):.2f} to {max(ratios):.2f})':16}"
    # [turns, steps]
    distances = np.array([np.abs(np.subtract(a["losses"], b["losses"])) for a, b in turns_of_both])
    print(f"{line}{distances[:, 0].max():>9.1e}{distances.max():>9.1e}", flush=True)
    return middles["steps"] >= 2 and middles["memory"] <= 0.6 and distances[:, 0].max() <= 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=CELLS)
    parser.add_argument("--ways", nargs="*", default=WAYS, help="ways of TRL")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--gradient_checkpointing", default="false", choices=["false", "true"], help="of both programs")
    args = parser.parse_args()
    gc.freeze()
    start, missed, recompute = NOW(), [], args.gradient_checkpointing == "true"
    titles = "".join(f"{title:>8}{'ours':>10}{'':17}" for title in ("steps", "epoch", "MiB"))
    print(
        f"TRL {trl.__version__}, torch {torch.__version__}; pairs (dpo) or answers (kto) a second, ours beside each way"
    )
    print(f"{'':30}{titles}{'loss 1':>9}{'losses':>9}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        in_fork(lambda: write_inputs(work), work / "log")
        for cell in args.only:
            runs: dict[str, list[Row]] = {way: [] for way in ("ours", *args.ways)}
            for turn in range(args.repeat):
                for way in list(runs)[:: 1 if turn % 2 == 0 else -1]:
                    runs[way].append(measure(cell, way, work, recompute))
            show(cell, "ours", runs["ours"], runs["ours"])
            missed += [f"{cell} {way}" for way in args.ways if not show(cell, way, runs[way], runs["ours"])]
    print(f"required: 2.0 x the steps, 0.6 x the memory, 1e-4 of loss 1; missed: {', '.join(missed) or 'none'}")
    print(f"{NOW() - start:.0f} s")


if __name__ == "__main__":
    main()
