"""Sums over the units of a batch: equal however a step is cut, and equal to what plain transformers computes."""

from math import log

import pytest
import torch
from accelerate import Accelerator
from hand_made_answers import answer_batch, answering_model, gradients, random_documents
from peft import LoraConfig, get_peft_model
from support import relative_distance

from accel_llm.adapters import lora_forward
from accel_llm.adapters.lora_forward import shorten_lora_forward
from accel_llm.config.preference_options import DpoOptions, KtoOptions
from accel_llm.model.evaluating import evaluating
from accel_llm.model.log_probabilities import answer_log_probabilities
from accel_llm.preference.objective import kto_loss, kto_targets, preference_loss

PAIRS = 8
DOCUMENTS = random_documents(2 * PAIRS)
REFERENCE = -30 * torch.rand(2 * PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pairs(first: int, last: int) -> dict:
    part = slice(2 * first, 2 * last)
    return answer_batch(DOCUMENTS[part], last - first, reference=REFERENCE[part])


def step(model, batches, options) -> tuple[float, torch.Tensor, torch.Tensor]:
    """One step as the loop does it: the mean loss, its gradient, and the sums of what was measured."""
    model.zero_grad()
    units = sum(batch["total_weight"] for batch in batches)
    total, measured = 0.0, torch.zeros(())
    for batch in batches:
        loss = preference_loss(model, batch, options) / units
        loss.backward()
        total += float(loss.detach())
        measured = measured + torch.stack(list(batch["measured"].values()))
    return total, gradients(model), measured


MIXED = DpoOptions(loss_type=["sigmoid", "ipo", "orpo"], loss_weights=[1, 0.01, 0.5], rpo_alpha=0.2, use_weighting=True)


def test_a_step_is_the_same_however_it_is_cut():
    model = answering_model()
    whole = step(model, [pairs(0, 8)], MIXED)
    cut = step(model, [pairs(k, k + 2) for k in (0, 2, 4, 6)], MIXED)
    uneven = step(model, [pairs(0, 1), answer_batch([], 0, reference=REFERENCE[:0]), pairs(1, 8)], MIXED)
    for other in (cut, uneven):
        assert other[0] == pytest.approx(whole[0], rel=1e-6)
        assert relative_distance(other[1], whole[1]) < 1e-5
        torch.testing.assert_close(other[2], whole[2])
    # The mean of means of batches of other sizes is something else.
    means = [float(preference_loss(model, pairs(a, b), MIXED).detach()) / (b - a) for a, b in ((0, 1), (1, 8))]
    assert abs(sum(means) / 2 / whole[0] - 1) > 1e-3


def test_dpo_is_what_plain_transformers_and_its_formula_give():
    model, beta = answering_model(), 0.3
    batch = pairs(0, 3)
    loss = preference_loss(model, batch, DpoOptions(beta=beta))
    loss.backward()
    ours = gradients(model)

    model.zero_grad()
    logits = type(model).forward(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    sums = []
    for row, (prompt, answer) in enumerate(DOCUMENTS[:6]):
        log_p = logits[row].double().log_softmax(1)
        sums.append(sum(log_p[len(prompt) - 1 + k, token] for k, token in enumerate(answer)))
    ratios = torch.stack(sums) - REFERENCE[:6]
    expected = -torch.log(torch.sigmoid(beta * (ratios[0::2] - ratios[1::2]))).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_distance(ours, gradients(model)) < 1e-5
    measured = {name: float(a / n) for name, (a, n) in batch["measured"].items()}
    assert measured["rewards/chosen"] == pytest.approx((beta * ratios[0::2]).mean().item(), rel=1e-5)
    assert measured["logps/rejected"] == pytest.approx(torch.stack(sums)[1::2].mean().item(), rel=1e-5)
    assert measured["rewards/accuracies"] == pytest.approx(float((ratios[0::2] > ratios[1::2]).double().mean()))


def test_with_itself_as_reference_dpo_begins_at_ln_2_and_without_one_it_needs_none():
    model = answering_model()
    batch = pairs(0, 4)
    with torch.no_grad():
        preference_loss(model, batch, DpoOptions())
        batch["reference"] = answer_log_probabilities(model, batch).sums
        assert float(preference_loss(model, batch, DpoOptions())) / 4 == pytest.approx(log(2), abs=1e-7)
        del batch["reference"]
        preference_loss(model, batch, DpoOptions(loss_type=["simpo", "orpo", "cpo", "sft"]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_in_16_bits_an_adapted_policy_is_its_own_reference(monkeypatch):
    """PEFT's own forward of a LoRA layer rounds once more than ours, so it must not run without gradients either."""
    torch.manual_seed(1)
    model = get_peft_model(
        answering_model().bfloat16(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    batch, options = pairs(0, 4), DpoOptions()

    def first_loss() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            with evaluating(model):
                batch["reference"] = answer_log_probabilities(model, batch).sums
            return float(preference_loss(model, batch, options).detach()) / 4

    shorten_lora_forward(model)
    assert first_loss() == pytest.approx(log(2), abs=1e-7)
    adapter_of = lora_forward._plain_adapter
    monkeypatch.setattr(
        lora_forward, "_plain_adapter", lambda layer: adapter_of(layer) if torch.is_grad_enabled() else None
    )
    assert abs(first_loss() - log(2)) > 1e-5


# --- answers with a label --------------------------------------------------------------------------------------------


LABELS = torch.arange(2 * PAIRS) % 3 == 0
OTHERS = [(prompt, DOCUMENTS[k - 1][1]) for k, (prompt, _) in enumerate(DOCUMENTS)]
OTHER_REFERENCE = -torch.arange(30, 30 + 2 * PAIRS, dtype=torch.float64)


def answers(first: int, last: int) -> dict:
    part, count = slice(first, last), last - first
    mismatched = answer_batch(OTHERS[part], count, reference=OTHER_REFERENCE[part])
    columns = {"labels_of_answers": LABELS[part], "mismatched": mismatched, "reference": REFERENCE[part]}
    return answer_batch(DOCUMENTS[part], count, **columns)


def kto_step(model, batches, options) -> tuple[float, torch.Tensor, float]:
    accelerator = Accelerator(cpu=True)
    model.zero_grad()
    targets = kto_targets(accelerator, model, batches, options)
    total = 0.0
    for batch in batches:
        loss = kto_loss(model, batch, options) / targets
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model), float(batches[0]["z0"])


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_a_step_of_single_answers_is_the_same_however_it_is_cut(loss_type):
    model = answering_model()
    options = KtoOptions(loss_type=loss_type, desirable_weight=1.3)
    whole = kto_step(model, [answers(0, 16)], options)
    cuts = [[answers(k, k + 4) for k in (0, 4, 8, 12)], [answers(0, 1), answers(0, 0), answers(1, 16)]]
    for batches in cuts:
        loss, gradient, z0 = kto_step(model, batches, options)
        assert loss == pytest.approx(whole[0], rel=1e-6)
        assert z0 == pytest.approx(whole[2], rel=1e-6) and z0 != 0
        assert relative_distance(gradient, whole[1]) < 1e-5


def test_z0_is_the_mean_over_mismatched_pairs_and_never_negative():
    model = answering_model()
    batch = answers(0, 16)
    kto_targets(Accelerator(cpu=True), model, [batch], KtoOptions())
    mismatched = batch["mismatched"]
    inputs = {name: mismatched[name] for name in ("input_ids", "attention_mask")}
    logits = type(model).forward(model, **inputs).logits.detach().double()
    ratios = []
    for row, (prompt, answer) in enumerate(OTHERS):
        log_p = logits[row].log_softmax(1)
        ratios.append(sum(float(log_p[len(prompt) - 1 + k, t]) for k, t in enumerate(answer)) - OTHER_REFERENCE[row])
    mean = float(sum(ratios) / len(ratios))
    assert float(batch["z0"]) == pytest.approx(max(mean, 0.0), rel=1e-6)
    mismatched["reference"] = OTHER_REFERENCE + mean + 1
    kto_targets(Accelerator(cpu=True), model, [batch], KtoOptions())
    assert batch["z0"] == 0 and model.training


def test_delta_is_the_middle_of_the_classes_and_of_one_class_its_mean():
    model, options = answering_model(), KtoOptions(loss_type="bco")
    batch = answers(0, 16)
    kto_targets(Accelerator(cpu=True), model, [batch], options)
    kto_loss(model, batch, options)
    means = {name: float(a / n) for name, (a, n) in batch["measured"].items()}
    assert means["delta"] == pytest.approx((means["rewards/chosen"] + means["rewards/rejected"]) / 2)
    batch["labels_of_answers"] = torch.zeros_like(LABELS)
    kto_targets(Accelerator(cpu=True), model, [batch], options)
    kto_loss(model, batch, options)
    total, count = batch["measured"]["rewards/rejected"]
    assert float(batch["z0"]) == pytest.approx(float(total / count))
    assert batch["measured"]["rewards/chosen"][1] == 0
