"""The loss of a batch of texts with labels, as a sum to be divided by the total of the whole step."""

from typing import Any

import torch

from accel_llm.classification.losses import class_losses, multi_label_losses, value_losses
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.data.batches import Batch
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from accel_llm.model.encoders import balance_of_scores, text_scores


def text_loss(model: Any, batch: Batch, options: ClassifyOptions) -> torch.Tensor:
    """Return the sum of the losses of the texts of a batch, float32 []; see `collate_texts` for the batch.

    Divided by the sum of `total_weight` over a step it is what `torch.nn.functional.cross_entropy` (or the loss of the
    problem type) gives for all texts of the step together. `batch["measured"]` gets the accuracy of
    single labels, as the number of texts told right and of all.
    """
    scores = text_scores(model, batch)
    if batch["problem_type"] == SINGLE_LABEL:
        right = (scores.argmax(-1) == batch["targets"])[: batch["num_targets"]].double()
        batch["measured"] = {"accuracy": torch.stack([right.sum(), right.new_full((), len(right))])}
    losses = losses_of_scores(scores, batch, options, options.label_smoothing_factor)
    return (losses.sum() + balance_of_scores(scores, batch["total_weight"])).float()


def losses_of_scores(
    scores: torch.Tensor, batch: Batch, options: ClassifyOptions, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the loss of each text that counts, float64 [num_targets]."""
    count, targets = batch["num_targets"], batch["targets"]
    scores = scores.double()
    if batch["problem_type"] == REGRESSION:
        return value_losses(scores, targets.double())[:count]
    losses_of = multi_label_losses if batch["problem_type"] == MULTI_LABEL else class_losses
    weights = batch.get("class_weights")
    if batch["problem_type"] == MULTI_LABEL:
        targets = targets.double()
    return losses_of(scores, targets, weights, label_smoothing, options.focal_gamma)[:count]
