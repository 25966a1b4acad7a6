"""The frame of a page and the pieces of its HTML: everything from a run is escaped, and cut where it is very long."""

import html
import json
import math
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from accel_llm.errors import ConfigError
from accel_llm.system.disk import write_atomically

GENERATOR = '<meta name="generator" content="accel-llm">'  # tells a page of ours from another file
UPLOT_VERSION = "1.6.32"
MAX_VALUE_LETTERS = 2_000  # of one value in a table
MAX_TABLE_BYTES = 100_000  # of the rows of one table


def page_document(title: str, body: str, charts: dict[str, Any]) -> str:
    """Return a whole page. `title` is plain text, `body` is HTML, `charts` is what page.js draws.

    The page needs no network, and its Content-Security-Policy lets only its own two scripts run, by their hashes: even
    if a text of a run became markup, no script in it would run.
    """
    style = _read_asset("uplot/uPlot.min.css") + _read_asset("page.css")
    scripts = [_read_asset("uplot/uPlot.iife.min.js"), _read_asset("page.js")]
    allowed = " ".join(map(_hash_source, scripts))
    policy = f"default-src 'none'; script-src {allowed}; style-src {_hash_source(style)}; "
    policy += "base-uri 'none'; form-action 'none'"
    # In a script element only "<" could end it.
    data = json.dumps(charts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    programs = "".join(f"<script>{script}</script>\n" for script in scripts)
    licence = f"<pre>\n{escape_html(_read_asset('uplot/LICENSE'))}</pre>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape_html(title)}</title>{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{style}</style></head><body>
{body}<footer>{folded(f"Curves by uPlot {UPLOT_VERSION}, under this licence", licence)}</footer>
<script type="application/json" id="charts">{data}</script>
{programs}</body></html>
"""


def save_page(path: Path, page: str) -> None:
    """Write a page to a file that the user has named.

    Raises:
        ConfigError: something else than a page of this project is there, or the file cannot be written.
    """
    try:
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                if GENERATOR not in file.read(2_000):
                    raise ConfigError(f"output_file: {path} is no page of this project; name another file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise ConfigError(f"output_file: {path} cannot be written ({error.strerror}); name another file.") from None


@cache
def _read_asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash_source(text: str) -> str:
    """Return the term of a Content-Security-Policy that allows an inline script or style with this text."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def escape_html(value: object) -> str:
    """Escape a text for HTML. Half a surrogate pair, which JSON can hold but UTF-8 cannot, becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def cut_text(text: str, letters: int) -> str:
    """Return `text` with at most so many letters, of both ends, and what was left out between them."""
    left_out = len(text) - letters
    if left_out <= 0:
        return text
    return f"{text[: letters - letters // 3]} [… {left_out:,} letters …] {text[len(text) - letters // 3 :]}"


def join_within(pieces: Iterable[str], max_bytes: int, name: str) -> tuple[str, str]:
    """Join pieces of HTML while they have room in `max_bytes`; return them, and a sentence on those left out, if any.

    `name` is what a piece is, such as "rows".
    """
    taken, size, left_out = [], 0, 0
    for piece in pieces:
        size += len(piece.encode())
        if size > max_bytes:
            left_out += 1
        else:
            taken.append(piece)
    return "".join(taken), f"<p>{left_out:,} more {name} are left out here.</p>" if left_out else ""


def format_number(value: float, digits: int = 4) -> str:
    """Return a number for people, with so many significant digits: 0.01234, 12.35, 12,346."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e7 else f"{value:,.{digits}g}"


def folded(summary: str, content: str) -> str:
    """Return HTML that shows `summary`, a plain text, and `content`, which is HTML, after a click."""
    return f"<details><summary>{escape_html(summary)}</summary>{content}</details>"


def preformatted(text: str, look: str = "") -> str:
    """Return a text with its line breaks. A browser drops a line break right after <pre>, so one is added."""
    return f"<pre{f' class={chr(34)}{look}{chr(34)}' if look else ''}>\n{escape_html(text)}</pre>"


def pairs_table(values: dict[str, Any]) -> str:
    """Return a table of names and values, with dicts folded and long values cut."""
    rows = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        cell = escape_html(cut_text(text, MAX_VALUE_LETTERS))
        if isinstance(value, dict) and value:
            cell = folded(f"{len(value)} values", f"<pre>\n{cell}</pre>")
        rows.append(f'<tr><th scope="row">{escape_html(cut_text(str(name), 200))}</th><td>{cell}</td></tr>')
    if not rows:
        return "<p>Nothing was recorded.</p>"
    joined, left_out = join_within(rows, MAX_TABLE_BYTES, "lines")
    return f'<div class="scroll"><table class="pairs">{joined}</table></div>{left_out}'


def plain_table(headings: list[str], rows: list[list[str]], look: str = "") -> str:
    """Return a table of plain texts, each escaped and cut; `look` is its class."""
    head = "".join(f'<th scope="col">{escape_html(cut_text(name, 200))}</th>' for name in headings)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape_html(cut_text(cell, MAX_VALUE_LETTERS))}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    joined, left_out = join_within(lines, MAX_TABLE_BYTES, "lines")
    return f'<div class="scroll"><table class="{look}"><tr>{head}</tr>{joined}</table></div>{left_out}'
