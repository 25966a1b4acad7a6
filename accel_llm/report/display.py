"""What a run prints for people before and after training: settings, colored rows, ledger, plan, the next commands."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import SCHEDULES_BY_OPTION, Options, TrainOptions, count_warmup_steps
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.labels import Labels, name_targets
from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.data.prepare import EncodedData
from accel_llm.data.rows import Rows
from accel_llm.data.stream import TrainingPlan, padding_share
from accel_llm.errors import ConfigError
from accel_llm.report.card import classifies, write_run_card
from accel_llm.report.confusion import show_confusion
from accel_llm.report.ledger_text import ledger_headings, ledger_lines, one_line
from accel_llm.report.page import read_metrics, write_report
from accel_llm.report.record import Record
from accel_llm.report.summary import next_commands, print_line, show_answers, summary_lines
from accel_llm.report.trackers import describe_error
from accel_llm.system.progress import console
from accel_llm.system.secrecy import hide_secrets

_UNLIMITED = 1 << 20  # characters of a line
_ANSWERS_AT_THE_END = 3


def color_row(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> Text:
    """Return a row as the model reads it, with trained tokens in green and context in gray."""
    text = Text()
    for trained, part in _runs(ids, labels):
        text.append(decode_tokens(tokenizer, part), style="green" if trained else "bright_black")
    return text


def trained_text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> str:
    """Return the decoded trained tokens of a row."""
    return "".join(decode_tokens(tokenizer, part) for trained, part in _runs(ids, labels) if trained)


def _runs(ids: np.ndarray, labels: np.ndarray) -> list[tuple[bool, list[int]]]:
    """Split a row into runs of trained (True) and of context tokens, in order, each as long as possible.

    A run is decoded as a whole, because several tokens can make up one character.
    """
    trained = np.asarray(labels) != IGNORED
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    return [(bool(trained[a]), np.asarray(ids[a:b]).tolist()) for a, b in pairwise(borders) if a < b]


def show_settings(options: Options) -> None:
    """Print all options, with those in bold that the person has set."""
    table = Table(title="Settings", show_header=False, box=None)
    for name, value in options.model_dump().items():
        style = "bold" if name in options.model_fields_set else "bright_black"
        table.add_row(name, Text(one_line(hide_secrets(str(value)))), style=style)
    console.print(table)


def show_ledger(ledger: Ledger, screen: Console | None = None) -> None:
    """Print the ledger on `screen` (standard output by default): a line for each bin of a source, lost ones in red.

    Everything that `ledger_lines` says stands below the table. Nothing is cut off; and where the output is no terminal,
    because it goes into a file or another program, no line is wrapped.
    """
    screen = screen or console
    table = _ledger_table(ledger)
    if screen.is_terminal:
        screen.print(table)
    else:
        # As wide as the table, for rich prints nothing wider than its screen.
        width = screen.measure(table, options=screen.options.update(width=_UNLIMITED)).maximum
        Console(file=screen.file, width=width, highlight=False).print(table)
    for line in ledger_lines(ledger):
        screen.print(line, soft_wrap=True, markup=False, emoji=False)


def _ledger_table(ledger: Ledger) -> Table:
    table = Table(title="Ledger")
    table.add_column("Source", overflow="fold")
    table.add_column("Bin", overflow="fold")
    headings = ledger_headings(ledger)
    for heading in headings.values():
        table.add_column(heading, justify="right")

    for source, total in ledger.inputs.items():
        table.add_row(Text(one_line(source)), "read", *_format_amount(total, headings), style="bold")
        bins = sorted(ledger.bins.get(source, {}).items(), key=lambda item: (is_lost(item[0]), item[0]))
        for bin, amount in bins:
            row_style = "red" if is_lost(bin) else None
            table.add_row("", Text(one_line(bin)), *_format_amount(amount, headings), style=row_style)
    return table


def _format_amount(amount: Counter[str], quantities: Iterable[str]) -> list[str]:
    return [f"{amount[quantity]:,}" for quantity in quantities]


def show_rows(tokenizer: PreTrainedTokenizerFast, rows: Rows, count: int, labels: Labels | None = None) -> None:
    """Print the first `count` rows, or pairs of answers, with trained tokens in green; of texts their `labels`."""
    units = as_units(rows)
    for k in range(min(count, len(units))):
        name = escape(one_line(units.name(k)))
        if isinstance(units, Pairs):
            _show_pair(tokenizer, units, k, name)
            continue
        ids, token_labels = rows[k]
        trained = f"{float((token_labels != IGNORED).mean()):.0%} trained"
        if labels is not None and rows.targets is not None:
            trained = f"label {escape(one_line(name_targets(rows.targets[k], labels)))}"
        console.rule(f"{name}: {len(ids)} tokens, {trained}")
        verdict = "" if rows.label is None else "desirable: " if rows.label[k] else "undesirable: "
        console.print(Text(verdict, style="bold"), color_row(tokenizer, ids, token_labels), sep="", soft_wrap=True)
    console.rule()


def _show_pair(tokenizer: PreTrainedTokenizerFast, pairs: Pairs, k: int, name: str) -> None:
    """Print the prompt of pair k once, then what each side has after it."""
    rows = pairs.rows
    assert rows.shared is not None and rows.margin is not None
    shared, margin = int(rows.shared[2 * k]), float(rows.margin[2 * k])
    better = f", chosen is better by {margin:g}" if margin else ""
    console.rule(f"{name}: a pair of {pairs.lengths[k]} tokens, {shared} in the prompt{better}")
    console.print(color_row(tokenizer, *(part[:shared] for part in rows[2 * k])), soft_wrap=True)
    for side, row in (("chosen", 2 * k), ("rejected", 2 * k + 1)):
        text = color_row(tokenizer, *(part[shared:] for part in rows[row]))
        console.print(Text(f"{side}: ", style="bold"), text, sep="", soft_wrap=True)


def show_histogram(title: str, values: np.ndarray, bins: int = 10) -> None:
    """Print the counts of `values` in equal intervals, as bars."""
    counts, edges = np.histogram(values, bins=bins)
    table = Table(title=title, show_header=False, box=None)
    digits = 0 if edges[-1] > 10 else 2
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        table.add_row(
            f"{low:,.{digits}f} - {high:,.{digits}f}", f"{count:,}", "█" * round(40 * count / max(counts.max(), 1))
        )
    console.print(table)


def describe_plan(rows: Rows, plan: TrainingPlan, options: TrainOptions) -> str:
    """Describe documents, tokens and steps of the run, and how full its packed rows are, in one sentence.

    If rows are not packed, it says how much padding they get instead. Virtual tokens of each document take their room in
    the rows. Without them a prompt that two answers share in a packed row counts once.
    """
    virtual, max_length = options.virtual_tokens, options.max_length
    tokens, units = int(rows.offsets[-1]), f"{len(rows):,} documents"
    supervised = f" ({int((np.asarray(rows.labels) != IGNORED).sum()):,} trained)"
    if rows.shared is not None:
        units = f"{len(rows) // 2:,} pairs"
        tokens -= 0 if virtual or not options.packing else int(rows.shared[::2].sum())
    elif rows.targets is not None:
        units, supervised = f"{len(rows):,} texts", ""
    fill = f"{(tokens + virtual * len(rows)) / (plan.bins * max_length):.1%} full"
    if not options.packing:
        share = padding_share(rows, options, plan.rows_per_step)
        fill = f"padding: {share:.1%} of the tokens that are computed"
    beside = f" beside {virtual:,} virtual ones each" if virtual else ""
    return (
        f"{units}, {tokens:,} tokens{supervised}{beside} in {plan.bins:,} rows of at most "
        f"{max_length:,} ({fill}); {plan.total_steps:,} steps of "
        f"{plan.rows_per_step:,} rows"
    )


def plan_warnings(options: TrainOptions, plan: TrainingPlan) -> list[str]:
    """Return a sentence for each way in which so short a run differs from what its options say."""
    warnings = []
    # A step that is larger than an epoch.
    rows, bins = plan.rows_per_step, plan.bins
    if bins < rows and (plan.total_rows is None or bins < plan.total_rows):
        warnings.append(
            f"total_batch_size: a step takes {rows:,} rows, but an epoch has {bins:,}; each row is trained "
            f"{rows / bins:.3g} times in a step on average."
        )
    elif bins < rows:
        warnings.append(
            f"total_batch_size: a step takes {rows:,} rows, but the run has {plan.total_rows:,}; its only step has fewer."
        )

    # Too few evaluations to stop early: the first one is always a new best, and the last one comes after the last step.
    patience, evaluations = (
        options.early_stopping_patience,
        (plan.total_steps - 1) // (options.eval_steps or plan.total_steps),
    )
    if patience and evaluations <= patience and not options.check_only:
        warnings.append(
            f"early_stopping_patience: the run has {evaluations:,} evaluations before its last step, too few for "
            f"{patience:,} in a row after a best one; it never stops early."
        )

    # A warmup without a peak, or one that reaches into the decay.
    total, warmup = plan.total_steps, count_warmup_steps(options.warmup_steps, plan.total_steps)
    if options.lr_scheduler_type not in SCHEDULES_BY_OPTION["warmup_steps"] or options.check_only:
        return warnings
    decay = math.ceil(options.decay_share * total)
    if warmup >= total:
        warnings.append(
            f"warmup_steps: the warmup lasts to step {warmup:,}, and the run to step {total:,}; the learning rate "
            f"reaches {total / (warmup + 1):.1%} of its peak, at the last step."
        )
    elif options.lr_scheduler_type == "warmup_stable_decay" and warmup + decay > total:
        warnings.append(
            f"decay_share: after {warmup:,} of {total:,} steps of warmup the decay has {total - warmup:,} steps instead "
            f"of {decay:,}, and the learning rate is never stable."
        )
    return warnings


def show_plan(
    accelerator: Accelerator,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerFast,
    data: EncodedData,
    plan: TrainingPlan,
) -> None:
    """Print the ledger, the plan and its warnings on the main process; with `dry_run` all settings and three rows too."""
    if not accelerator.is_main_process:
        return
    if options.dry_run:
        show_settings(options)
        show_rows(tokenizer, data.train, 3, data.labels)
    show_ledger(data.ledger)
    console.print(describe_plan(data.train, plan, options))
    for sentence in plan_warnings(options, plan):
        console.print(sentence, style="yellow", soft_wrap=True)


def advise(accelerator: Accelerator, sentence: str) -> None:
    """Print advice in yellow, on the main process."""
    if accelerator.is_main_process:
        console.print(sentence, style="yellow")


def show_stop_token_check(
    accelerator: Accelerator, rows: Rows, tokenizer: PreTrainedTokenizerFast, turn_end: int | None, stop: list[int]
) -> None:
    """Print whether the model will learn to stop, on the main process.

    It counts the documents whose last trained token is `turn_end`, the id of the end-of-turn token. `stop` are the ids
    at which generation will stop.
    """
    if not accelerator.is_main_process:
        return
    if turn_end is None:
        console.print("stop token: the template closes no turn; answers will not stop by themselves", style="yellow")
        return

    # The last trained position of each document that has any.
    labels = np.asarray(rows.labels)
    trained = np.flatnonzero(labels != IGNORED)
    before = np.searchsorted(trained, np.asarray(rows.offsets))  # trained tokens before each border of documents
    last = trained[before[1:][np.diff(before) > 0] - 1]

    ended = int((labels[last] == turn_end).sum())
    token = tokenizer.convert_ids_to_tokens(turn_end)
    assert turn_end in stop
    console.print(
        f"stop token: {token} is the last trained token of {ended:,} of {len(rows):,} documents; generation stops at "
        f"{', '.join(map(str, tokenizer.convert_ids_to_tokens(stop)))}, as the generation config that will be saved says",
        style="green" if ended == len(rows) else "yellow",
        markup=False,
    )


def show_score_place(accelerator: Accelerator, rows: Rows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print at which token answers get their score, on the main process: the last one that the template writes."""
    if not accelerator.is_main_process:
        return
    last = Counter(np.asarray(rows.input_ids)[np.asarray(rows.offsets)[1:] - 1].tolist())
    (token, count), *others = last.most_common()
    console.print(
        f"score: at the last token of what the template writes, {decode_tokens(tokenizer, [token])!r} in {count:,} of "
        f"{len(rows):,} answers",
        style="yellow" if others else "green",
        markup=False,
    )


