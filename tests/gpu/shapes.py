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
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from turns import wait_for_turn

from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.model import loading, placement
from accel_llm.system.out_of_memory import memory_reason
from accel_llm.training import loop, setup

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
GIB = 2**30
SHAPES = ("llama_8b", "qwen3_8b", "qwen3_0.6b", "tiny")
# The steps that are left out, then those that are timed, then those that are profiled; one more is watched for waits.
WARM, TIMED, PROFILED = 2, 4, 3
MEASURED_STEPS = WARM + TIMED + PROFILED + 1
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
    if name == "qwen3_8b":
        return Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, **common,
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


class Measured(Exception):
    """All that is measured is known; the rest of the run is not needed."""


class StepClock:
    """Times some steps, profiles some more and watches one, from the call that the loop makes at the start of a step."""

    def __init__(self, facts: dict[str, Any]):
        self.original, self.step, self.tokens, self.facts = loop.total_targets, 0, 0, facts
        loop.total_targets = self  # type: ignore[assignment]

    def __call__(self, accelerator: Any, micro_batches: list[dict]) -> float:
        self.step += 1
        if self.step == WARM + 1:
            wait_for_turn()
            self.start = now()
        if self.step == WARM + TIMED + 1:
            seconds = now() - self.start
            self.facts |= {"ms_a_step": 1000 * seconds / TIMED, "tokens_a_second": self.tokens / seconds}
            # Without the operators on the CPU, whose events are many times as many.
            self.profiler = profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU])
            self.profiler.__enter__()
        if self.step == MEASURED_STEPS:
            self.profiler.__exit__(None, None, None)
            self.facts |= profile_facts(self.profiler, self.facts["ms_a_step"])
            self.watch = WaitWatch()
        if self.step == MEASURED_STEPS + 1:
            self.facts |= {"places_of_waits": self.watch.stop()}
            raise Measured
        if WARM < self.step <= WARM + TIMED:
            self.tokens += sum(map(token_count, micro_batches))
        return self.original(accelerator, micro_batches)


def token_count(batch: dict) -> int:
    """Return the tokens of a batch, without padding; the host knows them, and need not wait for the device."""
    return sum(batch["lengths"])


class WaitWatch:
    """Notes the line of this project at which torch makes the host wait for the device, until `stop`.

    torch sees its own waits only, not those of bitsandbytes or DeepSpeed; the profile counts all of them. What the
    backward pass waits for is noted at the line that calls it.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.catcher = warnings.catch_warnings()
        self.catcher.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self.note
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")

    def note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{ROOT}/")]
        place = next(frame for frame in reversed(frames) if Path(frame.filename) != Path(__file__))
        self.places[f"{Path(place.filename).relative_to(ROOT)}:{place.lineno}"] += 1

    def stop(self) -> dict[str, int]:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
        self.catcher.__exit__(None, None, None)
        return dict(self.places)


def now() -> float:
    """Return the time after everything that the device was given is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def profile_facts(profiler: Any, ms_a_step: float) -> dict[str, Any]:
    """Return counts for each step: waits and copies to the host, launches; and the share of time the device is busy.

    The raw events are read: torch's summary of them takes seconds for tens of thousands of launches.
    """
    counts: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    spans = []
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        counts[name] += 1
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            spans.append((event.start_ns(), event.end_ns()))
            kernels[name[:80]] += event.duration_ns()
    busy = reached = 0
    for start, end in sorted(spans):
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    waits = {name: counts[name] for name in WAITS if counts[name]}
    own = min(1, counts["cudaDeviceSynchronize"])  # when it stops, torch's profiler waits once itself
    to_host = sum(count for name, count in counts.items() if name.startswith("Memcpy DtoH"))
    return {
        "waits": waits,
        "waits_a_step": (sum(waits.values()) - own) / PROFILED,
        "copies_to_host_a_step": to_host / PROFILED,
        "launches_a_step": sum(counts[name] for name in LAUNCHES) / PROFILED,
        "busy_ms_a_step": busy / 1e6 / PROFILED,
        "busy_share": busy / 1e6 / PROFILED / ms_a_step,
        "kernels_ms_a_step": {name: time / 1e6 / PROFILED for name, time in kernels.most_common(12)},
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


def words_of(folder: Path, words: list[str]) -> list[str]:
    """Return the options of sft.py for the model and the rows in `folder`."""
    files = ["--model_name_or_path", str(folder / "model"), "--train_files", str(folder / "chats.jsonl")]
    return [*files, "--output_dir", str(folder / "out"), *words]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit_gib", type=float)
    parser.add_argument("--measure", action="store_true", help="time and profile steps, and end after them")
    args, words = parser.parse_known_args()  # all other words are options of sft.py

    write_inputs(config_of(args.shape), args.folder)
    draw_weights_instead_of_reading()
    facts: dict[str, Any] = {}
    if args.measure:
        words += ["--max_steps", str(MEASURED_STEPS + 1)]
        StepClock(facts)
    for name in ("assemble_model", "optimizer_and_schedule"):
        note_memory_after(name, facts)
    if CUDA and args.limit_gib:
        torch.cuda.set_per_process_memory_fraction(args.limit_gib * GIB / torch.cuda.mem_get_info()[1])

    try:
        run_sft(words_of(args.folder, words))
    except Measured:
        pass
    except Exception as error:
        traceback.print_exc()
        facts["error"] = memory_reason(error) or f"{type(error).__name__}: {error}"[:300]
        print(facts["error"], flush=True)
    lines = args.folder / "out" / "metrics.jsonl"
    if lines.is_file():
        losses = [json.loads(line)["loss"] for line in lines.read_text(encoding="utf-8").splitlines()]
        facts |= {"losses": losses[:8]}
    print("MEASURED " + json.dumps(facts | memory_facts()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
