"""What a person sees before and after training: settings, coloured rows, steps, and the next commands."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import Options, TrainOptions
from accel_llm.data.prepare import EncodedData
from accel_llm.data.rows import Rows
from accel_llm.data.stream import TrainingPlan
from accel_llm.errors import ConfigError
from accel_llm.report.metrics import console
from accel_llm.report.page import write_report
from accel_llm.system.secrecy import hide_secrets


def coloured_row(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> Text:
    """A row as the model reads it: trained tokens green, context grey."""
    text = Text()
    for trained, part in _runs(ids, labels):
        text.append(decode_tokens(tokenizer, part), style="green" if trained else "bright_black")
    return text


def trained_text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> str:
    """The trained tokens of a row alone, decoded."""
    return "".join(decode_tokens(tokenizer, part) for trained, part in _runs(ids, labels) if trained)


def _runs(ids: np.ndarray, labels: np.ndarray) -> list[tuple[bool, list[int]]]:
    """Maximal runs of trained and of context tokens, in order; decoded whole, so that no character is torn."""
    trained = np.asarray(labels) != IGNORED
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    return [(bool(trained[a]), np.asarray(ids[a:b]).tolist()) for a, b in pairwise(borders) if a < b]


def show_settings(options: Options) -> None:
    """Every option in force, those that the person set in bold."""
    table = Table(title="Settings", show_header=False, box=None)
    for name, value in options.model_dump().items():
        style = "bold" if name in options.model_fields_set else "bright_black"
        table.add_row(name, hide_secrets(str(value)), style=style)
    console.print(table)


def show_rows(tokenizer: PreTrainedTokenizerFast, encoded: Rows, count: int) -> None:
    for k in range(min(count, len(encoded))):
        ids, labels = encoded[k]
        share = float((labels != IGNORED).mean())
        console.rule(f"{encoded.name(k)}: {len(ids)} tokens, {share:.0%} trained")
        console.print(coloured_row(tokenizer, ids, labels), soft_wrap=True)
    console.rule()


def show_histogram(title: str, values: np.ndarray, bins: int = 10) -> None:
    """Counts of `values` in equal intervals, as bars."""
    counts, edges = np.histogram(values, bins=bins)
    table = Table(title=title, show_header=False, box=None)
    digits = 0 if edges[-1] > 10 else 2
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        table.add_row(
            f"{low:,.{digits}f} - {high:,.{digits}f}", f"{count:,}", "█" * round(40 * count / max(counts.max(), 1))
        )
    console.print(table)


def describe_plan(encoded: Rows, steps: TrainingPlan, max_length: int) -> str:
    """Steps and tokens of the run, and how full its rows are, in one sentence."""
    tokens = int(encoded.offsets[-1])
    supervised = int((np.asarray(encoded.labels) != IGNORED).sum())
    return (
        f"{len(encoded):,} documents, {tokens:,} tokens ({supervised:,} trained) in {steps.bins:,} rows of at most "
        f"{max_length:,} ({tokens / (steps.bins * max_length):.1%} full); {steps.total_steps:,} steps of "
        f"{steps.rows_per_step:,} rows"
    )


def show_plan(
    accelerator: Accelerator,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerFast,
    data: EncodedData,
    steps: TrainingPlan,
) -> None:
    """The ledger and the plan; with `dry_run` every setting and three rows as well. Main process only."""
    if not accelerator.is_main_process:
        return
    if options.dry_run:
        show_settings(options)
        show_rows(tokenizer, data.train, 3)
    console.print(data.ledger.table())
    console.print(describe_plan(data.train, steps, options.max_length))


def advise(accelerator: Accelerator, sentence: str) -> None:
    if accelerator.is_main_process:
        console.print(sentence, style="yellow")


def show_stop_proof(
    accelerator: Accelerator, encoded: Rows, tokenizer: PreTrainedTokenizerFast, turn_end: int | None, stop: list[int]
) -> None:
    """Say, from the rows themselves, whether the model will learn to stop: the end of turn is trained, and is an eos.

    Counts the documents whose last trained token is the end of turn that generation will stop at.
    """
    if not accelerator.is_main_process:
        return
    if turn_end is None:
        console.print("stop proof: the template closes no turn; answers will not stop by themselves", style="yellow")
        return
    labels = np.asarray(encoded.labels)
    trained = np.flatnonzero(labels != IGNORED)
    before = np.searchsorted(trained, np.asarray(encoded.offsets))  # trained tokens before each border
    last = trained[before[1:][np.diff(before) > 0] - 1]
    ended = int((labels[last] == turn_end).sum())
    token = tokenizer.convert_ids_to_tokens(turn_end)
    assert turn_end in stop
    console.print(
        f"stop proof: {token} is the last trained token of {ended:,} of {len(encoded):,} documents and an eos of the "
        "generation config that will be saved",
        style="green" if ended == len(encoded) else "yellow",
        markup=False,
    )


def show_checks(accelerator: Accelerator, facts: dict[str, Any], options: TrainOptions) -> None:
    """What was in force in the one step of `check_only`; the folder that it was written to is removed."""
    if not accelerator.is_main_process:
        return
    table = Table(title="In force, checked in one step", show_header=False, box=None)
    for name, value in facts.items():
        parts = value.items() if isinstance(value, dict) and name != "deepspeed" else [("", value)]
        for part, shown in parts:
            table.add_row(f"{name} {part}".rstrip(), hide_secrets(json.dumps(shown)))
    console.print(table)
    shutil.rmtree(options.output_dir)


def show_next_commands(accelerator: Accelerator, folder: Path) -> None:
    """The report, and what to type now, ready to copy. `folder` is the export, adapter/ or model/ in the output folder."""
    if not accelerator.is_main_process:
        return
    try:
        write_report(folder.parent)
    except OSError as error:  # the run is done, and giving the same command again would be refused
        console.print(f"report.html could not be written: {error.strerror}; everything else is there.", markup=False)
    lines = {"ask it": f"python launch/chat.py --model {folder.parent}"}
    if folder.name == "adapter":
        lines["merge it"] = f"python launch/merge.py --adapter {folder.parent} --output_dir {folder.parent}-merged"
        lines["load it"] = f'AutoPeftModelForCausalLM.from_pretrained("{folder}")'
    else:
        lines["load it"] = f'AutoModelForCausalLM.from_pretrained("{folder}")'
    for what, command in lines.items():
        console.print(f"{what + ':':10}{command}", soft_wrap=True, markup=False)


def check_by_heart(accelerator: Accelerator, samples: list[dict[str, Any]]) -> None:
    """The verdict of `overfit`: generated answers beside those of the data.

    Raises:
        ConfigError: some answer differs, so data, template or stop token may be at fault (or the run was too short).
    """
    wrong = [answer for answer in samples if answer["generated"] != answer["expected"]]
    if accelerator.is_main_process:
        for answer in samples:
            mark, style = ("≠", "red") if answer in wrong else ("=", "green")
            console.print(f"{mark} {answer['generated']!r}", style=style, markup=False)
    if wrong:
        raise ConfigError(
            f"overfit: {len(wrong)} of {len(samples)} generated answers differ from the data, for one "
            f"{wrong[0]['generated']!r} from {wrong[0]['expected']!r}; raise num_train_epochs or learning_rate, and if "
            "that changes nothing look at the rows with dry_run."
        )
    if accelerator.is_main_process:
        console.print("overfit: all generated answers equal the data, end token included", style="green")
