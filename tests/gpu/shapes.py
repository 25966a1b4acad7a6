"""Train a model of a published shape with random weights that are made on the card, by launch/sft.py itself.

    python tests/gpu/shapes.py llama_8b --folder /tmp/shape --limit_gib 7.5 --method qlora --max_length 2048

Only the reading of weights is replaced: each layer is drawn on the device instead of read from a file. Everything else
is the script's own way: quantization, adapter, checks, steps, checkpoint, export. `check.py` runs this in processes of
their own and reads the line that begins with MEASURED.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.model import loading, placement
from accel_llm.training import loop, setup

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
GIB = 2**30
# The steps that are left out, then those that are timed, then those that are profiled: few, as 8B has 25,000 launches in
# a step and the profiler takes seconds for them.
WARM, TIMED, PROFILED = 2, 4, 1
# What the host calls to wait, to copy and to start kernels, as the profiler names it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def config_of(name: str) -> PretrainedConfig:
    """Return the config of a published model, or of a tiny one for a machine without a GPU."""
    common = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 0, "max_position_embeddings": 8192}
    if name == "llama_8b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **common,
        )  # fmt: skip
    if name == "qwen3_0.6b":
        return Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **common,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, **common,
    )  # fmt: skip


def write_inputs(config: PretrainedConfig, folder: Path) -> None:
    """Write a model folder without weights, and rows of the demo that fill about a hundred rows of 2,048 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder / "model")
    build_demo_tokenizer().save_pretrained(folder / "model")
    lines = (json.dumps({"messages": row["messages"]}) for row in demo_conversations("train"))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def random_weight(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return a bf16 weight that depends on its name alone, so all programs draw the same model; or a fresh LoRA's."""
    if "lora_" in name:  # PEFT makes them on the device of their layer, which is meta too
        weight = torch.zeros(shape, device=device)
        return weight if "lora_B" in name else nn.init.kaiming_uniform_(weight, a=5**0.5)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator).mul_(0.02)


def empty_model(name: str, *_: Any, **__: Any) -> Any:
    """Return a model whose weights are on the meta device; its buffers are real."""
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.config._name_or_path = name
    return model


class Drawn:
    """Draws weights that are still on the meta device. Tied ones stay tied."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.shared: dict[int, Any] = {}

    def fill(self, model: nn.Module, module: nn.Module, device: torch.device) -> None:
        """Draw the weights directly in `module`, a part of `model`."""
        if not self.names:  # at the first call, when all of them are there
            for name, parameter in model.named_parameters():
                self.names[id(parameter)] = name.replace("base_model.model.", "").replace(".base_layer", "")
        for name, old in list(module.named_parameters(recurse=False)):
            if not old.is_meta:
                continue
            if id(old) in self.shared:
                module._parameters[name] = self.shared[id(old)]
                continue
            data = random_weight(self.names[id(old)], old.shape, device)
            if isinstance(old, Params4bit):  # kept nowhere else, so that only the 4-bit weight remains
                module._parameters[name] = Params4bit(data, requires_grad=False, **vars(old))  # type: ignore[arg-type]
            else:
                self.shared[id(old)] = module._parameters[name] = nn.Parameter(data, old.requires_grad)


def draw_weights_instead_of_reading() -> None:
    """Replace what reads a model's files by the functions above."""
    materialize, drawn = placement.materialize_weights, Drawn()

    def draw_and_materialize(model: Any, modules: list[nn.Module], compute: Any, device: Any, *more: Any) -> None:
        # One module at a time, as its unquantized weight is much larger than the 4-bit one.
        for module in modules:
            if module._parameters or module._buffers:
                drawn.fill(model, module, device)
                materialize(model, [module], compute, device, *more)

    loading.load_complete_model = empty_model
    placement.materialize_weights = draw_and_materialize


