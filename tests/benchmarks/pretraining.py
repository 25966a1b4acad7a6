"""Pretrain a small model from scratch beside transformers.Trainer: bits per byte and tokens a second, on two CPU cores.

python tests/benchmarks/pretraining.py
python tests/benchmarks/pretraining.py --quick

The texts are those of ../shared/data/pretrain: tinystories.txt and tinyshakespeare_input.txt, paragraphs and speeches
joined to documents of at least 700 letters, as a story has; every twentieth document is held out. Both programs begin with
the same random weights of a Llama and take the same number of steps of the same number of tokens (4 micro-batches of a row
of 2,048 tokens, the length of the course), with the same learning rates, AdamW and float32. The Trainer gets blocks as the
course's `group_texts` cuts them, with an end token behind each text, which that leaves out. Ours is started as a user does,
with one process for each core (ddp.yaml); the Trainer is one process with both cores, and with --processes 2 it is started
by accelerate in the same way. Where others use the machine too, threads of one process wait for one another, and only
--together compares: both at once, with one core each.

Both models are measured by plain transformers in float64 on the held-out documents, each alone: the bits of all predicted
tokens over the bytes of the text that they stand for. Tokens a second are those of the training alone: of the Trainer
from its first step to its last, of ours by the clock of metrics.jsonl, which stops for evaluations.
"""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import argparse
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

CORES = os.cpu_count() or 1
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "pretrain"
BLOCK, ROWS, ACCUMULATION = 2_048, 1, 4  # tokens of a row as in the course, rows of a micro-batch, micro-batches
LETTERS = 700  # of a document, at least: about a story
RATE, WARMUP_STEPS, EPOCHS = 3e-3, 20, 3
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 4, "max_position_embeddings": BLOCK, "tie_word_embeddings": True}
VOCABULARY = 2_048


def read_documents() -> list[str]:
    """Return the paragraphs of the two files, joined to documents of at least LETTERS letters."""
    documents: list[str] = []
    for name in ("tinystories.txt", "tinyshakespeare_input.txt"):
        text = ""
        for part in (DATA / name).read_text(encoding="utf-8").split("\n\n"):
            text += part + "\n\n"
            if len(text) >= LETTERS:
                documents.append(text.strip())
                text = ""
    return documents


