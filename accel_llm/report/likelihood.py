"""Warns when a preference run makes the chosen answers steadily less likely.

A loss on pairs can fall although both answers become less likely, the chosen one only more slowly than the rejected
one. What becomes more likely then is neither of them. Pal et al. 2024, arXiv 2402.13228; Razin et al. 2024, arXiv
2410.08847.
"""

import math
from typing import Any

import numpy as np

from accel_llm.config.options import RunOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions

# The rule looks at the last LINES lines of metrics, and at least at FEWEST of them. Where nothing falls, chance gives a
# trend of DEVIATIONS standard deviations about once in 30,000 lines.
LINES, FEWEST, DEVIATIONS = 100, 10, 4.0
LEAST_FALL = 0.1  # of the mean reward, which is beta times a log-probability: 1 nat with a beta of 0.1


class ChosenLikelihood:
    """Watches the mean reward of the chosen answers from one line of metrics to the next.

    The reward is beta times log pi - log ref, or log pi without a reference. It shows the same fall as the
    log-probability itself, but hardly depends on which answers a line is the mean of.
    """

    def __init__(self, options: RunOptions):
        # APO-down makes chosen answers less likely on purpose.
        pairs = isinstance(options, DpoOptions) and "apo_down" not in options.loss_type
        self.options: Any = options if pairs or isinstance(options, KtoOptions) else None
        self.values: list[float] = []
        self.warning: str | None = None

    def add(self, line: dict[str, Any]) -> bool:
        """Take a line of metrics; return True if it is the one that makes the `warning`, once in a run."""
        value = line.get("rewards/chosen")
        if self.options is None or self.warning or value is None or not math.isfinite(value):
            return False
        self.values = [*self.values[1 - LINES :], value]
        if not falls_steadily(self.values):
            return False
        self.warning = (
            f"chosen answers become less and less likely: their mean reward fell by {fall(self.values):.2g} up to step "
            f"{line['step']:,}. {_advice(self.options)} (arXiv 2402.13228)."
        )
        return True


def falls_steadily(values: list[float]) -> bool:
    """Return whether a series has fallen by LEAST_FALL, and so often from any value to any later one that it is no chance.

    That is the test of Mann (1945) and Kendall. Among n values in random order, the number of rises less that of falls
    has mean 0 and variance n (n - 1) (2 n + 5) / 18.
    """
    n = len(values)
    if n < FEWEST or fall(values) < LEAST_FALL:
        return False
    series = np.array(values)
    surplus = np.triu(np.sign(series[None] - series[:, None])).sum()
    return surplus <= -DEVIATIONS * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def fall(values: list[float]) -> float:
    """Return how much the mean of the last quarter of a series is below that of the first quarter."""
    quarter = max(1, len(values) // 4)
    return float(np.mean(values[:quarter]) - np.mean(values[-quarter:]))


def _advice(options: DpoOptions | KtoOptions) -> str:
    remedies = ["lower learning_rate"] + ["raise beta"] * options.needs_reference
    if isinstance(options, KtoOptions):
        remedies.append("raise desirable_weight")
    else:
        remedies.append(f"{'raise' if 'sft' in options.losses else 'set'} rpo_alpha, which trains on them too")
    text = f"{', '.join(remedies[:-1])} or {remedies[-1]}"
    return f"If good answers must stay likely, {text}"
