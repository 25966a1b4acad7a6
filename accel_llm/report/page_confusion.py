"""The confusion matrix of a classifier as a picture."""

from typing import Any

from rich.cells import cell_len

from accel_llm.report.page_html import cut_text, escape_html, format_number

# Side of a cell in pixels, if counts are written in it and if not; names have at most so many letters.
CELL, SMALL_CELL, MAX_CELLS_WITH_COUNTS, NAME_LETTERS = 46, 18, 12, 24
TITLE_LETTERS = 60  # of a name under the pointer
MAX_TITLE_BYTES = 300_000  # of the texts under the pointer of all cells; more of them are left out


def draw_confusions(confusions: dict[str, Any]) -> str:
    """Draw a table of the classes; a cell is the stronger the larger its share of the texts of its true class."""
    names, counts = confusions["names"], confusions["counts"]
    cell = CELL if len(names) <= MAX_CELLS_WITH_COUNTS else SMALL_CELL
    short = [name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…" for name in names]
    letters = max(map(cell_len, short))
    left, slope = 12 + 7 * letters, 8 + 5 * letters  # room for the names, those of columns at 45 degrees
    side = cell * len(names)
    pointed, room = [escape_html(cut_text(name, TITLE_LETTERS)) for name in names], MAX_TITLE_BYTES

    marks = []
    for k, name in enumerate(short):
        middle = cell * k + cell / 2
        x, y = left + middle, slope - 4
        marks.append(f'<text x="{left - 6}" y="{slope + middle + 4:.0f}" text-anchor="end">{escape_html(name)}</text>')
        marks.append(f'<text x="{x:.0f}" y="{y}" transform="rotate(-45 {x:.0f} {y})">{escape_html(name)}</text>')
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            x, y, look = left + cell * j, slope + cell * i, "right" if i == j else "wrong"
            # Up to 0.6 the text on it can be read, in light and dark.
            shade = 0.06 + 0.54 * count / sum(row) if count else 0
            title = f"<title>{pointed[i]} taken for {pointed[j]}: {count:,}</title>"
            room -= len(title.encode())
            title = title if room >= 0 else ""
            place = f'x="{x}" y="{y}" width="{cell}" height="{cell}"'
            marks.append(f'<rect class="{look}" {place} fill-opacity="{shade:.2f}">{title}</rect>')
            if count and cell == CELL:
                x, y = x + cell // 2, y + cell // 2 + 4
                marks.append(f'<text x="{x}" y="{y}" text-anchor="middle">{format_number(count)}</text>')

    right, rows, classes = (confusions[name] for name in ("right", "rows", "classes"))
    caption = f"Rows are the true classes, columns what the model took a text for. Right: {right:,} of {rows:,} texts."
    if classes > len(names):
        caption += f" Of {classes:,} classes these are the {len(names)} that are most often confused."
    width, height = left + side + slope, slope + side + 4
    svg = f'<svg width="{width}" height="{height}" role="img" aria-label="Confusion matrix">{"".join(marks)}</svg>'
    return f'<figure class="box"><figcaption>{caption}</figcaption><div class="scroll">{svg}</div></figure>'
