"""Rows as objects for JSON: ids, labels and texts, and what else rows of each kind have."""

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerFast

from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.data.labels import Labels, name_targets
from accel_llm.data.rows import Rows
from accel_llm.data.samples import Sample
from accel_llm.report.row_text import trained_text


def row_objects(
    tokenizer: PreTrainedTokenizerFast, rows: Rows, labels: Labels | None = None, pairs_before: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield each row with its origin, ids, labels and texts, and with what else the rows have: weights, label, or its pair.

    The two answers of a pair follow each other; `shared_tokens` are the tokens with which both begin. `labels` are those
    of texts, `pairs_before` is the number of the first pair.
    """
    for k in range(len(rows)):
        ids, token_labels = rows[k]
        row = {
            "file": rows.origins[rows.origin[k]].file,
            "row": int(rows.number[k]),
            "input_ids": ids.tolist(),
            "labels": token_labels.tolist(),
            "text": decode_tokens(tokenizer, ids.tolist()),
            "trained_text": trained_text(tokenizer, ids, token_labels),
        }
        if weights := rows.label_weights([k]):
            row["weights"] = weights[0].tolist()
        if rows.label is not None:
            row["label"] = bool(rows.label[k])
        if rows.targets is not None and labels is not None:
            row["label"] = name_targets(rows.targets[k], labels)
        if rows.shared is not None and rows.margin is not None:
            row |= {"pair": pairs_before + k // 2, "side": ("chosen", "rejected")[k % 2]}
            row |= {"shared_tokens": int(rows.shared[k]), "margin": float(rows.margin[k])}
        yield row


def sample_objects(tokenizer: PreTrainedTokenizerFast, samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """Yield what is trained of each sample, as `row_objects` does, and for a row that is bad or left out its `problem`."""
    pairs = 0
    for sample in samples:
        yield from row_objects(tokenizer, sample.rows, sample.labels, pairs)
        pairs += len(sample.rows) // 2 if sample.rows.shared is not None else 0
        if sample.problems or not len(sample.rows):
            problem = "; ".join([*sample.problems, *sample.losses])
            yield {"file": sample.raw.file, "row": sample.raw.number, "problem": problem}
