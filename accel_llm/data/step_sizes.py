"""How many rows each step takes, and how many steps a number of tokens is."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from accel_llm.backend.strategy import rows_per_step
from accel_llm.config.options import TrainOptions
from accel_llm.config.token_options import TokenOptions


@dataclass(frozen=True)
class StepSizes:
    """The rows of each step (from 0): `full`, or fewer in the first `warmup` steps, where they grow in equal parts.

    Step s of the warmup has (s + 1) / (warmup + 1) of the full rows, rounded, and at least one: as the learning rate
    rises. The sizes depend on nothing else, so a resumed run has the same ones on any number of processes.
    """

    full: int
    warmup: int = 0

    @cached_property
    def _ends(self) -> np.ndarray:
        """The rows up to the end of each step of the warmup, int64 [warmup]."""
        parts = np.arange(1, self.warmup + 1, dtype=np.int64)
        return np.cumsum(np.maximum(1, (2 * self.full * parts + self.warmup + 1) // (2 * (self.warmup + 1))))

    def rows_before(self, step: int) -> int:
        """Return the rows of all steps before `step`."""
        inside = min(step, self.warmup)
        return (int(self._ends[inside - 1]) if inside else 0) + (step - inside) * self.full

    def rows(self, step: int) -> int:
        """Return the rows of `step`."""
        return self.rows_before(step + 1) - self.rows_before(step)

    def steps_for(self, rows: int, first: int = 0) -> int:
        """Return how many steps from step `first` on take at least `rows` rows."""
        wanted = self.rows_before(first) + rows
        if self.warmup and wanted <= self._ends[-1]:
            end = int(np.searchsorted(self._ends, wanted)) + 1  # the first step that ends there or later
        else:
            end = self.warmup + -(-(wanted - self.rows_before(self.warmup)) // self.full)
        return max(0, end - first) if rows > 0 else 0


def step_sizes(options: TrainOptions) -> StepSizes:
    """Return the sizes of the steps of a run."""
    warmup = options.batch_warmup_steps if isinstance(options, TokenOptions) else 0
    return StepSizes(rows_per_step(options), warmup)


def fill_token_counts(options: TrainOptions) -> None:
    """Set the steps that `max_tokens`, `warmup_tokens`, `decay_tokens` and `batch_warmup_tokens` mean, rounded up.

    The tokens are those of full rows. The rows of a growing step are half of all on average, so tokens of a batch warmup
    take twice as many steps.
    """
    if not isinstance(options, TokenOptions):
        return
    full = rows_per_step(options) * options.max_length
    if options.batch_warmup_tokens:
        _fill(options, "batch_warmup_steps", -(-2 * options.batch_warmup_tokens // full))
    sizes = step_sizes(options)
    for tokens, name in ((options.max_tokens, "max_steps"), (options.warmup_tokens, "warmup_steps")):
        if tokens:
            _fill(options, name, sizes.steps_for(-(-tokens // options.max_length)))
    if options.decay_tokens:
        _fill(options, "decay_steps", -(-options.decay_tokens // full))


def _fill(options: TrainOptions, name: str, value: int) -> None:
    # Not an assignment: the object is frozen, and the option must not count as set by the user.
    object.__setattr__(options, name, value)
