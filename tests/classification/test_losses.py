"""The losses of classification are those of torch and of the papers, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from accel_llm.classification.losses import balanced_weights, class_losses, multi_label_losses, value_losses

torch.manual_seed(0)
SCORES = torch.randn(7, 4, dtype=torch.float64) * 3
CLASSES = torch.tensor([0, 1, 2, 3, 3, 0, 1])
MANY = (torch.rand(7, 4) > 0.5).double()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 7.0], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(weights, smoothing):
    ours = class_losses(SCORES, CLASSES, weights, smoothing)
    assert torch.allclose(ours, F.cross_entropy(SCORES, CLASSES, weights, reduction="none", label_smoothing=smoothing))
    total = len(CLASSES) if weights is None else weights[CLASSES].sum()
    mean = F.cross_entropy(SCORES, CLASSES, weights, label_smoothing=smoothing)
    assert float(ours.sum() / total) == pytest.approx(float(mean), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 5])
def test_focal_loss_is_that_of_the_paper(gamma):
    for losses, p in zip(
        class_losses(SCORES, CLASSES, None, 0, gamma), F.softmax(SCORES, -1)[range(7), CLASSES], strict=True
    ):
        assert float(losses) == pytest.approx(-((1 - float(p)) ** gamma) * math.log(p), rel=1e-9)
    p = torch.sigmoid(SCORES)
    by_hand = -(MANY * (1 - p) ** gamma * p.log() + (1 - MANY) * p**gamma * (1 - p).log()).mean(-1)
    assert torch.allclose(multi_label_losses(SCORES, MANY, None, 0, gamma), by_hand)
    assert not torch.allclose(class_losses(SCORES, CLASSES), class_losses(SCORES, CLASSES, None, 0, gamma))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_binary_cross_entropy_is_that_of_torch(weights):
    ours = multi_label_losses(SCORES, MANY, weights)
    expected = F.binary_cross_entropy_with_logits(SCORES, MANY, reduction="none", pos_weight=weights).mean(-1)
    assert torch.allclose(ours, expected)
    smoothed = F.binary_cross_entropy_with_logits(SCORES, MANY * 0.8 + 0.1, reduction="none", pos_weight=weights)
    assert torch.allclose(multi_label_losses(SCORES, MANY, weights, 0.2), smoothed.mean(-1))


def test_squared_errors_and_balanced_weights():
    assert torch.equal(value_losses(SCORES[:, :1], MANY[:, :1]), F.mse_loss(SCORES[:, 0], MANY[:, 0], reduction="none"))
    # scikit-learn 1.9: compute_class_weight("balanced", classes=[0, 1, 2, 3], y=[0, 1, 2, 3, 3, 0, 1])
    assert balanced_weights(torch.bincount(CLASSES)).tolist() == [0.875, 0.875, 1.75, 0.875]


def test_sure_scores_have_finite_losses_and_gradients():
    for gamma in (0.0, 0.5, 2.0):
        scores = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
        loss = class_losses(scores, torch.tensor([0, 0]), None, 0.1, gamma).sum()
        loss = loss + multi_label_losses(scores, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None, 0.1, gamma).sum()
        loss.backward()
        assert torch.isfinite(loss) and scores.grad is not None and torch.isfinite(scores.grad).all()
