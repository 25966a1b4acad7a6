"""How often a run evaluates and saves where nobody has said it."""

import math
import time

from accel_llm.config.options import RunOptions

PARTS_OF_A_RUN = 10  # of the run: a kill costs one of them at most
FEWEST_STEPS = 10  # between two: a short run is done again as quickly as it is continued
MOST_SECONDS = 30 * 60  # between two checkpoints of a run with slow steps


def fill_intervals(options: RunOptions, total_steps: int) -> None:
    """Set `eval_steps`, `save_steps` and `sample_steps` to a tenth of the run, but at least FEWEST_STEPS, if they are not given."""
    for name in ("eval_steps", "save_steps", "sample_steps"):
        if getattr(options, name, 0) is None:
            # Not an assignment: the object is frozen, and the option must not count as set by the user.
            object.__setattr__(options, name, max(FEWEST_STEPS, math.ceil(total_steps / PARTS_OF_A_RUN)))


class SaveClock:
    """Tells when a checkpoint is due by time: MOST_SECONDS after this object was made, unless `save_steps` is given."""

    def __init__(self, options: RunOptions):
        self.runs, self.since = "save_steps" not in options.model_fields_set, time.monotonic()

    def is_due(self) -> bool:
        return self.runs and time.monotonic() - self.since > MOST_SECONDS
