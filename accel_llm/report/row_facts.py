"""What run.json tells of the rows to train on: a histogram of their lengths, and the text of the first ones."""

from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.labels import Labels, name_targets
from accel_llm.data.rows import Rows
from accel_llm.report.page_html import cut_text

RECORDED_ROWS, HISTOGRAM_BINS = 3, 30
MAX_RUNS, MAX_RUN_LETTERS = 40, 800  # of one text of a row: runs of equal kind, and letters of each

MarkedText = list[tuple[bool, str]]  # runs of trained (True) and of context tokens


def row_facts(tokenizer: PreTrainedTokenizerFast, rows: Rows, labels: Labels | None = None) -> dict[str, Any]:
    """Return the facts of rows, of pairs of answers, or of texts with their `labels`, as JSON values.

    `lengths` are tokens: `edges` [n + 1] and `counts` [n] of a histogram with the rows of `edges[k] <= length <
    edges[k + 1]` in bin k. `shown` has for each row its name and `texts`, by title, as a `MarkedText`.
    """
    units = as_units(rows)
    lengths = np.asarray(units.lengths)
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high + 1 - low) // HISTOGRAM_BINS))  # whole tokens, so that no bin has more lengths than another
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return {
        "unit": "pair" if isinstance(units, Pairs) else "text" if labels else "row",
        "count": len(units),
        "lengths": {
            "shortest": low,
            "median": round(float(np.median(lengths))),
            "longest": high,
            "edges": edges.tolist(),
            "counts": counts.tolist(),
        },
        "shown": [_describe_unit(tokenizer, units, k, labels) for k in range(min(RECORDED_ROWS, len(units)))],
    }


def _describe_unit(
    tokenizer: PreTrainedTokenizerFast, units: Rows | Pairs, k: int, labels: Labels | None
) -> dict[str, Any]:
    name = f"{units.name(k)}: {int(units.lengths[k]):,} tokens"
    if isinstance(units, Pairs):
        rows = units.rows
        assert rows.shared is not None
        shared, (ids, marks) = int(rows.shared[2 * k]), rows[2 * k]
        texts = {"prompt": mark_text(tokenizer, ids[:shared], marks[:shared])}
        for side, row in (("chosen", 2 * k), ("rejected", 2 * k + 1)):
            ids, marks = rows[row]
            texts[side] = mark_text(tokenizer, ids[shared:], marks[shared:])
        return {"name": name, "texts": texts}
    ids, marks = units[k]
    title = "" if units.label is None else "desirable" if units.label[k] else "undesirable"
    if labels is not None and units.targets is not None:
        title = f"label {name_targets(units.targets[k], labels)}"
    return {"name": name, "texts": {title: mark_text(tokenizer, ids, marks)}}


def mark_text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, labels: np.ndarray) -> MarkedText:
    """Return a row's text in runs of trained and of context tokens; long runs are cut in their middle.

    A run is decoded as a whole, because several tokens can make up one character.
    """
    trained = np.asarray(labels) != IGNORED
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    runs = [(a, b) for a, b in pairwise(borders) if a < b]
    marked = [
        (bool(trained[a]), cut_text(decode_tokens(tokenizer, np.asarray(ids[a:b]).tolist()), MAX_RUN_LETTERS))
        for a, b in runs[:MAX_RUNS]
    ]
    return marked + ([(False, f" [… {len(runs) - MAX_RUNS:,} more parts …]")] if len(runs) > MAX_RUNS else [])
