"""What came out of a run, in numbers and answers, and the commands to use it."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from rich.text import Text
from transformers import AutoConfig

from accel_llm.config.command_line import shell_command
from accel_llm.report.card import classifies, exports_scores
from accel_llm.report.ledger_text import one_line
from accel_llm.system.progress import console, format_seconds

NAMES_WIDTH = 18  # of the names on the left
LETTERS = 60  # of a prompt its last ones, of an answer its first ones
# Metrics of which less is better; of all others more is.
FALLING = ("loss", "perplexity", "bits_per_byte", "mse", "mae", "log_loss", "calibration_error", "kl", "rejected")
COUNTS = ("supervised_tokens",)  # of an evaluation, which tell nothing about the model


def summary_lines(metrics: list[dict[str, Any]], facts: dict[str, Any], unit: str) -> list[tuple[str, str]]:
    """Return (name, text) for each line on what came out; `metrics` are those of metrics.jsonl, `facts` of run.json.

    `unit` is what the targets of the loss are, such as tokens.
    """
    steps = [line for line in metrics if "learning_rate" in line]
    if not steps:
        return []
    last = steps[-1]
    done = [f"{last['step']:,} steps", f"{last['epoch']:g} epochs", f"{last['supervised_tokens']:,} trained {unit}"]
    if "started" in facts:
        seconds = (
            datetime.now().astimezone() - datetime.strptime(facts["started"], "%Y-%m-%dT%H:%M:%S%z")
        ).total_seconds()
        done.append(f"this start took {format_seconds(seconds)}")
    speeds = [line["tokens_per_second"] for line in steps if line.get("tokens_per_second")]
    cost = [f"{median(speeds):,.0f} tokens a second (median)"] if speeds else []
    cost.append(f"peak memory {max(line['peak_memory_mb'] for line in steps):,} MiB (main process)")
    lines = [("done", ", ".join(done)), ("speed", ", ".join(cost)), ("loss", _first_and_last(steps, "loss"))]
    evaluations = [line for line in metrics if "eval/loss" in line]
    names = [name for line in evaluations[-1:] for name in line if name.startswith("eval/")]
    lines += [(name, _first_and_last(evaluations, name, best=True)) for name in names if name[5:] not in COUNTS]
    return lines


def _first_and_last(lines: list[dict[str, Any]], name: str, best: bool = False) -> str:
    """Return the first and the last value of a metric with their steps, and with `best` its best one, if it is another."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    if not points:
        return "not a finite number"
    first, last = points[0], points[-1]
    text = f"{last[1]:.4f} at step {last[0]:,}"
    if len(points) > 1:
        text += f", from {first[1]:.4f} at step {first[0]:,}"
    finite = [point for point in points if math.isfinite(point[1])]
    # Of a single source it has the name of the source behind it.
    falls = {name.rpartition("/")[2], name.removeprefix("eval/").partition("/")[0]} & {*FALLING}
    top = (min if falls else max)(finite, key=lambda point: point[1], default=last)
    return text + (f"; best {top[1]:.4f} at step {top[0]:,}" if best and top[1] != last[1] else "")


def show_answers(samples: Sequence[dict[str, Any]], count: int) -> None:
    """Print the first `count` generated answers, each beside the last line that was asked and the answer in the data."""
    # What all prompts end with is the template's: it closes the question and opens the answer.
    turned = [sample["prompt"][::-1] for sample in samples]
    equal = takewhile(lambda letters: len({*letters}) == 1, zip(*turned, strict=False))
    same = sum(1 for _ in equal) if len({*turned}) > 1 else 0
    for sample in samples[:count]:
        asked = sample["prompt"][: len(sample["prompt"]) - same].rstrip()
        prompt, answer = one_line(asked.rpartition("\n")[2]), one_line(sample["generated"])
        right = sample["generated"] == sample.get("expected")
        text = Text(f"{prompt if len(prompt) <= LETTERS else '...' + prompt[-LETTERS:]} => ", style="bright_black")
        text.append(_cut(answer), style="green" if right else "")
        if not right and sample.get("expected") is not None:
            text.append(f"  (data: {_cut(one_line(sample['expected']))})", style="bright_black")
        console.print(Text(f"{'answer:':{NAMES_WIDTH}} "), text, sep="", soft_wrap=True)


def show_continued_texts(texts: Sequence[dict[str, Any]], step: int) -> None:
    """Print texts that the model has continued after `step`: the beginning in grey, then what it wrote."""
    for sample in texts:
        text = Text(one_line(sample["prompt"]), style="bright_black")
        text.append(one_line(sample["generated"]), style="not bright_black")
        console.print(Text(f"{f'text at {step:,}:':{NAMES_WIDTH}} "), text, sep="", soft_wrap=not console.is_terminal)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}..."


def print_line(name: str, text: str) -> None:
    """Print a name on the left and a text, which is no markup and is never wrapped."""
    console.print(f"{name + ':':{NAMES_WIDTH}} {text}".rstrip(), soft_wrap=True, markup=False, emoji=False)


def next_commands(run: Path, folder: Path) -> dict[str, str]:
    """Return what to do with the export of a run and the command for it, ready to copy."""
    scores = exports_scores(folder)
    lines = {} if scores else {"ask it": shell_command("chat.py", model=run)}
    if classifies(folder):
        lines = {"predict": shell_command("predict.py", model=run, input_files="FILE", output_file="predictions.jsonl")}
    kind, more = "SequenceClassification" if scores else "CausalLM", ""
    loader = f"AutoModelFor{kind}"
    if folder.name == "adapter":
        # transformers scores the last token that is not the pad token, and PEFT does not read the config beside its files.
        labels = AutoConfig.from_pretrained(str(folder)) if scores else None
        more = f", num_labels={labels.num_labels}, pad_token_id={labels.pad_token_id}" if labels else ""
        merged = run.with_name(f"{run.name}-merged") if run.name else Path("merged")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        # Virtual tokens are no weights, and BEFT adds to biases, which most models do not have.
        if "num_virtual_tokens" not in config and config["peft_type"] != "BEFT":
            lines["merge it"] = shell_command("merge.py", adapter=run, output_dir=merged)
        loader = f"AutoPeftModelFor{kind}"
    lines["load it"] = f"{loader}.from_pretrained({json.dumps(str(folder), ensure_ascii=False)}{more})"
    return lines
