"""The losses of preference training: pure functions of log-probabilities, one value for each pair or answer.

In the formulas y_w is the chosen (winning) answer to the prompt x and y_l the rejected one, log pi(y|x) the sum of the
log-probabilities of the tokens of y, |y| their number, pi the policy and ref the reference. s is the sigmoid, and

    r(y) = log pi(y|x) - log ref(y|x)        h = r(y_w) - r(y_l)

Nothing here exponentiates a large number, so a margin of any size gives a finite loss and a finite gradient.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from accel_llm.config.preference_options import LOSSES_BY_OPTION, DpoOptions, KtoOptions

WEIGHTED = LOSSES_BY_OPTION["use_weighting"]
# The largest mean log-probability whose odds are computed: float32 cannot tell a larger one from 0, with infinite odds.
LARGEST_MEAN = -(2.0**-24)


class PairScores(NamedTuple):
    """What the losses of pairs read, each [pairs]: sums of log p, those of the reference, and numbers of tokens."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_reference: torch.Tensor
    rejected_reference: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """r(y_w) and r(y_l)."""
        return self.chosen - self.chosen_reference, self.rejected - self.rejected_reference

    @property
    def margin(self) -> torch.Tensor:
        """h."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi(y_w|x) / |y_w| and log pi(y_l|x) / |y_l|."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def sigmoid_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """DPO: -log s(beta h); with label smoothing e cDPO: -(1 - e) log s(beta h) - e log s(-beta h).

    DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7. cDPO: Mitchell 2023, "A note on DPO with noisy preferences". TRL 1.16 ignores `label_smoothing` in this loss.
    """
    return _smoothed(options.beta * scores.margin, options.label_smoothing)


def _smoothed(reward_margin: torch.Tensor, smoothing: float) -> torch.Tensor:
    loss = -F.logsigmoid(reward_margin)
    # -log s(-m) = m - log s(m), which needs no second logarithm.
    return loss + smoothing * reward_margin if smoothing else loss


def sigmoid_norm_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """Length-normalised DPO (LN-DPO): -log s(beta r(y_w) / |y_w| - beta r(y_l) / |y_l|).

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, section 5. TRL names it sigmoid_norm. Its beta is larger than that
    of DPO: 5 in the paper.
    """
    chosen, rejected = scores.ratios
    return -F.logsigmoid(options.beta * (chosen / scores.chosen_tokens - rejected / scores.rejected_tokens))


def ipo_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """IPO: (h - 1 / (2 tau))^2 with tau = beta.

    Azar et al. 2023, arXiv 2310.12036, equation 17. As in the paper h is a difference of whole answers. TRL 1.16 takes
    r(y) / |y| in place of r(y): there a beta of 0.1 asks for a margin of 5 for each token, here for each answer.
    """
    return (scores.margin - 1 / (2 * options.beta)).square()


def hinge_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """SLiC's hinge on DPO's margin: max(0, 1 - beta h).

    Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425; in this form Liu et al. 2023 (RSO), arXiv 2309.06657.
    """
    return torch.relu(1 - options.beta * scores.margin)


def robust_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """rDPO: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e), where e is the share of wrong preferences.

    Chowdhury et al. 2024, arXiv 2403.00409. In the mean over wrong labels it is DPO's loss of right ones.
    """
    reward_margin, wrong = options.beta * scores.margin, options.label_smoothing
    return -F.logsigmoid(reward_margin) - wrong / (1 - 2 * wrong) * reward_margin


def apo_zero_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """APO-zero: -s(beta r(y_w)) + s(beta r(y_l)). For chosen answers that are better than the model's own.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, section 4. TRL 1.16 adds the constant 1.
    """
    chosen, rejected = scores.ratios
    return torch.sigmoid(options.beta * rejected) - torch.sigmoid(options.beta * chosen)


def apo_down_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """APO-down: s(beta r(y_w)) - s(beta h). For chosen answers that are worse than the model's own.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, section 4. TRL 1.16 adds the constant 1.
    """
    chosen, _ = scores.ratios
    return torch.sigmoid(options.beta * chosen) - torch.sigmoid(options.beta * scores.margin)


def simpo_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """SimPO: -log s(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma). It has no reference.

    Meng et al. 2024, arXiv 2405.14734, equation 6; beta is 2 to 10 there. TRL's CPOTrainer adds CPO's term to it
    unless its `cpo_alpha` is 0.
    """
    chosen, rejected = scores.means
    return -F.logsigmoid(options.beta * (chosen - rejected) - options.simpo_gamma)


def orpo_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """ORPO: -m_w - lambda log s(log odds(y_w) - log odds(y_l)), lambda = beta. It has no reference.

    m = log pi(y|x) / |y| is an answer's mean log-probability, and log odds = m - log(1 - exp(m)). Hong et al. 2024,
    arXiv 2403.07691, equations 1 to 7. TRL's ORPOTrainer takes -m_w over the prompt and the answer of all pairs of
    a batch together.
    """
    chosen, rejected = scores.means
    return -chosen - options.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) for log p = `mean`."""
    mean = mean.clamp(max=LARGEST_MEAN)
    return mean - torch.log(-torch.expm1(mean))


