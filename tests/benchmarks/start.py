"""Time from a command to the first bar and to the first step on a terminal, beside TRL.

python tests/benchmarks/start.py --model FOLDER FILE

Both programs fine-tune the same model with a LoRA for two steps on the same chats, on the CPU, each in a pseudo-terminal
of its own, in turn. The first bar is the first one that a person sees, whatever it is of; the first step is the first line
with a loss. Nothing is cached but what the system keeps of files: ours encodes the rows anew in each round.
"""

import argparse
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
BAR = re.compile(rb"\xe2\x94\x81|\xe2\x95\xb8|\d+%\|")  # rich's and tqdm's
LOSS = re.compile(rb"step 1/2|'loss'")
TRL = """
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, file, folder = sys.argv[1:]
settings = SFTConfig(folder, max_steps=2, logging_steps=1, max_length=512, use_cpu=True, report_to="none", bf16=False,
                     per_device_train_batch_size=1, gradient_accumulation_steps=1)
rows = load_dataset("json", data_files=file, split="train", cache_dir=folder + "/cache")
SFTTrainer(model, settings, train_dataset=rows, peft_config=LoraConfig(task_type="CAUSAL_LM")).train()
"""


def seconds_until(command: list[str], patterns: list[re.Pattern[bytes]]) -> list[float]:
    """Run a command in a pseudo-terminal; return when its output first matched each pattern, in seconds."""
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # tqdm draws nothing without a width
    start, environment = time.perf_counter(), os.environ | {"TERM": "xterm", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    output, times = b"", [0.0] * len(patterns)
    while True:
        try:
            output += os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        for k, pattern in enumerate(patterns):
            if not times[k] and pattern.search(output):
                times[k] = time.perf_counter() - start
    os.close(leader)
    if process.wait() or not all(times):
        raise SystemExit(output.decode(errors="replace")[-3000:])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="chats with a column messages")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    times: dict[str, list[list[float]]] = {"accel-llm": [], "TRL": []}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as work:
            (script := Path(work, "trl_sft.py")).write_text(TRL, encoding="utf-8")
            words = ["--model_name_or_path", arguments.model, "--train_files", arguments.file, "--max_length", 512]
            words += [
                "--overlong",
                "truncate",
                "--max_lost",
                1,
            ]  # TRL cuts each long row; ours leaves out a chat whose answer is cut
            words += [
                "--max_steps",
                2,
                "--logging_steps",
                1,
                "--cache_dir",
                f"{work}/cache",
                "--output_dir",
                f"{work}/o",
            ]
            commands = {
                "accel-llm": [sys.executable, "launch/sft.py", *map(str, words)],
                "TRL": [sys.executable, str(script), str(arguments.model), str(arguments.file), f"{work}/trl"],
            }
            for name in sorted(commands, reverse=bool(number % 2)):
                times[name].append(seconds_until(commands[name], [BAR, LOSS]))
    results = {name: [median(column) for column in zip(*rounds, strict=True)] for name, rounds in times.items()}
    for k, what in enumerate(("first bar", "first step")):
        ours, theirs = (results[name][k] for name in ("accel-llm", "TRL"))
        print(f"{what}: {ours:.1f} s, TRL {theirs:.1f} s, {ours / theirs:.2f} times")
    print(json.dumps(times))


if __name__ == "__main__":
    main()
