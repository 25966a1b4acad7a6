"""Every loss beside its paper's formula, written here anew in plain float64, and beside TRL's own code."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy import exp, log

from accel_llm.config.preference_options import DpoOptions, KtoOptions
from accel_llm.preference.losses import (
    PAIR_LOSSES,
    PairScores,
    answer_weights,
    bco_losses,
    kto_losses,
    pair_losses,
    pair_rewards,
)

BETA, SMOOTHING, GAMMA, ALPHA = 0.3, 0.1, 0.7, 0.6


def options(*names: str, weights: tuple[float, ...] = (), beta: float = BETA, **others) -> DpoOptions:
    used = {"sigmoid": {"label_smoothing": SMOOTHING}, "robust": {"label_smoothing": SMOOTHING}}
    used |= {"simpo": {"simpo_gamma": GAMMA}, "cpo": {"cpo_alpha": ALPHA}}
    own = {key: value for name in names for key, value in used.get(name, {}).items()}
    return DpoOptions(loss_type=list(names), loss_weights=list(weights), beta=beta, **own | others)


def random_scores(pairs: int = 16, seed: int = 0) -> PairScores:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(pairs, generator=generator, dtype=torch.float64)

    tokens = [torch.randint(1, 40, (pairs,), generator=generator) for _ in range(2)]
    policy = [uniform(-60, -0.5) for _ in range(2)]
    reference = [values + uniform(-6, 6) for values in policy]
    return PairScores(*policy, *reference, *tokens)


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


def by_paper(name: str, w: float, l: float, rw: float, rl: float, nw: int, nl: int) -> float:  # noqa: E741
    """One pair, as the paper writes it: w and l are log pi, rw and rl log ref, nw and nl numbers of tokens."""
    h = log(exp(w - rw) / exp(l - rl))
    match name:
        case "sigmoid":
            return -(1 - SMOOTHING) * log(s(BETA * h)) - SMOOTHING * log(s(-BETA * h))
        case "sigmoid_norm":
            return -log(s(BETA / nw * (w - rw) - BETA / nl * (l - rl)))
        case "ipo":
            return (h - 1 / (2 * BETA)) ** 2
        case "hinge":
            return max(0.0, 1 - BETA * h)
        case "robust":
            right, wrong = -log(s(BETA * h)), -log(s(-BETA * h))
            return ((1 - SMOOTHING) * right - SMOOTHING * wrong) / (1 - 2 * SMOOTHING)
        case "apo_zero":
            return -s(BETA * (w - rw)) + s(BETA * (l - rl))
        case "apo_down":
            return s(BETA * (w - rw)) - s(BETA * (w - rw) - BETA * (l - rl))
        case "simpo":
            return -log(s(BETA / nw * w - BETA / nl * l - GAMMA))
        case "orpo":
            pw, pl = exp(w / nw), exp(l / nl)
            return -w / nw - BETA * log(s(log((pw / (1 - pw)) / (pl / (1 - pl)))))
        case "cpo":
            return -log(s(BETA * w - BETA * l)) - ALPHA * w / nw
        case "sft":
            return -w / nw
    raise AssertionError(name)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_is_that_of_its_paper(name):
    scores = random_scores()
    expected = [by_paper(name, *numbers) for numbers in zip(*(values.tolist() for values in scores), strict=True)]
    np.testing.assert_allclose(pair_losses(scores, options(name)), expected, rtol=1e-9, atol=1e-12)


def test_every_loss_has_a_name_among_the_options():
    DpoOptions(loss_type=list(PAIR_LOSSES))


def test_several_losses_add_up_by_weight():
    scores = random_scores()
    mixed = pair_losses(scores, options("sigmoid", "sft", weights=(2.0, 0.1)))
    expected = 2 * pair_losses(scores, options("sigmoid")) + 0.1 * pair_losses(scores, options("sft"))
    torch.testing.assert_close(mixed, expected)
    by_option = pair_losses(scores, options("sigmoid", weights=(2.0,), rpo_alpha=0.1))
    torch.testing.assert_close(by_option, expected)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_are_those_of_the_loss(name):
    scores = random_scores(4)
    inputs = [values.clone().requires_grad_() for values in scores[:2]]

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return pair_losses(PairScores(chosen, rejected, *scores[2:]), options(name))

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_limits_are_finite(name, dtype):
    """Certain answers (log p = 0), impossible ones, and margins of both signs far beyond what exp can hold."""
    values = torch.tensor([0.0, -1e-9, -1e4, -1e4, -3e3, 0.0], dtype=dtype)
    chosen, rejected = values.clone().requires_grad_(), values.flip(0).clone().requires_grad_()
    tokens = torch.full((6,), 2)
    scores = PairScores(chosen, rejected, torch.zeros(6, dtype=dtype), torch.zeros(6, dtype=dtype), tokens, tokens)
    losses = pair_losses(scores, options(name))
    losses.sum().backward()
    for result in (losses, chosen.grad, rejected.grad):
        assert (name == "sft" and result is None) or result.isfinite().all()


def test_dpo_before_its_first_step_is_ln_2():
    scores = random_scores()
    same = scores._replace(chosen_reference=scores.chosen, rejected_reference=scores.rejected)
    np.testing.assert_allclose(pair_losses(same, options("sigmoid")), log(2), rtol=1e-15)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "simpo", "cpo"])
def test_a_larger_margin_between_rewards_is_a_smaller_loss(name):
    scores = random_scores(64)
    chosen, rejected = pair_rewards(scores, options(name))
    plain = options(name, label_smoothing=0.0, cpo_alpha=0.0)
    assert (pair_losses(scores, plain)[(chosen - rejected).argsort()].diff() <= 1e-12).all()


# --- WPO -------------------------------------------------------------------------------------------------------------


def test_weights_of_wpo_are_those_of_the_paper():
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, numbers = torch.tensor([3, 1, 4, 1, 5, 9, 2]), torch.tensor([0, 0, 0, 2, 2, 1, 1])
    p = logits.softmax(1)
    expected = []
    for answer in range(3):
        tokens = [t for t in range(7) if numbers[t] == answer]
        ratios = [float(p[t, ids[t]]) / sum(float(q) ** 2 for q in p[t]) for t in tokens]
        expected.append(exp(sum(log(ratio) for ratio in ratios) / len(ratios)))
    at_ids = p.log().gather(1, ids[:, None]).squeeze(1)
    weights = answer_weights(at_ids.requires_grad_(), p.square().sum(1).log(), numbers, torch.tensor([3, 2, 2]))
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert not weights.requires_grad

    scores, pairs = random_scores(3), weights * weights.flip(0)
    mixed = options("sigmoid", "sft", weights=(1.0, 0.5), use_weighting=True)
    plain = [pair_losses(scores, options(name)) for name in ("sigmoid", "sft")]
    torch.testing.assert_close(pair_losses(scores, mixed, pairs), pairs * plain[0] + 0.5 * plain[1])


# --- answers with a label --------------------------------------------------------------------------------------------


def kto_options(name: str = "kto") -> KtoOptions:
    return KtoOptions(loss_type=name, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)


RATIOS = torch.tensor([2.0, -3.0, 0.5, -0.1], dtype=torch.float64)
DESIRABLE = torch.tensor([True, True, False, False])


def test_kto_is_the_loss_of_its_paper():
    z0 = 0.8
    value = [
        1.5 * s(BETA * (r - z0)) if good else 0.5 * s(BETA * (z0 - r))
        for r, good in zip(RATIOS.tolist(), DESIRABLE.tolist(), strict=True)
    ]
    expected = [(1.5 if good else 0.5) - v for v, good in zip(value, DESIRABLE.tolist(), strict=True)]
    np.testing.assert_allclose(kto_losses(RATIOS, DESIRABLE, z0, kto_options()), expected, rtol=1e-12)


def test_bco_is_the_loss_of_its_paper():
    delta = 0.4
    expected = [
        -1.5 * log(s(BETA * r - delta)) if good else -0.5 * log(s(-(BETA * r - delta)))
        for r, good in zip(RATIOS.tolist(), DESIRABLE.tolist(), strict=True)
    ]
    np.testing.assert_allclose(bco_losses(RATIOS, DESIRABLE, delta, kto_options("bco")), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", [kto_losses, bco_losses])
def test_losses_of_single_answers_have_right_gradients_and_finite_limits(loss):
    name = "kto" if loss is kto_losses else "bco"
    function = lambda r: loss(r, DESIRABLE, 0.3, kto_options(name))  # noqa: E731
    assert torch.autograd.gradcheck(function, [RATIOS.clone().requires_grad_()])
    far = torch.tensor([1e5, -1e5, 1e5, -1e5], requires_grad=True)
    losses = function(far)
    losses.sum().backward()
    assert losses.isfinite().all() and far.grad is not None and far.grad.isfinite().all()


# --- TRL beside ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_trl_computes_the_same_or_what_the_docstrings_say(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    # Answers of equal length, so that no mean depends on how a batch is cut; one token of prompt before each.
    pairs, tokens = 6, 5
    log_p, reference = -torch.rand(2, 2 * pairs, tokens, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2 * pairs, tokens + 1, dtype=torch.long)
    mask[:, 0] = 0
    sums, reference_sums = log_p.double().sum(1), reference.double().sum(1)
    counts = torch.full((pairs,), tokens)
    scores = PairScores(*sums.split(pairs), *reference_sums.split(pairs), counts, counts)

    class Model(torch.nn.Module):
        def forward(self, **_):
            zeros = torch.zeros_like(log_p)
            return SimpleNamespace(
                log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros > 1, log_sum_sq_probs=log_p * 1.5
            )

    accelerator = Accelerator(cpu=True)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference_sums[:pairs].float(), "ref_rejected_logps": reference_sums[pairs:].float()}

    def by_trl(name: str, use_weighting: bool = False) -> float:
        trainer = SimpleNamespace(
            model=Model(), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=BETA,
            label_smoothing=SMOOTHING, use_weighting=use_weighting, _total_train_tokens=0, _tp_size=1,
            _metrics={"train": defaultdict(list)},
        )  # fmt: skip
        return float(trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False))

    def ours(chosen: DpoOptions, weights: torch.Tensor | None = None) -> float:
        return float(pair_losses(scores, chosen, weights).mean())

    assert by_trl("sigmoid") == pytest.approx(ours(options("sigmoid", label_smoothing=0.0)), rel=1e-6)
    for name in ("sigmoid_norm", "hinge", "robust", "sft"):
        assert by_trl(name) == pytest.approx(ours(options(name)), rel=1e-6)
    for name in ("apo_zero", "apo_down"):
        assert by_trl(name) == pytest.approx(ours(options(name)) + 1, rel=1e-6)
    by_mean = PairScores(*(values / tokens for values in scores[:4]), *scores[4:])
    assert by_trl("ipo") == pytest.approx(float(pair_losses(by_mean, options("ipo")).mean()), rel=1e-6)
    numbers = torch.arange(2 * pairs).repeat_interleave(tokens)
    weights = answer_weights(log_p.flatten(), 1.5 * log_p.flatten(), numbers, counts.repeat(2))
    expected = ours(options("hinge", use_weighting=True), weights[:pairs] * weights[pairs:])
    assert by_trl("hinge", use_weighting=True) == pytest.approx(expected, rel=1e-6)

    # Reference-free trainers: the loss without the fine-tuning term.
    means = tuple(values / tokens for values in sums.split(pairs))
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=accelerator, loss_type="simpo", beta=BETA, simpo_gamma=GAMMA, label_smoothing=0.0
    )
    by_cpo = CPOTrainer.cpo_loss(trainer, *means)[0]
    torch.testing.assert_close(by_cpo, pair_losses(scores, options("simpo")))
    trainer.loss_type = "sigmoid"
    by_cpo = CPOTrainer.cpo_loss(trainer, *sums.split(pairs))[0]
    torch.testing.assert_close(by_cpo, pair_losses(scores, options("cpo", cpo_alpha=0.0)))
    by_orpo = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=BETA, accelerator=accelerator), *means)[0]
    expected = pair_losses(scores, options("orpo")) - pair_losses(scores, options("sft"))
    torch.testing.assert_close(-by_orpo, expected.float(), rtol=1e-5, atol=1e-6)
