"""The options of the script that trains classifiers of whole texts."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from accel_llm.config.data_options import TURN_OPTIONS
from accel_llm.config.method import PROMPT_METHODS
from accel_llm.config.options import TrainOptions

CLASS_LOSSES = ("single_label_classification", "multi_label_classification")
# The other spellings of the problem types that people write.
_PROBLEM_TYPES = {"single_label": CLASS_LOSSES[0], "multi_label": CLASS_LOSSES[1]}
# Metrics by which a checkpoint can be the best, and the problem types that have them.
METRICS_BY_PROBLEM_TYPE = {
    "eval/accuracy": CLASS_LOSSES,
    "eval/f1_macro": CLASS_LOSSES,
    "eval/f1_micro": CLASS_LOSSES,
    "eval/mcc": CLASS_LOSSES[:1],
    "eval/auc": CLASS_LOSSES,
    "eval/log_loss": CLASS_LOSSES,
    "eval/calibration_error": CLASS_LOSSES,
    "eval/mse": ("regression",),
    "eval/mae": ("regression",),
    "eval/pearson": ("regression",),
    "eval/spearman": ("regression",),
}


def _read_problem_type(value: Any) -> Any:
    return _PROBLEM_TYPES.get(value, value) if isinstance(value, str) else value


def _read_weights(value: Any) -> Any:
    """Read one number, or `balanced`, as the flag of a list gives it."""
    if isinstance(value, list) and value == ["balanced"]:
        return "balanced"
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


class ClassifyOptions(TrainOptions):
    """Classes"""

    unused: ClassVar[tuple[str, ...]] = (*TURN_OPTIONS, "eval_generate", "z_loss_coef")

    problem_type: Annotated[
        Literal["single_label_classification", "multi_label_classification", "regression"] | None,
        BeforeValidator(_read_problem_type),
    ] = Field(None, description="What a label is: one class, several classes, or a number; none: found in the labels")
    class_weights: Annotated[Literal["balanced"] | list[float], BeforeValidator(_read_weights)] = Field(
        default_factory=list,
        description="Weight of each class in the loss, in the order of the classes; balanced: all classes weigh the same",
    )
    focal_gamma: float = Field(
        0.0, ge=0, description="Focal loss: how much less texts count whose class is easily told; 0: all count the same"
    )
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="Share of each target that is spread over the classes, in training only"
    )
    metric_for_best_model: (
        Literal[
            "eval/loss",
            "eval/accuracy",
            "eval/f1_macro",
            "eval/f1_micro",
            "eval/mcc",
            "eval/auc",
            "eval/log_loss",
            "eval/calibration_error",
            "eval/mse",
            "eval/mae",
            "eval/pearson",
            "eval/spearman",
        ]
        | None
    ) = Field(None, description="Keep and export the checkpoint that is best by this metric; none: export the last one")

    @property
    def gives_scores(self) -> bool:
        return True

    def problems(self) -> list[str]:
        problems = super().problems()
        problems += [
            f"{name}: a classifier learns the label of a whole text, and no turns or tokens; remove it."
            for name in type(self).unused
            if name in self.model_fields_set and getattr(self, name)
        ]
        if self.problem_type == "regression":
            problems += [
                f"{name}: only classes use it, but problem_type is regression; remove it."
                for name in ("class_weights", "focal_gamma", "label_smoothing_factor")
                if name in self.model_fields_set and getattr(self, name)
            ]
        metric = self.metric_for_best_model
        if self.problem_type and self.problem_type not in METRICS_BY_PROBLEM_TYPE.get(
            metric or "", (*CLASS_LOSSES, "regression")
        ):
            names = [name for name, types in METRICS_BY_PROBLEM_TYPE.items() if self.problem_type in types]
            problems.append(
                f"metric_for_best_model: {metric} is not computed for {self.problem_type}; use eval/loss, {', '.join(names)}."
            )
        if any(weight < 0 for weight in self.class_weights if weight != "balanced" and not isinstance(weight, str)):
            problems.append(f"class_weights: {min(self.class_weights)} is negative; give numbers of at least 0.")  # type: ignore
        if self.class_weights not in ([], "balanced") and not any(self.class_weights):
            problems.append("class_weights: all are 0, so nothing is learned; give one above 0.")
        if self.prompt_ensemble > 1:
            problems.append(f"prompt_ensemble: {self.prompt_ensemble} prompts cannot share a head; remove it.")
        if self.method in PROMPT_METHODS:
            problems.append(
                f"method: {self.method} trains virtual tokens, whose file has no place for the head of a classifier; "
                "use lora."
            )
        return problems
