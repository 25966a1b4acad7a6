"""Metrics of held-out texts: those of scikit-learn on scores of plain transformers, whatever the number of processes."""

import json
import multiprocessing
import os
import socket
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from scipy.stats import pearsonr
from support import SIZES
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Labels
from accel_llm.data.rows import ARRAYS, RowPart, Rows, as_rows
from accel_llm.model.attention import enable_packing
from accel_llm.model.classifier import attach_scores
from accel_llm.model.encoders import classifier_config
from accel_llm.report.record import Record
from accel_llm.training import text_evaluation
from accel_llm.training.text_evaluation import text_metrics

MAX_LENGTH, TEXTS = 24, 23
FAMILIES: dict[str, Any] = {"bert": BertConfig, "llama": LlamaConfig}
KINDS = {
    SINGLE_LABEL: Labels(SINGLE_LABEL, ("good", "bad", "none")),
    MULTI_LABEL: Labels(MULTI_LABEL, ("good", "bad", "none")),
    REGRESSION: Labels(REGRESSION, ("score",)),
}
# Family and problem type of the model, whether rows are packed, and how many a process takes at once. Three texts and
# batches of two leave a process without any.
CASES = [
    ("bert", SINGLE_LABEL, True, 1, TEXTS),
    ("bert", SINGLE_LABEL, False, 4, TEXTS),
    ("llama", MULTI_LABEL, True, 2, TEXTS),
    ("llama", REGRESSION, False, 3, TEXTS),
    ("llama", SINGLE_LABEL, False, 4, 3),
]


def labelled_rows(problem_type: str, count: int = TEXTS) -> Rows:
    """Uneven texts whose first tokens repeat, so that the classes of a model have rows of each other."""
    rng, part = np.random.default_rng(0), RowPart()
    width = len(KINDS[problem_type].names) if problem_type == MULTI_LABEL else 1
    for k in range(count):
        ids = rng.integers(3, 97, int(rng.integers(1, 20))).tolist()
        part.add(array("i", ids), array("i", [-100] * len(ids)), None, k + 1, 0, k)
        part.targets.extend(
            rng.integers(2, size=width).tolist()
            if problem_type == MULTI_LABEL
            else [k % 3 if problem_type == SINGLE_LABEL else float(rng.normal())]
        )
    rows = as_rows({name: np.array(getattr(part, name), kind) for name, kind in ARRAYS.items()}, [(-1, "a")])
    weights = np.array([0.3, 1.7, 2.3]) if problem_type == SINGLE_LABEL else None
    return replace(rows, problem_type=problem_type, class_weights=weights)


def plain_model(family: str, problem_type: str) -> Any:
    torch.manual_seed(1)
    config = classifier_config(FAMILIES[family](**SIZES | {"type_vocab_size": 1}), KINDS[problem_type])
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def plain_scores(model: Any, rows: Rows) -> torch.Tensor:
    """What transformers gives for each text alone, float64 [rows, k]."""
    ids = [torch.from_numpy(rows[k][0].astype(np.int64))[None] for k in range(len(rows))]
    with torch.no_grad():
        return torch.cat([model(input_ids=row).logits for row in ids]).double()


def options_for(packing: bool, size: int, **more: Any) -> ClassifyOptions:
    return ClassifyOptions(packing=packing, max_length=MAX_LENGTH, per_device_eval_batch_size=size, **more)


