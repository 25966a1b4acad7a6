"""Parts d, e and f: memory, profile and speed of models of published shapes, and the same training in TRL."""

import json
import re
import threading
from pathlib import Path
from typing import Any

from runner import HERE, Cell, Ended, Part, python

MEMORY_LIMIT = 7.5  # GiB
GIB = 2**30
QLORA = "--method qlora --precision bf16 --gradient_checkpointing --max_length 2048 --train_on all"
LORA = "--method lora --precision bf16 --max_length 2048 --train_on all"
UNPACKED = "--packing false --per_device_train_batch_size 16"

# Name in part d: the shape and the options.
FITS = {
    "Llama 8B": ("llama_8b", ""),
    "Llama 8B adamw_8bit": ("llama_8b", "--optim adamw_8bit"),
    "Qwen3 8B": ("qwen3_8b", ""),
    "Llama 8B offload_embeddings": ("llama_8b", "--offload_embeddings"),
}
# Name in part e: the shape and the options. Two of them are compared with TRL in part f.
PROFILES = {
    "8B qlora": ("llama_8b", QLORA),
    "0.6B lora": ("qwen3_0.6b", LORA),
    "0.6B full": ("qwen3_0.6b", LORA.replace("lora", "full")),
}
COMPARED = ("0.6B lora", "8B qlora")


def measured(part: Part, name: str, program: str, size: str, options: str, work: Path) -> tuple[Ended, list[dict]]:
    """Run shapes.py or beside.py for a shape with random weights, and return what it printed as measured."""
    folder = work / f"{program}-{part.letter}-{name.replace(' ', '-')}"
    words = [size, "--folder", folder, *options.split()]
    ended = part.run(f"{name} {program}", python(HERE / f"{program}.py", *words))
    return ended, [json.loads(line) for line in re.findall(r"^MEASURED (.*)$", ended.text, re.M)]


# --- part d ---


def fits(part: Part, name: str, work: Path) -> list[Cell]:
    """Train QLoRA on an 8B shape under a limit on what the process may take; the estimate stands beside the peak."""
    size, options = FITS[name]
    limit = f"--limit_gib {MEMORY_LIMIT} --max_steps 4"
    ended, found = measured(part, name, "shapes", size, f"{limit} {QLORA} {options}", work)
    required = f"at most {MEMORY_LIMIT} GiB"
    if not found:
        return [Cell(name, False, ended.cause, required)]
    facts = found[-1]
    peak, reserved, steps = facts["peak_allocated_gib"], facts["peak_reserved_gib"], len(facts.get("losses", []))
    figure = (
        f"{facts['error'] + '; ' if 'error' in facts else ''}peak {peak:.2f} GiB, reserved {reserved:.2f}, estimated "
        f"{estimated(size, f'{QLORA} {options}')}; weights "
        f"{facts.get('after_assemble_model', {}).get('now_gib', 0):.2f}; {steps} lines of metrics; expandable segments: "
        f"{facts.get('expandable')}"
    )
    return [Cell(name, reserved <= MEMORY_LIMIT and steps > 0 and "error" not in facts, figure, required, facts)]


ESTIMATING = threading.Lock()


def estimated(size: str, options: str) -> str:
    """Return what the script estimates for a shape, in GiB and without the memory that CUDA itself takes."""
    from shapes import config_of

    from accel_llm.config.command_line import parse_options
    from accel_llm.config.options import SftOptions
    from accel_llm.training.memory_estimate import estimate_memory

    words = ["--model_name_or_path", size, "--train_files", "chats.jsonl", "--output_dir", "out", *options.split()]
    try:
        with ESTIMATING:
            terms = estimate_memory(parse_options(SftOptions, words), config_of(size), 1, "cuda").terms
    except Exception as error:  # the peak is worth more than the estimate
        return f"{type(error).__name__}: {error}"[:100]
    return f"{(sum(terms.values()) - terms['context']) / GIB:.2f}"


# --- part e ---


def profiled(part: Part, name: str, work: Path) -> list[Cell]:
    """A profile of three steps: waits of the host, launches, and the share of the time in which the device works."""
    size, options = PROFILES[name]
    required = "at most 1 wait a step"
    options += " --order source --logging_steps 100 --measure"
    ended, found = measured(part, name, "shapes", size, options, work)
    if not found or "waits_a_step" not in found[-1]:
        return [Cell(name, False, ended.cause, required, dict(*found))]
    facts = found[-1]
    figure = (
        f"{facts['tokens_a_second']:,.0f} tokens/s, {facts['ms_a_step']:.0f} ms/step, busy {facts['busy_share']:.0%}, "
        f"a step: {facts['waits_a_step']:.2g} waits, {facts['copies_to_host_a_step']:.2g} copies to the host, "
        f"{facts['launches_a_step']:,.0f} launches; peak {facts['peak_allocated_gib']:.2f} GiB; "
        f"waits at {facts['places_of_waits']}"
    )
    return [Cell(name, facts["waits_a_step"] <= 1, figure, required, facts)]


# --- part f ---


def ours_unpacked(part: Part, name: str, work: Path) -> list[Cell]:
    """Time the padded rows here; part e has timed the packed ones."""
    size, options = PROFILES[name]
    options += f" {UNPACKED} --order source --logging_steps 100 --measure"
    ended, found = measured(part, f"{name} unpacked", "shapes", size, options, work)
    good = bool(found) and "tokens_a_second" in found[-1]
    facts = found[-1] if good else None
    return [Cell(f"{name}, here, unpacked", good, speed(found[-1]) if good else ended.cause, "runs", facts)]


def trl(part: Part, name: str, work: Path) -> list[Cell]:
    """Time the same micro-batches in TRL, packed and padded."""
    size, options = PROFILES[name]
    ended, found = measured(part, name, "beside", size, f"{options} --order source", work)
    cells = [Cell(f"{name}, TRL, {facts['rows']}", True, speed(facts), "runs", facts) for facts in found]
    return cells if len(cells) == 2 else [*cells, Cell(f"{name}, TRL", False, ended.cause, "packed and unpacked")]


def speed(facts: dict[str, Any]) -> str:
    return (
        f"{facts['tokens_a_second']:,.0f} tokens/s, {facts.get('peak_allocated_gib', 0):.2f} GiB, first loss "
        f"{facts['losses'][0]:.4f}"
    )


def comparison(name: str, cells: dict[str, Cell]) -> list[Cell]:
    """Compare what the cells of parts e and f measured: the first losses must be equal, the rest is told."""
    compared = []
    for how, here in (("packed", name), ("unpacked", f"{name}, here, unpacked")):
        ours, theirs = (getattr(cells.get(key), "facts", None) for key in (here, f"{name}, TRL, {how}"))
        if not ours or not theirs or "tokens_a_second" not in ours:
            compared.append(Cell(f"{name} beside TRL, {how}", None, "one of the two is missing"))
            continue
        apart = abs(ours["losses"][0] - theirs["losses"][0])
        times = ours["tokens_a_second"] / theirs["tokens_a_second"]
        figure = (
            f"{times:.2f} times as fast, first losses differ by {apart:.1e}: here {speed(ours)}; TRL {speed(theirs)}"
        )
        compared.append(Cell(f"{name} beside TRL, {how}", apart < 1e-2, figure, "first losses within 1e-02"))
    return compared
