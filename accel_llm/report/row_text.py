"""Rows as a person reads them: what is trained of them and what is context, in colors or, without colors, in brackets."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.labels import Labels, name_targets
from accel_llm.data.rows import Rows
from accel_llm.data.samples import Sample
from accel_llm.report.ledger_text import one_line
from accel_llm.system.progress import console

TRAINED_MARKS = ("[[", "]]")
_RAW_CHARACTERS = 400  # of a bad row


def color_row(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> Text:
    """Return a row as the model reads it, with trained tokens in green and context in gray."""
    text = Text()
    for trained, part in _runs(ids, labels):
        text.append(decode_tokens(tokenizer, part), style="green" if trained else "bright_black")
    return text


def marked_row(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> str:
    """Return a row as the model reads it, with trained tokens in TRAINED_MARKS; see `mark_runs`."""
    return mark_runs([(trained, decode_tokens(tokenizer, part)) for trained, part in _runs(ids, labels)])


def mark_runs(runs: Sequence[tuple[bool, str]]) -> str:
    """Join texts of trained tokens (True), in `[[` and `]]`, and of context.

    Two brackets of the same kind that stand together are always a mark: between those of the texts themselves a
    backslash is put, `[\\[` for `[[`, and one more where there are some already.
    """
    parts = []
    for k, (trained, text) in enumerate(runs):
        text = re.sub(r"([\[\]])(\\*)(?=\1)", r"\1\2\\", text)
        # The last bracket of a text must not form a mark with the one that follows.
        follows = TRAINED_MARKS[1] if trained else TRAINED_MARKS[0] if k + 1 < len(runs) else ""
        if follows and re.search(rf"{re.escape(follows[0])}\\*\Z", text):
            text += "\\"
        parts.append(f"{TRAINED_MARKS[0]}{text}{TRAINED_MARKS[1]}" if trained else text)
    return "".join(parts)


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


def show_rows(tokenizer: PreTrainedTokenizerFast, rows: Rows, count: int, labels: Labels | None = None) -> None:
    """Print the first `count` rows, or pairs of answers, with what is trained marked; of texts their `labels`."""
    show_legend(labels)
    units = as_units(rows)
    for k in range(min(count, len(units))):
        _show_unit(tokenizer, units, k, labels)
    console.rule()


def show_samples(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> None:
    """Print rows as `show_rows` does, and those that are bad or left out with the reasons, in red, and what they hold."""
    show_legend(samples[0].labels if samples else None)
    for sample in samples:
        units = as_units(sample.rows)
        for k in range(len(units)):
            _show_unit(tokenizer, units, k, sample.labels)
        if sample.problems or not len(units):
            _show_heading(f"{sample.name}: {'bad' if sample.problems else 'not trained'}", "red")
        for reason in (*sample.problems, *sample.losses):
            console.print(Text(one_line(reason), style="red"), soft_wrap=True)
        if sample.problems or not len(units):
            raw = one_line(json.dumps(sample.raw.fields, ensure_ascii=False, default=str))
            more = f" ... ({len(raw):,} characters)" if len(raw) > _RAW_CHARACTERS else ""
            console.print(Text(f"the row: {raw[:_RAW_CHARACTERS]}{more}"), soft_wrap=True)
    console.rule()


def show_legend(labels: Labels | None = None) -> None:
    """Say what the colors of a row mean, or the brackets that stand in their place. Of texts with labels none are trained."""
    if labels is not None:
        console.print("All of a text is read; what is trained is its label.")
    elif _has_colors():
        parts = [("green", "green"), ": trained, ", ("gray", "bright_black"), ": context, ", ("red", "red")]
        console.print(Text.assemble(*parts, ": bad or left out"))
    else:
        console.print(
            Text(r"[[...]]: trained, all else: context; where a text itself has [[ or ]], it is written [\[ or ]\]"),
            soft_wrap=True,
        )


def _has_colors() -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _show_unit(tokenizer: PreTrainedTokenizerFast, units: Rows | Pairs, k: int, labels: Labels | None = None) -> None:
    """Print one row, or one pair of answers."""
    name = one_line(units.name(k))
    if isinstance(units, Pairs):
        _show_pair(tokenizer, units, k, name)
        return
    ids, token_labels = units[k]
    trained = f"{float((token_labels != IGNORED).mean()):.0%} trained"
    if labels is not None and units.targets is not None:
        trained = f"label {one_line(name_targets(units.targets[k], labels))}"
    _show_heading(f"{name}: {len(ids)} tokens, {trained}")
    verdict = "" if units.label is None else "desirable: " if units.label[k] else "undesirable: "
    _print_tokens(tokenizer, ids, token_labels, verdict, plain=labels is not None)


def _show_pair(tokenizer: PreTrainedTokenizerFast, pairs: Pairs, k: int, name: str) -> None:
    """Print the prompt of pair k once, then what each side has after it."""
    rows = pairs.rows
    assert rows.shared is not None and rows.margin is not None
    shared, margin = int(rows.shared[2 * k]), float(rows.margin[2 * k])
    better = f", chosen is better by {margin:g}" if margin else ""
    _show_heading(f"{name}: a pair of {pairs.lengths[k]} tokens, {shared} in the prompt{better}")
    prompt_ids, prompt_labels = (part[:shared] for part in rows[2 * k])
    _print_tokens(tokenizer, prompt_ids, prompt_labels)
    for side, row in (("chosen", 2 * k), ("rejected", 2 * k + 1)):
        ids, labels = (part[shared:] for part in rows[row])
        _print_tokens(tokenizer, ids, labels, f"{side}: ")


def _show_heading(title: str, style: str = "") -> None:
    """Print a line with a title in it; a title that is too long for that stands below the line, and is never cut."""
    if cell_len(title) + 4 <= console.width:
        console.rule(Text(title, style=style))
    else:
        console.rule()
        console.print(Text(title, style=style), soft_wrap=True)


def _print_tokens(
    tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray, before: str = "", plain: bool = False
) -> None:
    """Print what a row or a part of it reads, after a word in bold; with `plain` nothing is marked in it."""
    if plain:
        text = Text(decode_tokens(tokenizer, ids))
    else:
        text = color_row(tokenizer, ids, labels) if _has_colors() else Text(marked_row(tokenizer, ids, labels))
    console.print(Text(before, style="bold"), text, sep="", soft_wrap=True)


def show_numbers(rows: Rows) -> None:
    """Print how long rows are, and how much of them is trained."""
    units = as_units(rows)
    show_histogram("Tokens a row" if units is rows else "Tokens a pair, its prompt once", units.lengths)
    if rows.targets is None:  # of texts with labels no token is trained
        show_histogram("Share of a row that is trained", trained_shares(rows))


def trained_shares(rows: Rows) -> np.ndarray:
    """The share of trained tokens in each row: float64 [rows]."""
    if rows.labels is None:
        return 1 - 1 / rows.lengths
    trained = (np.asarray(rows.labels) != IGNORED).astype(np.int64)
    return np.add.reduceat(trained, rows.offsets[:-1]) / rows.lengths


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