class StepClock:
    """Times some steps and profiles some more, from the one call that the loop makes at the start of each step."""

    def __init__(self, profiled: bool):
        self.original, self.step, self.tokens = loop.total_targets, 0, 0
        self.facts: dict[str, Any] = {}
        self.profiler: Any = None
        self.profiled = profiled
        loop.total_targets = self  # type: ignore[assignment]

    def __call__(self, accelerator: Any, micro_batches: list[dict]) -> float:
        self.step += 1
        if self.step == WARM + 1:
            self.start, self.tokens = now(), 0
        if self.step == WARM + TIMED + 1:
            seconds = now() - self.start
            self.facts |= {"ms_a_step": 1000 * seconds / TIMED, "tokens_a_second": self.tokens / seconds}
            self.start_profile()
        if self.step == WARM + TIMED + PROFILED + 1:
            self.stop_profile()
        self.tokens += sum(
            int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in micro_batches
        )
        return self.original(accelerator, micro_batches)

    def start_profile(self) -> None:
        if self.profiled:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
            self.profiler = profile(activities=activities)
            self.profiler.__enter__()

    def stop_profile(self) -> None:
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            self.facts |= profile_facts(self.profiler, self.facts["ms_a_step"])
            self.profiler = None


def now() -> float:
    """Return the time after everything that the device was given is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def profile_facts(profiler: Any, ms_a_step: float) -> dict[str, Any]:
    """Return counts for each step: waits and copies to the host, launches; and the share of time the device is busy."""
    events = profiler.events()
    counts = {event.key: event.count for event in profiler.key_averages()}
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    to_host = sum(count for key, count in counts.items() if key.startswith("Memcpy DtoH"))
    top = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:12]
    return {
        "waits_a_step": sum(counts.get(name, 0) for name in WAITS) / PROFILED,
        "copies_to_host_a_step": to_host / PROFILED,
        "launches_a_step": sum(counts.get(name, 0) for name in LAUNCHES) / PROFILED,
        "busy_ms_a_step": busy / 1000 / PROFILED,
        "busy_share": busy / 1000 / PROFILED / ms_a_step,
        "kernels_ms_a_step": {event.key[:80]: event.self_device_time_total / 1000 / PROFILED for event in top},
    }


def memory_facts() -> dict[str, Any]:
    if not CUDA:
        return {}
    return {
        "expandable": all(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot()),
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "now_gib": torch.cuda.memory_allocated() / GIB,
    }


def note_memory_after(name: str, facts: dict[str, Any]) -> None:
    """Note the device's memory after a step of the script's setup."""
    original = getattr(setup, name)

    def noting(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        facts[f"after_{name}"] = memory_facts()
        if CUDA:  # what drawing the weights took does not count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return result

    setattr(setup, name, noting)


def run_sft(words: list[str]) -> None:
    """Run the main function of launch/sft.py in this process."""
    path = ROOT / "launch" / "sft.py"
    spec = importlib.util.spec_from_file_location("launch_sft", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [str(path), *words]
    module.main()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("shape", choices=("llama_8b", "qwen3_0.6b", "tiny"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit_gib", type=float)
    parser.add_argument("--profile", action="store_true")
    args, words = parser.parse_known_args()  # all other words are options of sft.py

    write_inputs(config_of(args.shape), args.folder)
    draw_weights_instead_of_reading()
    clock, facts = StepClock(args.profile), {}
    for name in ("assemble_model", "optimizer_and_schedule"):
        note_memory_after(name, facts)
    if CUDA and args.limit_gib:
        torch.cuda.set_per_process_memory_fraction(args.limit_gib * GIB / torch.cuda.mem_get_info()[1])

    files = ["--model_name_or_path", str(args.folder / "model"), "--train_files", str(args.folder / "chats.jsonl")]
    try:
        run_sft([*files, "--output_dir", str(args.folder / "out"), *words])
    except torch.OutOfMemoryError as error:
        facts["out_of_memory"] = str(error)[:300]
    lines = args.folder / "out" / "metrics.jsonl"
    if lines.is_file():
        losses = [json.loads(line)["loss"] for line in lines.read_text(encoding="utf-8").splitlines()]
        facts |= {"losses": losses[:8]}
    print("MEASURED " + json.dumps(facts | clock.facts | memory_facts()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