def evaluate_as_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """In a process of its own: the metrics of one rank for every case, to `folder`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    results = []
    for number, (family, problem_type, packing, size, count) in enumerate(CASES):
        model: Any = plain_model(family, problem_type)
        if packing:
            enable_packing(model)
        attach_scores(model)
        rows, options = labelled_rows(problem_type, count), options_for(packing, size, label_smoothing_factor=0.3)
        record = Record(folder / f"{world}-{number}", accelerator.is_main_process)
        prepared = accelerator.prepare(model)
        metrics = text_metrics(KINDS[problem_type], record, accelerator, prepared, rows, options, 0)
        results.append({name: value.hex() for name, value in metrics.items()})
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results), encoding="utf-8")


def over_processes(world: int, folder: Path) -> list[dict[str, str]]:
    """The metrics of each case on which all of `world` real processes agree, as hexadecimal numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "transformers.models.llama.modeling_llama",
            "transformers.models.bert.modeling_bert",
            "accel_llm.training.text_evaluation",
        ]
    )
    ranks = [context.Process(target=evaluate_as_rank, args=(rank, world, port, folder)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    results = [json.loads((folder / f"{world}-{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    assert all(metrics == results[0] for metrics in results)
    return results[0]


def expected_metrics(scores: torch.Tensor, rows: Rows) -> dict[str, float]:
    """Some metrics by scikit-learn, and the loss by torch."""
    found, targets = scores.numpy(), np.array(rows.targets, np.float64)
    if rows.problem_type == REGRESSION:
        mse = sk.mean_squared_error(targets, found)
        return {"eval/loss": mse, "eval/mse": mse, "eval/pearson": pearsonr(targets[:, 0], found[:, 0])[0]}
    if rows.problem_type == MULTI_LABEL:
        return {
            "eval/loss": float(F.binary_cross_entropy_with_logits(scores, torch.from_numpy(targets))),
            "eval/accuracy": sk.accuracy_score(targets, found > 0),
            "eval/auc": sk.roc_auc_score(targets, found),
        }
    true, probabilities = targets[:, 0].astype(np.int64), scores.softmax(1).numpy()
    weights = torch.from_numpy(np.array(rows.class_weights))
    return {
        "eval/loss": float(F.cross_entropy(scores, torch.from_numpy(true), weights)),
        "eval/accuracy": sk.accuracy_score(true, found.argmax(1)),
        "eval/f1_macro": sk.f1_score(true, found.argmax(1), average="macro"),
        "eval/auc": sk.roc_auc_score(true, probabilities, multi_class="ovr"),
        "eval/log_loss": sk.log_loss(true, probabilities),
    }


def test_one_and_two_processes_have_the_same_metrics_to_the_bit(tmp_path: Path) -> None:
    alone = over_processes(1, tmp_path)
    assert over_processes(2, tmp_path) == alone
    for number, (family, problem_type, _, _, count) in enumerate(CASES):
        rows = labelled_rows(problem_type, count)
        scores = plain_scores(plain_model(family, problem_type), rows)
        metrics = {name: float.fromhex(value) for name, value in alone[number].items()}
        expected = expected_metrics(scores, rows)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4), (family, problem_type)
        records = [json.loads((tmp_path / f"{world}-{number}" / "run.json").read_text()) for world in (1, 2)]
        assert records[0] == records[1]
        matrix = records[0]["confusion_matrix"]
        if problem_type != SINGLE_LABEL:
            assert matrix is None
            continue
        true, predicted = np.array(rows.targets)[:, 0].astype(int), scores.numpy().argmax(1)
        assert matrix["counts"] == sk.confusion_matrix(true, predicted, labels=[0, 1, 2]).tolist()
        assert matrix["names"] == ["good", "bad", "none"] and matrix["rows"] == count and matrix["classes"] == 3
        assert matrix["right"] == (true == predicted).sum()
    # Weights of classes are no decoration: without them the loss is another number.
    assert metrics["eval/loss"] != pytest.approx(metrics["eval/log_loss"], rel=1e-2)


@pytest.fixture
def classifier() -> Iterator[Any]:
    model = plain_model("llama", SINGLE_LABEL)
    attach_scores(model)
    yield model.train()


def measure(accelerator: Accelerator, model: Any, folder: Path, rows: Rows, size: int = 4) -> dict[str, float]:
    options = options_for(False, size)
    return text_metrics(KINDS[SINGLE_LABEL], Record(folder, True), accelerator, model, rows, options, 0)


def test_the_size_of_a_batch_changes_nothing_but_rounding(accelerator, classifier, tmp_path) -> None:
    rows = labelled_rows(SINGLE_LABEL)
    whole = measure(accelerator, classifier, tmp_path, rows, TEXTS)
    assert measure(accelerator, classifier, tmp_path, rows, 5) == pytest.approx(whole, rel=1e-5)
    assert classifier.training


def test_scores_that_are_not_finite_leave_the_loss_alone(accelerator, classifier, tmp_path) -> None:
    with torch.no_grad():
        classifier.score.weight[1, 0] = torch.nan
    metrics = measure(accelerator, classifier, tmp_path, labelled_rows(SINGLE_LABEL))
    assert list(metrics) == ["eval/loss"] and np.isnan(metrics["eval/loss"])
    assert json.loads((tmp_path / "run.json").read_text())["confusion_matrix"] is None


def test_a_text_that_is_lost_or_scored_twice_is_an_error(accelerator, classifier, tmp_path, monkeypatch) -> None:
    rows, batches = labelled_rows(SINGLE_LABEL), text_evaluation.evaluation_batches
    for change, words in (
        (lambda found: found[1:], "text 0 of 23 was scored 0 times"),
        (lambda found: [*found, found[-1]], "text 20 of 23 was scored 2 times"),
    ):
        monkeypatch.setattr(text_evaluation, "evaluation_batches", lambda *a, c=change: c(list(batches(*a))))
        with pytest.raises(RuntimeError, match=words):
            measure(accelerator, classifier, tmp_path, rows)


def test_of_many_classes_those_that_are_confused_are_recorded() -> None:
    counts = np.diag(np.arange(1, 61))
    counts[59, 7], counts[3, 58] = 5, 4
    recorded = text_evaluation._recorded_confusions(counts, tuple(f"c{k}" for k in range(60)))
    assert len(recorded["names"]) == len(recorded["counts"]) == 50 and recorded["classes"] == 60
    names = recorded["names"]
    assert recorded["counts"][names.index("c59")][names.index("c7")] == 5 and names == sorted(
        names, key=lambda name: int(name[1:])
    )
    assert recorded["rows"] == counts.sum() and recorded["right"] == np.trace(counts)
