"""What a run prints for people before and after training: settings, colored rows, ledger, plan, the next commands."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.data.rows import Rows
from accel_llm.errors import ConfigError
from accel_llm.report.card import classifies, write_run_card
from accel_llm.report.confusion import show_confusion
from accel_llm.report.ledger_text import ledger_headings, ledger_lines, one_line
from accel_llm.report.page import read_metrics, write_report
from accel_llm.report.record import Record
from accel_llm.report.summary import next_commands, print_line, show_answers, summary_lines
from accel_llm.report.trackers import describe_error
from accel_llm.system.progress import console

_UNLIMITED = 1 << 20  # characters of a line
_ANSWERS_AT_THE_END = 3


def show_ledger(ledger: Ledger, screen: Console | None = None) -> None:
    """Print the ledger on `screen` (standard output by default): a line for each bin of a source, lost ones in red.

    Everything that `ledger_lines` says stands below the table. Nothing is cut off; and where the output is no terminal,
    because it goes into a file or another program, no line is wrapped.
    """
    screen = screen or console
    if ledger.inputs:
        _print_table(_ledger_table(ledger), screen)
    for line in ledger_lines(ledger):
        screen.print(line, soft_wrap=True, markup=False, emoji=False)


def _print_table(table: Table, screen: Console) -> None:
    if screen.is_terminal:
        screen.print(table)
    else:
        # As wide as the table, for rich prints nothing wider than its screen.
        width = screen.measure(table, options=screen.options.update(width=_UNLIMITED)).maximum
        Console(file=screen.file, width=width, highlight=False).print(table)


def _ledger_table(ledger: Ledger) -> Table:
    table = Table(title="Ledger")
    table.add_column("Source", overflow="fold")
    table.add_column("Bin", overflow="fold")
    headings = ledger_headings(ledger)
    for quantity, heading in headings.items():
        # A number, and each word of a heading, is whole however narrow the screen is.
        amounts = [f"{total[quantity]:,}" for total in ledger.inputs.values()]
        table.add_column(heading, justify="right", min_width=max(map(len, [*heading.split(), *amounts])))

    for source, total in ledger.inputs.items():
        table.add_row(Text(one_line(source)), "read", *_format_amount(total, headings), style="bold")
        bins = sorted(ledger.bins.get(source, {}).items(), key=lambda item: (is_lost(item[0]), item[0]))
        for bin, amount in bins:
            row_style = "red" if is_lost(bin) else None
            table.add_row("", Text(one_line(bin)), *_format_amount(amount, headings), style=row_style)
    return table


def _format_amount(amount: Counter[str], quantities: Iterable[str]) -> list[str]:
    return [f"{amount[quantity]:,}" for quantity in quantities]


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
    assert rows.labels is not None  # as of every chat
    labels = rows.labels
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
