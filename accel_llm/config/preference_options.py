"""The options of the scripts that train on preferences."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from accel_llm.config.fields import Numbers, PairLosses, Place
from accel_llm.config.method import PROMPT_METHODS
from accel_llm.config.options import SftOptions

# Losses of the policy alone; all others compare it with the reference.
REFERENCE_FREE = {"simpo", "orpo", "cpo", "sft"}
# Options that only some losses use. If one is set for others, that is an error.
LOSSES_BY_OPTION = {
    "label_smoothing": {"sigmoid", "robust"},
    "simpo_gamma": {"simpo"},
    "cpo_alpha": {"cpo"},
    "use_weighting": {"sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "apo_down"},
}
# Betas of papers that take another one than DPO (arXiv 2305.18290): LN-DPO as Tulu 3 trains it (arXiv 2411.15124), and
# SimPO (arXiv 2405.14734), whose authors start from a gamma of half of beta (github.com/princeton-nlp/SimPO).
USUAL_BETA, OTHER_BETAS = 0.1, {"sigmoid_norm": 5.0, "simpo": 2.0}
# First values of a LoRA that adapters/data_starts.py computes from rows.
STARTS_FROM_ROWS = ("eva", "corda", "lora_ga")
# Options of fine-tuning that have no meaning for preferences.
WITHOUT_PREFERENCES = ("overfit", "label_smoothing_factor", "z_loss_coef")
# Those that choose tokens to train, which a reward model does not do.
OF_TOKENS = ("train_on", "train_on_eos")


class AnswerOptions(SftOptions):
    """Answers that are compared"""

    unused: ClassVar[tuple[str, ...]] = WITHOUT_PREFERENCES

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return False

    def problems(self) -> list[str]:
        problems = super().problems()
        problems += [
            f"{name}: it has no effect on preferences; remove it."
            for name in WITHOUT_PREFERENCES
            if name in self.model_fields_set and getattr(self, name)
        ]
        if self.init_lora_weights in STARTS_FROM_ROWS:
            problems.append(
                f"init_lora_weights: {self.init_lora_weights} is computed from the loss or the tokens of rows to fine-tune "
                "on, not of preferences; remove it."
            )
        if self.prompt_ensemble > 1:
            problems.append(f"prompt_ensemble: {self.prompt_ensemble} prompts cannot share preferences; remove it.")
        return problems


class PreferenceOptions(AnswerOptions):
    """Reference"""

    reference_model_name_or_path: Place | None = Field(
        None, description="Folder or hub id of the reference; none: the model as it is before the first step"
    )

    @property
    def needs_reference(self) -> bool:
        return True

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.reference_model_name_or_path and not self.needs_reference:
            problems.append("reference_model_name_or_path: no loss in loss_type uses a reference; remove it.")
        return problems


class PairOptions(AnswerOptions):
    """Pairs of answers"""

    scored_answers: Literal["best_worst", "all_pairs"] = Field(
        "best_worst",
        description="Pairs of a row of several answers with scores: the best and the worst one, or each two with other scores",
    )


def _beta_of_losses(values: dict[str, Any]) -> float:
    """Return the default beta of the first loss that uses one; `values` are the options before it."""
    return next((_usual_beta(name) for name in values.get("loss_type", []) if name != "sft"), USUAL_BETA)


def _usual_beta(loss: str) -> float:
    return OTHER_BETAS.get(loss, USUAL_BETA)


class DpoOptions(PreferenceOptions, PairOptions):
    """Losses of pairs of answers"""

    loss_type: PairLosses = Field(
        default_factory=lambda: ["sigmoid"], description="Losses, added up by loss_weights; sigmoid is DPO"
    )
    loss_weights: Numbers = Field(default_factory=list, description="A weight for each of loss_type; none: 1 each")
    beta: float = Field(
        default_factory=_beta_of_losses,
        gt=0,
        description="Strength of the tie to the reference, IPO's tau, ORPO's lambda; by default 5 for sigmoid_norm, 2 for simpo",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a preference is wrong, for sigmoid (cDPO) and robust"
    )
    simpo_gamma: float = Field(
        default_factory=lambda values: values.get("beta", OTHER_BETAS["simpo"]) / 2,
        ge=0,
        description="SimPO: target margin between the rewards; by default half of beta",
    )
    cpo_alpha: float = Field(1.0, ge=0, description="CPO: weight of the mean loss of the chosen answer's tokens")
    rpo_alpha: float = Field(
        0.0, ge=0, description="Weight of the mean loss of the chosen answer's tokens, beside any loss (as sft)"
    )
    use_weighting: bool = Field(
        False, description="WPO: weight each pair by how likely the policy is to give its answers"
    )
    metric_for_best_model: (
        Literal["eval/loss", "eval/exact_match", "eval/rewards/accuracies", "eval/rewards/margins"] | None
    ) = Field(None, description="Keep and export the checkpoint that is best by this metric; none: export the last one")

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        weights = dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))
        return weights | ({"sft": self.rpo_alpha} if self.rpo_alpha else {})

    @property
    def needs_reference(self) -> bool:
        return not REFERENCE_FREE.issuperset(self.loss_type)

    def problems(self) -> list[str]:
        problems = super().problems()
        names = set(self.loss_type)
        problems += [
            f"{option}: only loss_type {' or '.join(sorted(losses))} uses it, but loss_type is "
            f"{', '.join(self.loss_type)}; remove it."
            for option, losses in LOSSES_BY_OPTION.items()
            if option in self.model_fields_set and getattr(self, option) and not losses & names
        ]
        if "robust" in names and not self.label_smoothing:
            problems.append(
                "label_smoothing: with 0 the loss robust is sigmoid; give the share of preferences that are wrong, or use "
                "loss_type: sigmoid."
            )
        if len(names) < len(self.loss_type):
            problems.append(f"loss_type: {', '.join(self.loss_type)} names a loss twice; give each once.")
        betas = {name: _usual_beta(name) for name in self.loss_type if name != "sft"}
        if "beta" not in self.model_fields_set and len(set(betas.values())) > 1:
            problems.append(
                f"beta: it is one for all losses, but usual are {', '.join(f'{b:g} for {n}' for n, b in betas.items())}; "
                "give a value."
            )
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            problems.append(
                f"loss_weights: {len(self.loss_weights)} weights do not fit {len(self.loss_type)} losses in loss_type "
                f"({', '.join(self.loss_type)}); give one for each."
            )
        if any(weight <= 0 for weight in self.loss_weights):
            problems.append(f"loss_weights: {min(self.loss_weights):g} is not positive; leave that loss out.")
        if "sft" in names and self.rpo_alpha:
            problems.append("rpo_alpha: sft in loss_type is the same term; give one of them.")
        return problems


class KtoOptions(PreferenceOptions):
    """Losses of answers with a label"""

    loss_type: Literal["kto", "bco"] = Field("kto", description="Loss of answers that are desirable or undesirable")
    beta: float = Field(USUAL_BETA, gt=0, description="Strength of the tie to the reference")
    desirable_weight: float = Field(1.0, ge=0, description="Weight of desirable answers in the loss")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of undesirable answers in the loss")
    metric_for_best_model: Literal["eval/loss", "eval/exact_match", "eval/rewards/margins"] | None = Field(
        None, description="Keep and export the checkpoint that is best by this metric; none: export the last one"
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        if not (self.desirable_weight or self.undesirable_weight):
            problems.append("desirable_weight: it and undesirable_weight are both 0, so nothing is learned.")
        return problems


class RewardOptions(PairOptions):
    """Rewards"""

    unused: ClassVar[tuple[str, ...]] = (*WITHOUT_PREFERENCES, *OF_TOKENS, "eval_generate", "add_tokens")

    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="Weight of (reward of chosen + reward of rejected)^2, which keeps rewards around 0"
    )
    metric_for_best_model: Literal["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"] | None = Field(
        None, description="Keep and export the checkpoint that is best by this metric; none: export the last one"
    )

    @property
    def gives_scores(self) -> bool:
        return True

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.eval_generate:
            problems.append(f"eval_generate: {self.eval_generate} answers, but a reward model gives scores; remove it.")
        problems += [
            f"{name}: {getattr(self, name)} chooses tokens to train, but a reward model is trained on whole conversations; "
            "remove it."
            for name in OF_TOKENS
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.add_tokens:
            problems.append(
                "add_tokens: a reward model is trained on tokens that its base knows; add them in launch/sft.py, and go "
                "on with that model."
            )
        if self.method in PROMPT_METHODS:
            problems.append(
                f"method: {self.method} trains virtual tokens, whose file has no place for the head of a reward model; "
                "use lora."
            )
        return problems
