"""The best evaluation of a run so far: which checkpoint to keep and export, and when to stop early."""

import math
from dataclasses import dataclass, replace

# With all other metrics higher is better.
LOWER_IS_BETTER = {"eval/loss", "eval/log_loss", "eval/calibration_error", "eval/mse", "eval/mae"}


@dataclass(frozen=True)
class Best:
    """The best evaluation so far by one metric, and how many were not better since then."""

    step: int | None = None  # None: no value was finite yet
    value: float | None = None
    later: int = 0  # evaluations in a row without a new best

    def after(self, step: int, value: float, metric: str) -> "Best":
        """Return the best after the evaluation of `step`, whose `metric` is `value`; one that is not finite is no better."""
        sign = 1 if metric in LOWER_IS_BETTER else -1
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            return Best(step, value)
        return replace(self, later=self.later + 1)

    def describe(self, metric: str) -> str:
        """Say how many evaluations were not better, and than what."""
        evaluations = f"{self.later} evaluation{'s' * (self.later > 1)} in a row"
        if self.step is None:
            return f"{evaluations} had no finite {metric}"
        return f"{evaluations} had no better {metric} than {self.value:.6g} of step {self.step:,}"
