"""The loss of each text whose scores should say its class, its classes or its value.

The sum over a step is divided by the weights of all its texts, on all processes. So each text counts as much as it does in
`torch.nn.functional.cross_entropy` with `reduction="mean"` over the whole step.
"""

import torch
import torch.nn.functional as F


def class_losses(
    scores: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> torch.Tensor:
    """Return the losses [n] of texts of one class each: `scores` [n, classes], `targets` int64 [n].

    Cross entropy with the target distribution (1 - label_smoothing) at the class and label_smoothing / classes at each
    (Szegedy et al. 2016, arXiv 1512.00567, section 7), times the weight of each class [classes]; as torch computes it.
    With `focal_gamma` the term of a class with probability p is times (1 - p)^gamma (Lin et al. 2017, arXiv 1708.02002,
    equation 4), so that texts that are easily told count less.
    """
    log_probabilities = F.log_softmax(scores, -1)
    terms = -log_probabilities
    if focal_gamma:
        terms = terms * (-torch.expm1(log_probabilities)).clamp(min=torch.finfo(scores.dtype).tiny) ** focal_gamma
    if class_weights is not None:
        terms = terms * class_weights
    of_class = terms.gather(-1, targets[:, None])[:, 0]
    return (1 - label_smoothing) * of_class + label_smoothing * terms.mean(-1)


def multi_label_losses(
    scores: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> torch.Tensor:
    """Return the losses [n] of texts of several classes: `scores` and `targets` (0 or 1) [n, classes].

    The mean over the classes of the binary cross entropy, as transformers has it for multi_label_classification. The weight
    of a class [classes] counts for texts that have it (`pos_weight` of torch); label_smoothing moves each target by its half
    towards the other side.
    """
    targets = targets * (1 - label_smoothing) + label_smoothing / 2
    weight = 1.0 if class_weights is None else class_weights
    with_class, without = -F.logsigmoid(scores), -F.logsigmoid(-scores)
    if focal_gamma:
        smallest = torch.finfo(scores.dtype).tiny
        with_class = with_class * torch.sigmoid(-scores).clamp(min=smallest) ** focal_gamma
        without = without * torch.sigmoid(scores).clamp(min=smallest) ** focal_gamma
    return (weight * targets * with_class + (1 - targets) * without).mean(-1)


def value_losses(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the squared errors [n] of `scores` to `targets`, both [n, values]; the mean over the values of a text."""
    return (scores - targets).square().mean(-1)


def balanced_weights(counts: torch.Tensor) -> torch.Tensor:
    """Return the weight of each class for which all classes weigh the same: texts / (classes * texts of the class).

    As scikit-learn's `class_weight="balanced"` (King and Zeng 2001). `counts` [classes], each at least 1.
    """
    return counts.sum() / (len(counts) * counts.double())
