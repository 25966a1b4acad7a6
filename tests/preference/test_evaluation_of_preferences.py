"""Each pair counts once: no metric depends on how the rows are cut into batches."""

from dataclasses import replace

import numpy as np
import pytest
from hand_made_answers import answering_model, dpo_options, pair_rows, single_rows

from accel_llm.config.preference_options import KtoOptions
from accel_llm.data.answers import collate_answers
from accel_llm.preference.mismatched import collate_with_mismatched, mismatch
from accel_llm.training.evaluation import select_questions
from accel_llm.training.preference_evaluation import preference_metrics


def with_reference(rows, seed: int = 0):
    return replace(rows, reference=-30 * np.random.default_rng(seed).random(len(rows)))


def test_metrics_of_pairs_do_not_depend_on_batches(accelerator):
    model, pairs = answering_model(), pair_rows()
    pairs = replace(pairs, rows=with_reference(pairs.rows))

    def metrics(size: int) -> dict[str, float]:
        options = dpo_options(per_device_eval_batch_size=size)
        return preference_metrics(pairs, collate_answers, accelerator, model, pairs.rows, options, 0)

    whole = metrics(12)
    names = ("accuracies", "chosen", "margins", "rejected")
    assert {"eval/loss", *(f"eval/rewards/{name}" for name in names)} < whole.keys()
    for size in (1, 5):
        assert metrics(size) == pytest.approx(whole, rel=1e-6)
    assert whole["eval/rewards/margins"] == pytest.approx(whole["eval/rewards/chosen"] - whole["eval/rewards/rejected"])
    assert 0 < whole["eval/rewards/accuracies"] < 1


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_metrics_of_single_answers_do_not_depend_on_batches(accelerator, loss_type):
    model, rows = answering_model(), with_reference(single_rows([1, 0, 0] * 8))
    mismatched = replace(mismatch(rows, 0, 64), reference=-40 * np.ones(24))

    def collate(rows, units, packed, pad, virtual):
        return collate_with_mismatched(rows, units, packed, pad, virtual, mismatched=mismatched)

    def metrics(size: int) -> dict[str, float]:
        options = KtoOptions(loss_type=loss_type, max_length=64, packing=False, per_device_eval_batch_size=size)
        return preference_metrics(rows, collate, accelerator, model, rows, options, 0)

    whole = metrics(24)
    assert whole["eval/kl" if loss_type == "kto" else "eval/delta"] != 0
    assert metrics(5) == pytest.approx(whole, rel=1e-6)


def test_questions_to_generate_for_are_chosen_and_desirable_answers():
    rows = pair_rows().rows
    answers = [answer.tolist() for _, answer in select_questions(rows, 3)]
    assert answers == [[t for t in rows[k][1].tolist() if t != -100] for k in (0, 2, 4)]
    rows = single_rows([0, 1, 0, 1] + [0] * 20)
    answers = [answer.tolist() for _, answer in select_questions(rows, 9)]
    assert answers == [[t for t in rows[k][1].tolist() if t != -100] for k in (1, 3)]
