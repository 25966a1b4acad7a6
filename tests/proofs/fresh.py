"""The first weights of a fresh model are the same on every strategy and number of processes, to the last bit.

    python tests/proofs/fresh.py [--family qwen3] [--work FOLDER]

Each run builds a tiny model of the family from its name, takes one step whose learning rate is too small to move a
weight, and exports it. The digests of the exported files must be equal; with another seed they must not. ZeRO-3 shards
even the small tensors. The embedding is tied, so it shares its weight with the output projection.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from forks import Run, compute, execute, warm

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": "true", "max_position_embeddings": 64}
EXTRA = {"qwen3": {"head_dim": 8}, "mixtral": {"num_local_experts": 4}}
CELLS = [("cpu", 1), ("ddp", 2), ("ddp", 3), ("zero1", 2), ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2)]
CELLS += [("zero3", 3), ("zero3_offload", 2), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3)]
IDLE = "1e-60"  # a learning rate, which float32 rounds to nothing


def write_data(work: Path) -> None:
    from accel_llm.demo.skills import demo_documents
    from accel_llm.demo.tokenizer import build_demo_tokenizer

    build_demo_tokenizer().save_pretrained(work / "tokenizer")
    texts = [json.dumps({"text": text[:80]}) for text in demo_documents(0, 24)]
    (work / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")


def build_run(strategy: str, processes: int, seed: int, family: str, work: Path) -> Run:
    name = f"{strategy}-{processes}p-seed{seed}"
    sizes = [f"{field}={value}" for field, value in (SIZES | EXTRA.get(family, {})).items()]
    words = ["--config_name", family, "--tokenizer_name", work / "tokenizer", "--config_overrides", *sizes]
    words += ["--train_files", work / "texts.jsonl", "--cache_dir", work / "cache", "--max_length", 64, "--seed", seed]
    words += ["--total_batch_size", 6, "--max_steps", 1, "--learning_rate", IDLE, "--preflight", "false"]
    words += ["--precision", "fp32", "--output_dir", work / name]
    return Run(name, "pretrain", strategy, processes, [str(word) for word in words], work / name)


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]


def prove(family: str, work: Path) -> bool:
    compute(lambda: write_data(work), work / "data.log")
    runs = [build_run(*cell, 1, family, work) for cell in CELLS] + [build_run("cpu", 1, 2, family, work)]
    digests: dict[str, str] = {}
    for end in execute(runs, work):
        if end.code:
            print(f"{end.run.name}: failed: {end.cause}", flush=True)
            digests[end.run.name] = "failed"
            continue
        digests[end.run.name] = digest(end.run.output)
        print(f"{end.run.name:24}{digests[end.run.name]}  {end.seconds:.1f} s", flush=True)
    other = digests.pop("cpu-1p-seed2")
    same = len(set(digests.values())) == 1 and other not in digests.values() and "failed" not in digests.values()
    print(f"{family}: {len(digests)} runs, {'bit-equal' if same else 'DIFFERENT'}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="qwen3")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    warm()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        sys.exit(not prove(args.family, args.work.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not prove(args.family, Path(folder)))


if __name__ == "__main__":
    main()
