"""How well the scores of a classifier fit the labels: numbers of each problem type, and which class is taken for which.

Scores are logits, float64 [rows, k]: one for each class, or one number for regression. What scikit-learn and SciPy compute
is theirs. A number that these rows do not define is left out, such as the area under the curve of a class without rows.
"""

import warnings

import numpy as np
from scipy.special import expit, log_expit, log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    mean_squared_error,
    roc_auc_score,
)

from accel_llm.data.labels import MULTI_LABEL, REGRESSION, Labels

CALIBRATION_BINS = 15


def score_metrics(scores: np.ndarray, targets: np.ndarray, labels: Labels) -> dict[str, float]:
    """Return the metrics of `labels.problem_type`: `scores` float64 [rows, k], all finite, and at least one row.

    `targets` are those of `Rows`: class numbers or numbers, [rows, 1], or 0 or 1 for each class, [rows, k].

    - One class: accuracy, f1_macro and f1_micro (over the classes that labels or predictions have), mcc, auc (of two
      classes; of more the mean of each class against the others, if each class has rows), log_loss, calibration_error.
    - Several classes, each predicted if its probability is above 0.5: accuracy (of rows with all classes right),
      f1_macro, f1_micro, auc (mean over the classes that some rows have and some do not), log_loss (mean over rows
      and classes), calibration_error (of the probabilities of all classes).
    - A number: mse, mae, pearson, spearman; no correlations if one side is constant.
    """
    with warnings.catch_warnings():
        # scikit-learn warns of many classes in few rows, and of a class that no row has: the run decides on both.
        warnings.simplefilter("ignore", UserWarning)
        if labels.problem_type == REGRESSION:
            return _value_metrics(scores.ravel(), targets.ravel().astype(np.float64))
        if labels.problem_type == MULTI_LABEL:
            return _multi_label_metrics(scores, targets.astype(np.int64))
        return _class_metrics(scores, targets.ravel().astype(np.int64))


def _class_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    rows, classes = scores.shape
    predicted, log_probabilities = scores.argmax(1), log_softmax(scores, 1)
    probabilities = np.exp(log_probabilities)
    metrics = {
        "accuracy": accuracy_score(targets, predicted),
        "f1_macro": f1_score(targets, predicted, average="macro"),
        "f1_micro": f1_score(targets, predicted, average="micro"),
        "mcc": matthews_corrcoef(targets, predicted),
    }
    if len(np.unique(targets)) == classes:
        # The difference of two scores keeps the order of texts whose probabilities are 1 in float64.
        metrics["auc"] = (
            roc_auc_score(targets, scores[:, 1] - scores[:, 0])
            if classes == 2
            else roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
        )
    metrics["log_loss"] = -log_probabilities[np.arange(rows), targets].mean()
    metrics["calibration_error"] = calibration_error(probabilities.max(1), predicted == targets)
    return _as_floats(metrics)


def _multi_label_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    predicted = (scores > 0).astype(np.int64)
    # scikit-learn takes a single column for classes 0 and 1. The column twice has the same means.
    of_all = [np.repeat(values, 2, 1) if values.shape[1] == 1 else values for values in (targets, predicted)]
    metrics = {
        "accuracy": accuracy_score(*of_all),
        "f1_macro": f1_score(*of_all, average="macro"),
        "f1_micro": f1_score(*of_all, average="micro"),
    }
    both = np.flatnonzero((targets.min(0) == 0) & (targets.max(0) == 1))
    if len(both):
        metrics["auc"] = np.mean([roc_auc_score(targets[:, k], scores[:, k]) for k in both])
    metrics["log_loss"] = -np.where(targets == 1, log_expit(scores), log_expit(-scores)).mean()
    metrics["calibration_error"] = calibration_error(expit(scores).ravel(), targets.ravel())
    return _as_floats(metrics)


def _value_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    metrics = {"mse": mean_squared_error(targets, scores), "mae": mean_absolute_error(targets, scores)}
    # Below this SciPy warns that rounding decides.
    if all(np.ptp(values) > 1e-12 * np.abs(values).max() for values in (scores, targets)):
        metrics |= {"pearson": pearsonr(targets, scores)[0], "spearman": spearmanr(targets, scores)[0]}
    return _as_floats(metrics)


def _as_floats(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray) -> float:
    """Return the expected calibration error of `probabilities` [n] that each of `outcomes` (0 or 1) [n] is 1.

    The probabilities are sorted into 15 bins of equal width. Of each bin it takes the distance between their mean and the
    share of outcomes that are 1, and of these the mean by the sizes of the bins (Guo et al. 2017, arXiv 1706.04599,
    equation 3).
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.digitize(probabilities, edges[1:-1], right=True)  # a bin has its upper edge, and not its lower one
    excess = np.bincount(bins, outcomes - probabilities, CALIBRATION_BINS)
    return float(np.abs(excess).sum() / len(probabilities))


def count_confusions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return how often each class was taken for each, int64 [true class, predicted class]; `scores` is [rows, k]."""
    return confusion_matrix(targets.ravel().astype(np.int64), scores.argmax(1), labels=np.arange(scores.shape[1]))


def most_confused_classes(matrix: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` class numbers, in order: those that are most often taken for one other class, or it for them."""
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-np.maximum(mistakes.max(0), mistakes.max(1)), kind="stable")
    return np.sort(order[:count])
