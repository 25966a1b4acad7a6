"""Where a run begins: at step 0, or at the step of a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_llm.data.stream import Position
from accel_llm.training.best import Best


@dataclass(frozen=True, kw_only=True)
class Start(Position):
    """The position in the data at which a run begins, and the values that it takes from the checkpoint `folder`."""

    output_dir: Path
    identity: dict[str, Any] = field(default_factory=dict)  # fingerprints of base and data, rows in a step
    folder: Path | None = None  # None: no checkpoint, the run begins at step 0
    same_processes: bool = True  # False: another number of processes saved the checkpoint
    meter: tuple[float, ...] = (0.0,) * 5  # this process's sums since the last line of metrics, see `Meter.state`
    skipped: int = 0  # steps whose gradient was not finite
    spikes: int = 0  # steps that were skipped as spikes
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last steps, see `BadSteps`
    best: Best = field(default_factory=Best)  # the best evaluation so far
    evaluate: bool = False  # the evaluation of this step was interrupted and is still to do
    changed: tuple[str, ...] = ()  # options that differ from the checkpoint's, as allowed by allow_changed