def cpo_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """CPO: -log s(beta log pi(y_w|x) - beta log pi(y_l|x)) + alpha times `sft_loss`. It has no reference.

    Xu et al. 2024, arXiv 2401.08417. The second term is -log pi(y_w|x) there; as in the program of
    its authors and in TRL it is the mean over tokens here, so that alpha does not depend on lengths. Theirs is the mean
    over prompt and answer of all pairs of a batch together.
    """
    return -F.logsigmoid(options.beta * (scores.chosen - scores.rejected)) + options.cpo_alpha * sft_loss(
        scores, options
    )


def sft_loss(scores: PairScores, options: DpoOptions) -> torch.Tensor:
    """The loss of fine-tuning on chosen answers, -log pi(y_w|x) / |y_w|: a mean for each pair, whatever its length.

    Added to DPO's loss: Pang et al. 2024 (RPO), arXiv 2404.19733.
    """
    return -scores.means[0]


PAIR_LOSSES = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "cpo": cpo_loss,
    "sft": sft_loss,
}


def pair_losses(scores: PairScores, options: DpoOptions, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the loss of each pair [pairs]: the losses of the options, each times its weight.

    `weights` [pairs] are those of WPO (`answer_weights`). Losses without a reference, and terms of fine-tuning, which
    prefer nothing, go without them.
    """
    total = torch.zeros_like(scores.chosen)
    for name, factor in options.losses.items():
        loss = PAIR_LOSSES[name](scores, options)
        total = total + factor * (loss if weights is None or name not in WEIGHTED else weights * loss)
    return total


def answer_weights(
    log_probabilities: torch.Tensor, log_squares: torch.Tensor, numbers: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Return WPO's weight of each answer [answers], without gradient: about 1 for an answer that the policy would give.

    w(x, y) = exp(mean over the tokens t of y of log p(t) - log sum_v p(v)^2). Zhou et al. 2024, arXiv 2406.11827,
    the sampled alignment of section 3. `log_probabilities` and `log_squares` [n] are those of all tokens, `numbers` [n]
    the answers that they belong to, and `tokens` [answers] the number of tokens of each answer.
    """
    terms = (log_probabilities - log_squares).detach().double()
    return torch.exp(terms.new_zeros(len(tokens)).index_add(0, numbers, terms) / tokens)


def pair_rewards(scores: PairScores, options: DpoOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rewards of the chosen and of the rejected answers, [pairs] each, as the first loss sees them.

    They are beta r(y); beta r(y) / |y| for sigmoid_norm; and for losses without a reference beta log pi(y|x) (cpo) or
    beta log pi(y|x) / |y|.
    """
    name = options.loss_type[0]
    if name == "sigmoid_norm":
        chosen, rejected = scores.ratios
        values = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
    elif name in ("simpo", "orpo", "sft"):
        values = scores.means
    else:
        values = (scores.chosen, scores.rejected) if name == "cpo" else scores.ratios
    return options.beta * values[0], options.beta * values[1]


def kto_losses(
    ratios: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor | float, options: KtoOptions
) -> torch.Tensor:
    """KTO: lambda_D (1 - s(beta (r - z0))) for a desirable answer, lambda_U (1 - s(beta (z0 - r))) for an undesirable one.

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4. `ratios` [answers] are r(y), `desirable` is a truth
    value for each, and `kl` is z0 without gradient, see `kto_targets`.
    """
    signs = torch.where(desirable, 1.0, -1.0).to(ratios.dtype)
    factors = torch.where(desirable, options.desirable_weight, options.undesirable_weight).to(ratios.dtype)
    return factors * torch.sigmoid(-signs * options.beta * (ratios - kl))


def bco_losses(
    ratios: torch.Tensor, desirable: torch.Tensor, shift: torch.Tensor | float, options: KtoOptions
) -> torch.Tensor:
    """BCO: -log s(beta r - delta) for a desirable answer, -log s(delta - beta r) for an undesirable one, each weighted.

    Jung et al. 2024, arXiv 2404.04656. delta (`shift`) is the middle between the mean rewards beta r
    of both classes, without gradient; the paper follows it from step to step, here it is that of the step itself.
    """
    signs = torch.where(desirable, 1.0, -1.0).to(ratios.dtype)
    factors = torch.where(desirable, options.desirable_weight, options.undesirable_weight).to(ratios.dtype)
    return -factors * F.logsigmoid(signs * (options.beta * ratios - shift))
