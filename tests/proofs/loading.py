"""Measure the peak of host memory while a model is loaded and sharded, and compare it with the weights of a rank.

    python tests/proofs/loading.py [--layers 20]

A random model is written to a temporary folder and loaded by real launches of two CPU processes under ZeRO-3 and FSDP2,
for method full, lora and qlora; `fresh` draws its weights instead. Each line shows MiB: the weights that a rank holds at the end, the peak of its resident
memory above the memory before loading, and the bound: those weights plus one layer (or the embedding, if that is
larger), plus 20%.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHODS = ("full", "lora", "qlora", "fresh")
STRATEGIES = ("zero3", "fsdp2")
MIB = 2**20


def resident(kind: str) -> float:
    """Return MiB from /proc/self/status: VmRSS is the memory now, VmHWM its peak."""
    line = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert line
    return int(line[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def rank_main(model_folder: str, method: str) -> None:
    """Do the same as a training script up to `prepare`, and measure it."""
    import torch

    from accel_llm.adapters.attach import attach_adapter
    from accel_llm.backend.accelerator import build_accelerator
    from accel_llm.backend.library_messages import quiet_libraries
    from accel_llm.config.options import TrainOptions
    from accel_llm.config.pretrain_options import PretrainOptions
    from accel_llm.model.loading import build_model, load_model, load_model_config
    from accel_llm.model.loss import attach_loss
    from accel_llm.model.placement import place_weights

    fresh = method == "fresh"
    options: TrainOptions = TrainOptions(model_name_or_path=model_folder, method="full" if fresh else method)
    if fresh:
        options = PretrainOptions(config_name=model_folder, method="full")
    config = load_model_config(options)
    quiet_libraries()
    accelerator = build_accelerator(options)
    # Import these modules before the measurement, which is of weights.
    import bitsandbytes
    import peft
    from transformers import LlamaForCausalLM

    assert bitsandbytes and peft and LlamaForCausalLM
    _load_small(options, accelerator)
    before = resident("VmRSS")
    forget_peak()
    model = build_model(config, options) if fresh else load_model(options)
    attach_loss(model, 2048)
    if options.has_adapter:
        model = attach_adapter(model, options)
    place_weights(accelerator, model, options)
    placed = resident("VmHWM")
    held = 0
    for parameter in model.parameters():
        local = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        local = local.to_local() if hasattr(local, "to_local") else local
        held += local.numel() * local.element_size()
    facts = {"before": before, "peak": placed - before, "held": held / MIB}
    gathered = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, facts)
    if accelerator.is_main_process:
        print("MEASURED " + json.dumps(gathered), flush=True)
    os._exit(0)


def _load_small(options, accelerator) -> None:
    """Use each library once, because its first use allocates threads, kernels and caches of a fixed size."""
    import torch
    from bitsandbytes.nn import Params4bit

    Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    torch.randn(256, 256) @ torch.randn(256, 256)
    torch.distributed.broadcast(torch.zeros(1 << 20), 0)


def write_model(folder: Path, layers: int) -> tuple[float, float]:
    """Write a Llama of `layers` layers in bf16; return the parameters of a layer and of the embedding, in millions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return layer / 1e6, model.model.embed_tokens.weight.numel() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rank", nargs=2, metavar=("MODEL", "METHOD"))
    args = parser.parse_args()
    if args.rank:
        rank_main(*args.rank)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        layer, embedding = write_model(Path(folder), args.layers)
        print(
            f"{'strategy':10}{'method':8}{'held':>10}{'peak':>10}{'bound':>10}   MiB of each rank, computing in float32"
        )
        for strategy in STRATEGIES:
            for method in METHODS:
                ranks = launch(strategy, folder, method)
                bound = (max(r["held"] for r in ranks) + max(layer, embedding) * 4e6 / MIB) * 1.2
                peak = max(rank["peak"] for rank in ranks)
                failed |= peak > bound
                held = max(rank["held"] for rank in ranks)
                print(f"{strategy:10}{method:8}{held:10.0f}{peak:10.0f}{bound:10.0f}", flush=True)
    sys.exit(failed)


def launch(strategy: str, folder: str, method: str) -> list[dict]:
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{strategy}.yaml", "--num_processes", "2"]
    command += ["tests/proofs/loading.py", "--rank", folder, method]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise RuntimeError(process.stdout[-2000:] + process.stderr[-4000:])
    return json.loads(lines[0].removeprefix("MEASURED "))


if __name__ == "__main__":
    main()
