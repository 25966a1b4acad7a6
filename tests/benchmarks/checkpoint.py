"""Measure a checkpoint: seconds, the share that training waits with save_async, size, and memory of a resume.

    python tests/benchmarks/checkpoint.py [--layers 6] [--width 512]

A Llama with random weights is trained in full (float32, AdamW) and saved at every step. Each figure comes from its own
process: one that waits for its saves, one that saves in the background, one that is resumed and one that is not. Peak
memory is VmHWM of the process. The last figure is the seconds to the first batch of a resume at step 1,000,000.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def build(folder: Path, layers: int, width: int) -> int:
    """Write a model; return its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from accel_llm.demo.skills import demo_conversations
    from accel_llm.demo.tokenizer import build_demo_tokenizer

    tokenizer = build_demo_tokenizer()
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=8, **shape, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"messages": row["messages"]} for row in demo_conversations("train")[:64]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return model.num_parameters()


def train(base: str, output: str, *words: str) -> None:
    """Train in this process and time the saves; print the figures as the last line."""
    sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]
    import sft

    from accel_llm.checkpoint.checkpoints import Checkpoints

    seconds: list[float] = []
    save = Checkpoints._save

    def timed(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self.writer is not None:  # wait for the save before, which is not measured
            self.writer.join()
        since = time.perf_counter()
        save(self, *arguments, **keywords)
        seconds.append(time.perf_counter() - since)

    Checkpoints._save = timed  # type: ignore[method-assign]
    sys.argv = ["sft.py", "--model_name_or_path", base, "--train_files", f"{base}/rows.jsonl", "--output_dir", output]
    sys.argv += [
        "--method",
        "full",
        "--packing",
        "false",
        "--max_length",
        "128",
        "--logging_steps",
        "1",
        "--save_steps",
        "1",
    ]
    sys.argv += ["--max_steps", str(STEPS), *words]
    sft.main()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"saves": seconds, "peak": int(peak.split()[1]) / 1024}), flush=True)


def measure(base: Path, output: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--train", str(base), str(output), *words]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stdout[-2000:] + finished.stderr[-2000:])
    return json.loads(finished.stdout.splitlines()[-1])


def skip() -> float:
    """Return the seconds until the first batch after a million steps."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    from support import make_rows

    from accel_llm.config.options import TrainOptions
    from accel_llm.data.stream import Position, Stream

    lengths = np.random.default_rng(0).integers(16, 512, 100_000)
    ids = [5] * 512
    rows = make_rows((k + 1, ids[:length], ids[:length]) for k, length in enumerate(lengths.tolist()))
    options = TrainOptions(max_steps=2_000_000, max_length=2048, per_device_train_batch_size=4)
    since = time.perf_counter()
    stream = Stream(rows, options, Position(step=1_000_000, rows=4_000_000), 0)
    next(stream.batches(1_000_000))
    return time.perf_counter() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(*args.train)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        base, work = Path(name) / "base", Path(name)
        base.mkdir()
        count = build(base, args.layers, args.width)
        never = measure(base, work / "never")
        background = measure(base, work / "background", "--save_async")
        checkpoint = work / "never" / "checkpoints" / f"step-{STEPS:08d}"
        size = sum(path.stat().st_size for path in checkpoint.iterdir()) / 2**20
        longer = ("--max_steps", str(2 * STEPS), "--allow_changed", "max_steps")
        resumed = measure(base, work / "resumed", "--resume_from_checkpoint", str(checkpoint), *longer)
    # The first save in the background makes room for the copies, the last one waits: the run is at its end.
    waits, blocking = background["saves"][1:-1], never["saves"]
    print(
        f"{count / 1e6:.0f} million parameters, checkpoint of {size:,.0f} MiB ({size * 2**20 / count:.2f} bytes each)"
    )
    print(f"saving while training waits: {min(blocking):.2f} s ({size / min(blocking):,.0f} MiB/s)")
    print(f"save_async: training waits {min(waits):.3f} s, {min(waits) / min(blocking):.1%} of that")
    print(f"peak memory: {never['peak']:,.0f} MiB, of the resumed run {resumed['peak']:,.0f} MiB")
    print(f"first batch after 1,000,000 steps of 4 rows (100,000 documents an epoch): {skip():.2f} s")


if __name__ == "__main__":
    main()