def show_checks(accelerator: Accelerator, facts: dict[str, Any], options: TrainOptions) -> None:
    """Print the settings in force in the one step of `check_only`, and remove its folder. Main process only."""
    if not accelerator.is_main_process:
        return
    table = Table(title="In force, checked in one step", show_header=False, box=None)
    for name, value in facts.items():
        parts = value.items() if isinstance(value, dict) and name != "deepspeed" else [("", value)]
        for part, part_value in parts:
            table.add_row(f"{name} {part}".rstrip(), hide_secrets(json.dumps(part_value)))
    console.print(table)
    shutil.rmtree(options.output_dir)


def show_end(accelerator: Accelerator, record: Record, folder: Path) -> None:
    """Write report and card; print what came out of the run, and the commands to use the export. Main process only.

    `folder` is the export: adapter/ or model/ in the output folder.
    """
    if not accelerator.is_main_process:
        return
    show_confusion(record)
    run, folder = folder.parent.absolute(), folder.absolute()  # the commands work from anywhere
    for name, write, place in (("report.html", write_report, run), ("README.md", write_run_card, folder)):
        try:
            write(place)
        except Exception as error:
            record.add_problem(f"{name} could not be written ({describe_error(error)}); everything else is there.")
    unit = "texts" if classifies(folder) else "tokens"
    for name, text in summary_lines(read_metrics(run / "metrics.jsonl"), record.facts, unit):
        print_line(name, text)
    show_answers(record.facts.get("samples") or [], _ANSWERS_AT_THE_END)
    if (run / "report.html").is_file():
        print_line("report", str(run / "report.html"))
    for name, command in next_commands(run, folder).items():
        print_line(name, command)


def check_overfit(accelerator: Accelerator, samples: list[dict[str, Any]]) -> None:
    """Compare the generated answers of a run with `overfit` with those of the data, and print them.

    Raises:
        ConfigError: an answer differs. The run was too short, or data, template or stop token are wrong.
    """
    different = [answer for answer in samples if answer["generated"] != answer["expected"]]
    if accelerator.is_main_process:
        for answer in samples:
            mark, style = ("≠", "red") if answer in different else ("=", "green")
            console.print(f"{mark} {answer['generated']!r}", style=style, markup=False)
    if different:
        raise ConfigError(
            f"overfit: {len(different)} of {len(samples)} generated answers differ from the data, for example "
            f"{different[0]['generated']!r} from {different[0]['expected']!r}; raise num_train_epochs or "
            "learning_rate. If that does not help, look at the rows with dry_run."
        )
    if accelerator.is_main_process:
        console.print("overfit: all generated answers equal the data, end token included", style="green")