def write_inputs(folder: Path, quick: bool) -> None:
    """Write the documents of both parts, a byte-level BPE tokenizer that has seen the first, and a random model."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    documents = read_documents()[:: 8 if quick else 1]
    parts = {"eval": documents[::20], "train": [text for k, text in enumerate(documents) if k % 20]}
    for part, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(parts["train"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None, pad_token_id=0, **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def texts_of(folder: Path, part: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def grouped(folder: Path) -> list[list[int]]:
    """Return the blocks of the course's `group_texts`: all texts one after the other, cut; the rest is dropped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts_of(folder, "train"))["input_ids"]]
    joined = list(chain.from_iterable(ids))
    return [joined[start : start + BLOCK] for start in range(0, len(joined) // BLOCK * BLOCK, BLOCK)]


def train_ours(folder: Path, steps: int, launch_yaml: str, threads: int) -> dict[str, float]:
    """Train by launch/pretrain.py with the packing of its defaults; return tokens a second, steps and its own metrics."""
    options: dict[str, Any] = {"model_name_or_path": folder / "model", "train_files": folder / "train.jsonl"}
    options |= {"eval_files": folder / "eval.jsonl", "output_dir": folder / "ours", "cache_dir": folder / "cache"}
    options |= {"max_length": BLOCK, "max_lost": 1, "per_device_train_batch_size": ROWS, "max_steps": steps}
    options |= {"total_batch_size": ROWS * ACCUMULATION, "learning_rate": RATE, "warmup_steps": WARMUP_STEPS}
    options |= {"lr_scheduler_type": "cosine", "logging_steps": 10, "save_steps": 0, "eval_steps": 0}
    options |= {"per_device_eval_batch_size": 2, "sample_text": "Once upon a time"}
    words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
    yaml = str(ROOT / "accelerate_configs" / f"{launch_yaml}.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", yaml]
    run([*launcher, str(ROOT / "launch" / "pretrain.py"), *words], threads)
    lines = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [line for line in lines if "tokens_per_second" in line]
    # Between two lines, so many tokens in so many seconds.
    totals = [0, *(line["supervised_tokens"] for line in training)]
    counts = [after - before for before, after in pairwise(totals)]
    seconds = sum(count / line["tokens_per_second"] for count, line in zip(counts, training, strict=True))
    return {"rate": sum(counts) / seconds, "steps": training[-1]["step"], "own": lines[-1]["eval/bits_per_byte"]}


def train_theirs(folder: Path, steps: int, processes: int, threads: int) -> dict[str, float]:
    """Train by the Trainer, in a process of its own, or in several."""
    launcher = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--config_file"]
    launcher += [] if processes == 1 else [str(ROOT / "accelerate_configs" / "ddp.yaml")]
    run([*launcher, __file__, "--trainer", str(folder), str(steps), str(processes)], threads)
    return json.loads((folder / "theirs.json").read_text(encoding="utf-8"))


def run_trainer(folder: Path, steps: int, processes: int) -> None:
    """Train by transformers.Trainer, with its defaults but for what launch/pretrain.py has too."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    blocks = grouped(folder)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(
            output_dir=str(folder / "theirs"),
            use_cpu=True,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=ACCUMULATION // processes,
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP_STEPS,
            optim="adamw_torch_fused",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
        data_collator=default_data_collator,
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(folder / "theirs" / "model"))
    rate = steps * ROWS * ACCUMULATION * BLOCK / seconds
    if trainer.is_world_process_zero():
        (folder / "theirs.json").write_text(json.dumps({"rate": rate, "steps": steps}), encoding="utf-8")


def bits_per_byte_of(folder: Path, model_folder: Path) -> float:
    """Return the bits per byte of a model on the held-out documents, each alone, by plain transformers in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # where others use the machine, threads wait for one another
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    nats, size = 0.0, 0
    for text in texts_of(folder, "eval"):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        size += len(text.encode())
        for start in range(0, len(ids), BLOCK):
            piece = torch.tensor([ids[start : start + BLOCK]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
            # No token predicts the first one. The tokenizer is byte-level: one letter of its names for each byte.
            first = int(piece[0, 0])
            size -= 0 if first == tokenizer.eos_token_id else len(tokenizer.convert_ids_to_tokens(first))
    return nats / math.log(2) / size


def run(words: list[str], threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the texts: whether it works")
    parser.add_argument("--processes", type=int, default=1, help="of the Trainer")
    parser.add_argument("--launch_yaml", default="ddp", help="of ours: ddp, or cpu for one process")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--together", action="store_true", help="both at once, with one core each: where others use the machine too"
    )
    parser.add_argument("--trainer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer:
        folder, steps, processes = arguments.trainer
        return run_trainer(Path(folder), int(steps), int(processes))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.quick)
        blocks = len(grouped(folder))
        steps = arguments.epochs * blocks // (ROWS * ACCUMULATION)
        tokens = steps * ROWS * ACCUMULATION * BLOCK
        print(f"{blocks} blocks of {BLOCK} tokens, {steps} steps, {tokens:,} tokens", flush=True)
        if arguments.together:
            with ThreadPoolExecutor(2) as pool:
                waiting = pool.submit(train_theirs, folder, steps, 1, 1)
                ours, theirs = train_ours(folder, steps, "cpu", 1), waiting.result()
        else:
            theirs = train_theirs(folder, steps, arguments.processes, CORES // arguments.processes)
            alone = arguments.launch_yaml == "cpu"
            ours = train_ours(folder, steps, arguments.launch_yaml, CORES if alone else 1)
        theirs["bits"] = bits_per_byte_of(folder, folder / "theirs" / "model")
        ours["bits"] = bits_per_byte_of(folder, folder / "ours" / "model")
        print(f"{'':10} bits per byte  tokens a second")
        for who, figures in (("Trainer", theirs), ("accel-llm", ours)):
            print(f"{who:10} {figures['bits']:13.4f}  {figures['rate']:15,.0f}")
        print(f"{ours['rate'] / theirs['rate']:.2f} x the tokens a second; its own evaluation says {ours['own']:.4f}")


if __name__ == "__main__":
    main()
