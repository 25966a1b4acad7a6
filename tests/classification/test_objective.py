"""The loss of a step and its gradients are those of torch on plain transformers in float64, each text alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import SIZES, make_rows, relative_distance
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from accel_llm.classification.objective import text_loss
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from accel_llm.data.rows import Rows
from accel_llm.data.texts import collate_texts
from accel_llm.model.attention import enable_packing
from accel_llm.model.classifier import attach_scores

LENGTHS = (5, 9, 2, 12, 7, 3)
TARGETS = {
    SINGLE_LABEL: [[0], [2], [1], [1], [0], [2]],
    MULTI_LABEL: [[0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]],
    REGRESSION: [[0.5], [-2.0], [3.0], [0.0], [1.5], [7.0]],
}
WEIGHTS = [0.5, 2.0, 1.25]
FAMILIES = {
    "bert": {"type_vocab_size": 2},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "llama": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}


def built(family: str, labels: int) -> Any:
    torch.manual_seed(0)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    rates += ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout")
    config = CONFIG_MAPPING[family](**(SIZES | dict.fromkeys(rates, 0.0) | FAMILIES[family]), num_labels=labels)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def labelled(problem_type: str, weights: list[float] | None) -> Rows:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 97, n).tolist() for n in LENGTHS]
    rows = make_rows([(k, row, [-100] * len(row)) for k, row in enumerate(ids)])
    weigh = None if weights is None else np.array(weights)
    return replace(
        rows, targets=np.array(TARGETS[problem_type], np.float32), problem_type=problem_type, class_weights=weigh
    )


def mean_by_torch(model: Any, rows: Rows, options: ClassifyOptions) -> torch.Tensor:
    """The loss of all rows, with the losses of torch on the logits of plain transformers for each text alone."""
    ids = [torch.from_numpy(rows[k][0].astype(np.int64))[None] for k in range(len(rows))]
    scores = torch.cat([model(input_ids=row).logits for row in ids])
    targets = torch.tensor(rows.targets, dtype=torch.float64)
    weights = None if rows.class_weights is None else torch.tensor(rows.class_weights)
    if rows.problem_type == REGRESSION:
        return F.mse_loss(scores, targets)
    if rows.problem_type == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(scores, targets, pos_weight=weights)
    smoothing = options.label_smoothing_factor
    return F.cross_entropy(scores, targets[:, 0].long(), weights, label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("problem_type", "weights", "smoothing"),
    [
        (SINGLE_LABEL, None, 0.0),
        (SINGLE_LABEL, WEIGHTS, 0.1),
        (MULTI_LABEL, None, 0.0),
        (MULTI_LABEL, WEIGHTS, 0.0),
        (REGRESSION, None, 0.0),
    ],
)
@pytest.mark.parametrize(
    ("family", "packed"),
    [("bert", True), ("bert", False), ("modernbert", True), ("deberta-v2", False), ("llama", True), ("gpt2", False)],
)
def test_loss_and_gradients_of_a_step_are_those_of_torch_in_float64(family, packed, problem_type, weights, smoothing):
    rows = labelled(problem_type, weights)
    options = ClassifyOptions(label_smoothing_factor=smoothing)
    ours, reference = (built(family, 1 if problem_type == REGRESSION else 3) for _ in range(2))
    attach_scores(ours)
    if packed:
        enable_packing(ours)
    # A step of three micro-batches, of which the last one is an empty slot.
    total, losses = 0.0, []
    for indices in ([3, 0], [1, 2, 4, 5], []):
        batch = collate_texts(rows, indices, packed, pad_token_id=0)
        losses.append(text_loss(ours, batch, options))
        total += batch["total_weight"]
    loss = torch.stack(losses).sum() / total
    loss.backward()
    assert float(losses[2].detach()) == 0.0

    expected = mean_by_torch(reference.double(), rows, options)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None or float(theirs[name].grad.norm()) < 1e-9:
            assert theirs[name].grad is None or float(theirs[name].grad.norm()) < 1e-9, name
            continue
        assert relative_distance(parameter.grad, theirs[name].grad) < 1e-5, name


def test_the_mean_over_batches_is_another_number():
    """The negative control: what a loop gives that averages each micro-batch and then the micro-batches."""
    rows, options = labelled(SINGLE_LABEL, WEIGHTS), ClassifyOptions()
    model = built("bert", 3)
    attach_scores(model)
    means = []
    for indices in ([3, 0], [1, 2, 4, 5]):
        batch = collate_texts(rows, indices, False, 0)
        means.append(float(text_loss(model, batch, options).detach()) / batch["total_weight"])
    whole = float(mean_by_torch(built("bert", 3).double(), rows, options).detach())
    assert abs(sum(means) / 2 - whole) > 1e-3


def test_the_accuracy_of_training_counts_each_text_once():
    rows = labelled(SINGLE_LABEL, None)
    model = built("bert", 3)
    attach_scores(model)
    batch = collate_texts(rows, [0, 1, 2, 3, 4], False, 0)
    text_loss(model, batch, ClassifyOptions())
    alone = [int(model(input_ids=torch.tensor(rows[k][0][None].astype(int))).logits.argmax()) for k in range(5)]
    right = sum(answer == TARGETS[SINGLE_LABEL][k][0] for k, answer in enumerate(alone))
    assert batch["measured"]["accuracy"].tolist() == [right, 5]
    empty = collate_texts(rows, [], False, 0)
    text_loss(model, empty, ClassifyOptions())
    assert empty["measured"]["accuracy"].tolist() == [0, 0]
