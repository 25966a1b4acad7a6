"""Metrics of classifiers: beside scikit-learn on probabilities, and beside sums in plain Python."""

import math

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.stats import rankdata

from accel_llm.classification.metrics import (
    calibration_error,
    count_confusions,
    most_confused_classes,
    score_metrics,
)
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Labels

CLASS_NAMES = ("a", "b", "c", "d")
CLASS_METRICS = ["accuracy", "f1_macro", "f1_micro", "mcc", "auc", "log_loss", "calibration_error"]


def drawn_scores(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are right for about half of the rows, and class numbers [rows, 1] as float32."""
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), rng.integers(classes, size=rows - classes)])
    scores = rng.normal(size=(rows, classes)) + 1.5 * (targets[:, None] == np.arange(classes))
    return scores, targets[:, None].astype(np.float32)


def of_classes(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    return score_metrics(scores, targets, Labels(SINGLE_LABEL, CLASS_NAMES[: scores.shape[1]]))


def of_sets(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    return score_metrics(scores, targets, Labels(MULTI_LABEL, CLASS_NAMES[: scores.shape[1]]))


def plain_calibration_error(pairs: list[tuple[float, float]]) -> float:
    """The definition of Guo et al. 2017, bin by bin."""
    total = 0.0
    for k in range(15):
        inside = [pair for pair in pairs if k / 15 < pair[0] <= (k + 1) / 15]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(pairs) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_one_class_are_those_of_scikit_learn(classes: int) -> None:
    scores, targets = drawn_scores(157, classes)
    true, predicted = targets[:, 0].astype(int), scores.argmax(1)
    odds = np.exp(scores)
    probabilities = odds / odds.sum(1, keepdims=True)
    expected = {
        "accuracy": sk.accuracy_score(true, predicted),
        "f1_macro": sk.f1_score(true, predicted, average="macro"),
        "f1_micro": sk.f1_score(true, predicted, average="micro"),
        "mcc": sk.matthews_corrcoef(true, predicted),
        "auc": sk.roc_auc_score(true, probabilities if classes > 2 else probabilities[:, 1], multi_class="ovr"),
        "log_loss": sk.log_loss(true, probabilities),
        "calibration_error": plain_calibration_error(
            [(max(p), float(a == b)) for p, a, b in zip(probabilities.tolist(), true, predicted, strict=True)]
        ),
    }
    found = of_classes(scores, targets)
    assert list(found) == CLASS_METRICS and found == pytest.approx(expected, rel=1e-12)
    assert 0.4 < found["accuracy"] < 0.9 and all(type(value) is float for value in found.values())
    # Scores of other rows have other metrics: each of them looks at the pairs of score and label.
    other = of_classes(scores[::-1], targets)
    assert all(abs(other[name] - value) > 1e-3 for name, value in found.items())


def test_auc_is_the_share_of_pairs_in_the_right_order_even_if_probabilities_are_one() -> None:
    scores, targets = drawn_scores(40, 2)
    difference, true = scores[:, 1] - scores[:, 0], targets[:, 0]
    wins = [(a > b) + (a == b) / 2 for a in difference[true == 1] for b in difference[true == 0]]
    assert of_classes(scores, targets)["auc"] == pytest.approx(sum(wins) / len(wins), rel=1e-12)
    # 100 times as large most probabilities are 0 or 1 in float64; the order of the texts is the same.
    assert of_classes(scores * 100, targets)["auc"] == of_classes(scores, targets)["auc"]


def test_log_loss_is_not_cut_where_probabilities_underflow() -> None:
    scores = np.array([[0.0, 2000.0], [0.0, 2000.0]])
    metrics = of_classes(scores, np.array([[0.0], [1.0]]))
    assert metrics["log_loss"] == 1000.0 and metrics["calibration_error"] == 0.5
    assert of_sets(scores, np.array([[0, 0], [0, 1]]))["log_loss"] == pytest.approx(
        (2000 + 3 * 0 + 2 * math.log(2)) / 4
    )


def test_a_class_without_rows_leaves_out_the_area_under_the_curve_and_no_more() -> None:
    scores, targets = drawn_scores(50, 4)
    known = targets[:, 0] < 3
    metrics = of_classes(scores[known], targets[known])
    assert list(metrics) == [name for name in CLASS_METRICS if name != "auc"]
    predicted, true = scores[known].argmax(1), targets[known, 0].astype(int)
    assert metrics["f1_macro"] == sk.f1_score(true, predicted, average="macro")


def test_one_row_or_one_class_alone_is_no_reason_to_warn() -> None:
    for count in (1, 5):
        metrics = of_classes(np.tile([3.0, 1.0, 0.0], (count, 1)), np.zeros((count, 1)))
        assert metrics["accuracy"] == metrics["f1_macro"] == 1.0 and metrics["mcc"] == 0.0 and "auc" not in metrics
    names = Labels(SINGLE_LABEL, tuple(map(str, range(30))))
    assert score_metrics(np.eye(30), np.arange(30)[:, None], names)["accuracy"] == 1.0  # as many classes as rows


def test_metrics_of_several_classes_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((120, 4)) < [0.1, 0.5, 0.7, 0.3]).astype(np.float32)
    scores = rng.normal(size=(120, 4)) + 2 * targets - 1
    true, probabilities = targets.astype(int), 1 / (1 + np.exp(-scores))
    predicted = (probabilities > 0.5).astype(int)
    expected = {
        "accuracy": sk.accuracy_score(true, predicted),
        "f1_macro": sk.f1_score(true, predicted, average="macro"),
        "f1_micro": sk.f1_score(true, predicted, average="micro"),
        "auc": sk.roc_auc_score(true, probabilities, average="macro"),
        "log_loss": np.mean([sk.log_loss(true[:, k], probabilities[:, k]) for k in range(4)]),
        "calibration_error": plain_calibration_error(
            list(zip(probabilities.ravel().tolist(), true.ravel().tolist(), strict=True))
        ),
    }
    assert of_sets(scores, targets) == pytest.approx(expected, rel=1e-12)
    # All classes of a row must be right; the share of right answers is another, larger number.
    assert expected["accuracy"] < (predicted == true).mean() - 0.1


def test_the_curve_of_several_classes_is_that_of_classes_with_both_values() -> None:
    scores = np.array([[1.0, 0.5, -1.0], [-1.0, 1.5, -2.0], [2.0, 3.0, -3.0]])
    targets = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0]])
    metrics = of_sets(scores, targets)
    assert metrics["auc"] == 0.5 and metrics["f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert "auc" not in of_sets(scores[:, 1:], targets[:, 1:])
    nothing = of_sets(-np.ones((2, 3)), np.zeros((2, 3)))
    assert nothing["accuracy"] == 1.0 and nothing["f1_macro"] == nothing["f1_micro"] == 0.0


def test_a_single_class_that_texts_may_have_counts_as_in_a_table_of_it() -> None:
    scores, targets = np.array([[1.0], [2.0], [-1.0], [-2.0]]), np.array([[1], [0], [1], [0]])
    metrics = of_sets(scores, targets)
    # One true positive, one false positive, one false negative.
    assert metrics["accuracy"] == 0.5 and metrics["f1_macro"] == metrics["f1_micro"] == 0.5
    assert metrics["auc"] == 0.5


def test_metrics_of_numbers_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(2)
    targets = rng.normal(size=60).round(1).astype(np.float32)[:, None]
    scores = targets.astype(np.float64) ** 3 + rng.normal(size=(60, 1))
    metrics = score_metrics(scores, targets, Labels(REGRESSION, ("score",)))
    true, found = targets[:, 0].astype(np.float64), scores[:, 0]
    assert metrics == pytest.approx(
        {
            "mse": np.mean((true - found) ** 2),
            "mae": np.mean(np.abs(true - found)),
            "pearson": np.corrcoef(true, found)[0, 1],
            "spearman": np.corrcoef(rankdata(true), rankdata(found))[0, 1],
        },
        rel=1e-12,
    )
    assert abs(metrics["pearson"] - metrics["spearman"]) > 0.01


@pytest.mark.parametrize("constant", [0.0, 0.1, -3e38])
def test_correlations_with_a_constant_are_left_out(constant: float) -> None:
    varied, same = np.array([[1.0], [2.0], [4.0]]), np.full((3, 1), constant)
    for scores, targets in ((varied, same), (same, varied), (varied[:1], varied[:1])):
        assert list(score_metrics(scores, targets, Labels(REGRESSION, ("score",)))) == ["mse", "mae"]


def test_a_calibration_error_counted_by_hand() -> None:
    # Bins are (0.6, 0.667] and (0.933, 1]: |1/2 - 0.63| * 2/4 + |1 - 0.96| * 2/4.
    found = calibration_error(np.array([0.62, 0.64, 0.95, 0.97]), np.array([1, 0, 1, 1]))
    assert found == pytest.approx(0.5 * 0.13 + 0.5 * 0.04)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0.0
    assert calibration_error(np.array([1.0, 0.0]), np.array([0, 1])) == 1.0


def test_confusions_are_counted_by_true_and_predicted_class() -> None:
    scores = np.array([[3.0, 1, 0], [0, 2, 1], [0, 5, 1], [0, 5, 1]])
    matrix = count_confusions(scores, np.array([[0.0], [0], [1], [0]]))
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]] and matrix.dtype == np.int64


def test_the_most_confused_classes_are_those_of_the_largest_counts_beside_the_diagonal() -> None:
    matrix = np.diag([90, 80, 70, 60, 50])
    matrix[3, 1], matrix[2, 4], matrix[0, 2] = 9, 5, 1
    assert most_confused_classes(matrix, 2).tolist() == [1, 3]
    assert most_confused_classes(matrix, 4).tolist() == [1, 2, 3, 4]
    assert most_confused_classes(matrix, 9).tolist() == [0, 1, 2, 3, 4]
