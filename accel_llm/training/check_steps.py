"""The steps of `check_only`: how long they take, and the verdict on whether the run can start."""

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from accel_llm.backend.collectives import max_over_processes
from accel_llm.config.options import TrainOptions
from accel_llm.data.stream import TrainingPlan
from accel_llm.report.metrics import console, peak_memory_mb
from accel_llm.report.plan_text import count_of, describe_size, describe_time, show_lines
from accel_llm.system.secrecy import hide_secrets

MORE_STEPS, ENOUGH_SECONDS = 4, 20.0  # after the first step, whichever comes first
FULL = 0.95  # of a device's memory: little room for longer rows, and for gaps between tensors


def timed_steps(plan: TrainingPlan, device: torch.device, seconds: list[float]) -> Iterator[int]:
    """Yield the first few steps of `plan`, and add to `seconds` how long each took. All processes must iterate together.

    The first step loads kernels, builds the optimizer's state and may compile, so it says little about the others.
    """
    for step in range(plan.first_step + 1, plan.total_steps + 1):
        begun = time.perf_counter()
        yield step
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The slowest process decides for all.
        seconds.append(max_over_processes(round(1e6 * (time.perf_counter() - begun)), None) / 1e6)
        if len(seconds) > MORE_STEPS or sum(seconds[1:]) > ENOUGH_SECONDS:
            return


def show_verdict(
    accelerator: Accelerator, options: TrainOptions, checks: dict[str, Any], plan: TrainingPlan, seconds: list[float]
) -> None:
    """Print what the steps of `check_only` have shown, and remove its folder. Main process only.

    `checks` are those of the start and of `preflight`, `seconds` those of `timed_steps`.
    """
    if not accelerator.is_main_process:
        return
    facts, peak = checks["accelerate"], peak_memory_mb(accelerator.device)
    if options.verbose:
        _show_table(facts)
    lines = [
        ("checked", describe_checks(facts)),
        ("in force", describe_settings(facts)),
        ("memory", describe_peak(peak, checks.get("memory", {}), facts["num_processes"])),
        ("time", describe_run_time(plan, seconds)),
    ]
    problems = verdict_problems(facts, peak, checks)
    verdict = "ready: start without --check_only" if not problems else f"not ready: {'; '.join(problems)}"
    show_lines(lines)
    console.print(verdict, style="yellow" if problems else "green", soft_wrap=True, markup=False)
    shutil.rmtree(options.output_dir, ignore_errors=True)


def _show_table(facts: dict[str, Any]) -> None:
    table = Table(title="In force, checked in the first steps", show_header=False, box=None)
    for name, value in facts.items():
        parts = value.items() if isinstance(value, dict) and name != "deepspeed" else [("", value)]
        for part, part_value in parts:
            table.add_row(f"{name} {part}".rstrip(), hide_secrets(json.dumps(part_value)))
    console.print(table)


def describe_checks(facts: dict[str, Any]) -> str:
    """Say in words what preflight and the first step have checked."""
    first, parameters = facts.get("first_step"), facts["parameters"]
    checked = [
        f"{parameters['trainable']:,} of {parameters['total']:,} parameters are trained",
        f"the loss is the model family's ({facts['loss_path']})",
        f"most products run in {max(facts['products'], key=facts['products'].get, default='no dtype')}",
    ]
    if facts["num_processes"] > 1:
        checked.append("all processes hold equal weights" if facts["weights_hash"] else "parameters are sharded")
    if first:
        zero = f", {first['all_zero']:,} of them all zero" if first["all_zero"] else ""
        checked.append(f"{count_of(first['gradients'], 'trained tensor')} got a gradient{zero}")
    return "; ".join(checked)


def describe_settings(facts: dict[str, Any]) -> str:
    """Return the settings that the libraries have, in a line."""
    words = [
        f"{facts['strategy']} ({facts['engine']})",
        f"{facts['num_processes']} x {facts['device']}",
        facts["precision"],
        f"attention {facts['attention']}",
        facts["optimizer"],
        f"accumulation {facts['accumulation']}",
    ]
    if facts.get("compiled"):
        words.append(f"{facts['compiled']['graphs']} compiled graphs")
    return ", ".join([*words, "recomputed activations" if facts.get("recomputed_in_backward") else "kept activations"])


def describe_peak(peak: int, memory: dict[str, Any], processes: int) -> str:
    """Return the measured peak (MiB) of the main process beside the estimate and what the device has."""
    text = f"peak {describe_size(peak << 20)}{' of the main process' if processes > 1 else ''}"
    if memory:
        estimated, there = describe_size(memory["peak_memory_mb"] << 20), describe_size(memory["device_mb"] << 20)
        text += f", estimated {estimated}, of {there}"
    return f"{text}; an evaluation or a longer row may take more"


def describe_run_time(plan: TrainingPlan, seconds: list[float]) -> str:
    """Say how long a step takes and the whole run will, and what that was measured from."""
    if not seconds:
        return "not measured: no step was taken"
    steps, later = plan.total_steps - plan.first_step, seconds[1:]
    step = statistics.median(later) if later else seconds[0]
    whole = seconds[0] + step * (steps - 1)
    source = (
        f"median of {count_of(len(later), 'step')} after the first one, which took {describe_time(seconds[0])}"
        if later
        else "the only step, with all that is done once"
    )
    spread = ""
    if len(later) > 1 and max(later) > 1.3 * min(later):
        spread = f", {describe_time(min(later))} to {describe_time(max(later))}"
    return (
        f"{describe_time(step)} a step ({source}{spread}); {count_of(steps, 'step')} take about {describe_time(whole)}, "
        "without loading, evaluations, checkpoints and export"
    )


def verdict_problems(facts: dict[str, Any], peak: int, checks: dict[str, Any]) -> list[str]:
    """Return what speaks against starting the run; `peak` is in MiB. What must not be has raised an error before."""
    problems = []
    memory, first = checks.get("memory", {}), facts.get("first_step")
    if memory and peak > FULL * memory["device_mb"]:
        problems.append(
            f"the peak is {peak / memory['device_mb']:.0%} of the memory; lower max_length or the batch size"
        )
    if first is None:
        problems.append("no step changed a weight, as losses or gradients were not finite or rows had no label")
    elif first["all_zero"] == first["gradients"]:
        problems.append("all gradients are zero, so nothing would be learned")
    if problem := checks.get("disk_problem"):
        problems.append(problem.rstrip("."))
    return problems
