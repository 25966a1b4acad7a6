"""Compare merging here with merging by PEFT, on one folder: seconds and peak memory, each in its own process.

python tests/benchmarks/merge.py                       # 3.1 GB in bfloat16, a folder in /tmp that is deleted again
python tests/benchmarks/merge.py --layers 4 --repeat 1

A model is built from a config, with a LoRA of rank 16 on all its linear layers. Each way merges the same folder, whose
files were read once before. Memory is the peak (VmHWM) above the resident memory after the imports. PEFT does
`AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)`. We do the same without
verification, then with it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

WAYS = ("peft", "none", "modules")
MB = 2**20


def build(folder: Path, layers: int, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=64_000, num_hidden_layers=layers, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter")


def status(key: str) -> float:
    """Return a value of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def run(way: str, folder: Path) -> None:
    """Do one merge in this process; print seconds and MiB as JSON."""
    from peft import AutoPeftModelForCausalLM

    from accel_llm.config.tool_options import MergeOptions
    from accel_llm.merge.merge import merge

    logging.disable_progress_bar()
    adapter, target = str(folder / "adapter"), str(folder / "merged" / way)
    before, start = status("VmRSS"), time.perf_counter()
    cpu_seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    if way == "peft":
        AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto").merge_and_unload().save_pretrained(target)
    else:
        merge(MergeOptions(adapter=[adapter], output_dir=target, verify=way))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    cpu_seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu_seconds
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": status("VmHWM") - before}))


def measure(folder: Path, repeat: int) -> dict[str, dict[str, float]]:
    """Return the best of `repeat` runs of each way; the ways take turns."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(repeat):
        for way in WAYS:
            shutil.rmtree(folder / "merged" / way, ignore_errors=True)
            for file in folder.glob("base/*.safetensors"):
                with file.open("rb") as stream:  # a warm page cache for all alike
                    while stream.read(2**24):
                        pass
            subprocess.run(["sync"], check=True)
            command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
            # launch/merge.py sets the same before it imports torch.
            ours = {} if way == "peft" else {"THP_MEM_ALLOC_ENABLE": "1"}
            finished = subprocess.run(command, check=True, capture_output=True, env=os.environ | ours)
            figures = json.loads(finished.stdout.splitlines()[-1])
            best[way] = min(figures, best.get(way, figures), key=lambda entry: entry["seconds"])
    return best


def same(folder: Path) -> bool:
    first, second = (
        {
            name: tensor
            for file in (folder / "merged" / way).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for way in ("peft", "none")
    )
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        run(options.way, options.folder)
        return
    folder = Path(tempfile.mkdtemp(prefix="merge-"))
    try:
        build(folder, options.layers, getattr(torch, options.dtype))
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        results = measure(folder, options.repeat)
        width = torch.finfo(getattr(torch, options.dtype)).bits // 8
        copied, merged = 64_000 * 2048 * width / MB, 8192 * 2048 * width / MB
        print(f"{size / 1e9:.2f} GB, {options.dtype}; same bits: {same(folder)}")
        for way, entry in results.items():
            ratio = results["peft"]["seconds"] / entry["seconds"]
            speed = f"{entry['seconds']:6.1f} s  {ratio:5.2f} x  {entry['cpu_seconds']:6.1f} s of CPU"
            print(f"{way:8} {speed}  peak {entry['peak']:6.0f} MiB")
        print(f"allowed: 1.5 x the largest copied = {1.5 * copied:.0f}, 6 x the largest merged = {6 * merged:.0f} MiB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
