"""Loss and metrics of held-out texts with labels. Each text counts once, with any number of processes."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import gather_on_main, value_of_main
from accel_llm.classification.metrics import count_confusions, most_confused_classes, score_metrics
from accel_llm.classification.objective import losses_of_scores
from accel_llm.data.batches import to_device
from accel_llm.data.labels import SINGLE_LABEL, Labels
from accel_llm.data.rows import Rows
from accel_llm.data.stream import evaluation_batches
from accel_llm.data.texts import collate_texts
from accel_llm.model.encoders import text_scores
from accel_llm.model.evaluating import evaluating
from accel_llm.report.record import Record
from accel_llm.training.evaluation import check_stop

MAX_RECORDED_CLASSES = 50  # of a confusion matrix in run.json


class ScoredTexts(NamedTuple):
    """What a model says of some texts: their indices int64 [n], scores float32 or float64 [n, k], losses float64 [n].

    `weights` are the numbers to divide the summed loss by, one for each batch.
    """

    indices: np.ndarray
    scores: np.ndarray
    losses: np.ndarray
    weights: list[float]


def text_metrics(
    labels: Labels | None,
    record: Record,
    accelerator: Accelerator,
    model: Any,
    rows: Rows,
    options: Any,
    pad_token_id: int,
) -> dict[str, float]:
    """Return the mean loss of `rows`, without label smoothing, and the metrics of `score_metrics`, as `eval/` names.

    The main process has the scores of all texts in their order, so that the number of processes changes no bit of a
    number, and sends the numbers to the others. The confusion matrix of single labels goes into `record`, for run.json.
    If a score is not finite, nothing but the loss is left.

    Raises:
        RuntimeError: a text has no scores, or it has them twice.
    """
    assert labels is not None  # as all data of texts with labels has
    own = _score_texts(accelerator, model, rows, options, pad_token_id)
    parts = gather_on_main(accelerator, own)
    return value_of_main(accelerator, _measure(parts, labels, record, rows) if parts else {})


def _score_texts(accelerator: Accelerator, model: Any, rows: Rows, options: Any, pad_token_id: int) -> ScoredTexts:
    """Return the scores of the texts of this process. All processes make the same number of forward passes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    indices: list[int] = []
    scores: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    weights: list[float] = []
    with evaluating(model):
        for batch in evaluation_batches(rows, options, rank, world, pad_token_id, collate_texts):
            check_stop(accelerator)
            batch = to_device(batch, accelerator.device)
            found = text_scores(model, batch)
            scores.append(found[: batch["num_targets"]])
            losses.append(losses_of_scores(found, batch, options))
            indices += batch["row_indices"]
            weights.append(batch["total_weight"])
    # The host waits for the device only here.
    of_texts, losses_of_texts = (torch.cat(values).cpu().numpy() for values in (scores, losses))
    return ScoredTexts(np.array(indices, np.int64), of_texts, losses_of_texts, weights)


def _measure(parts: list[ScoredTexts], labels: Labels, record: Record, rows: Rows) -> dict[str, float]:
    """Return the metrics of the texts of all processes. `rows` say their targets."""
    indices = np.concatenate([part.indices for part in parts])
    times = np.bincount(indices, minlength=len(rows))
    if len(times) != len(rows) or (times != 1).any():
        wrong = int(np.flatnonzero(times != 1)[0])
        raise RuntimeError(
            f"evaluation: text {wrong} of {len(rows):,} was scored {times[wrong]} times; it must be once."
        )
    order = np.argsort(indices)
    scores = np.concatenate([part.scores for part in parts])[order].astype(np.float64)

    # `fsum` rounds once, so the order of the terms does not matter.
    total = math.fsum(weight for part in parts for weight in part.weights)
    loss = math.fsum(np.concatenate([part.losses for part in parts]).tolist())
    metrics, matrix = {"eval/loss": loss / (total or 1)}, None
    assert rows.targets is not None
    if np.isfinite(scores).all():
        targets = np.asarray(rows.targets)
        metrics |= {f"eval/{name}": value for name, value in score_metrics(scores, targets, labels).items()}
        if labels.problem_type == SINGLE_LABEL:
            matrix = _recorded_confusions(count_confusions(scores, targets), labels.names)
    record.update(confusion_matrix=matrix)
    return metrics


def _recorded_confusions(matrix: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Return names and counts of the classes, of many those that are most often confused; `classes` and `right` are of all."""
    kept = most_confused_classes(matrix, MAX_RECORDED_CLASSES)
    counts = matrix[np.ix_(kept, kept)].tolist()
    of_all = {"classes": len(names), "rows": int(matrix.sum()), "right": int(np.trace(matrix))}
    return of_all | {"names": [names[k] for k in kept], "counts": counts}
