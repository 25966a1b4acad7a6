"""Which class a classifier takes for which, as plain text of at most 80 columns."""

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from accel_llm.chat.values import make_printable
from accel_llm.report.record import Record
from accel_llm.system.progress import console

MAX_TABLE_CLASSES, MAX_PAIRS = 12, 15
_WIDTH, _CORNER = 80, "true \\ taken for"


def show_confusion(record: Record) -> None:
    """Print the confusion matrix of the last evaluation, if `record` has one."""
    confusions: dict[str, Any] | None = record.facts.get("confusion_matrix")
    if confusions:
        right, rows = confusions["right"], confusions["rows"]
        best, last = record.facts.get("exported_step"), record.facts.get("last_step")
        exported = f" (exported are the weights of step {best:,})" if best != last else ""
        title = f"Classes at the last evaluation, right for {right:,} of {rows:,} texts{exported}:"
        text = confusion_text(confusions["counts"], confusions["names"])
        console.print(f"{title}\n{text}", markup=False, emoji=False, soft_wrap=True)


def confusion_text(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return `counts` [true class, predicted class] as a table, or as lines of the most confused pairs.

    Pairs stand for more than 12 classes, and where a table would be too wide. Long names are shortened.
    """
    names = [make_printable(" ".join(name.split())) for name in names]
    table = _table_lines(counts, names) if len(names) <= MAX_TABLE_CLASSES else []
    return "\n".join(table or _pair_lines(counts, names))


def _table_lines(counts: Sequence[Sequence[int]], names: list[str]) -> list[str]:
    """Return the lines of a table, or none if it does not fit. Its columns have names or, if these are long, numbers."""
    cells = [[f"{count:,}" for count in row] for row in counts]
    numbers = [str(k) for k in range(1, len(names) + 1)]
    numbered = [f"{number} {name}" for number, name in zip(numbers, names, strict=True)]
    for headings, labels in ((names, names), (numbers, numbered)):
        columns = zip(headings, *cells, strict=True)
        widths = [2 + max(map(cell_len, column)) for column in columns]
        room = min(_WIDTH - sum(widths), max(map(cell_len, [_CORNER, *labels])))
        if room < len(_CORNER):
            continue
        lines = zip([_CORNER, *labels], [headings, *cells], strict=True)
        return [
            set_cell_size(_shorten(label, room), room)
            + "".join(" " * (width - cell_len(cell)) + cell for cell, width in zip(row, widths, strict=True))
            for label, row in lines
        ]
    return []


def _pair_lines(counts: Sequence[Sequence[int]], names: list[str]) -> list[str]:
    """Return a line for each pair of different classes, those with the most texts first, and not all of many."""
    pairs = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j]
    pairs.sort(key=lambda pair: (-pair[0], *pair[1:]))
    room = (_WIDTH - len("true  taken for : 1,000,000")) // 2
    short = [_shorten(name, room) for name in names]
    lines = [f"true {short[i]} taken for {short[j]}: {count:,}" for count, i, j in pairs[:MAX_PAIRS]]
    if len(pairs) > MAX_PAIRS:
        lines.append(f"and {len(pairs) - MAX_PAIRS:,} more pairs, each with at most {pairs[MAX_PAIRS][0]:,}")
    return lines or ["no text was taken for another class"]


def _shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` columns of the screen; three dots stand for the rest."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 3).rstrip() + "..."
