"""Where a run begins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_llm.data.stream import Position


@dataclass(frozen=True, kw_only=True)
class Start(Position):
    """Where a run begins and what it takes over: nothing at step 0, else what a checkpoint holds, `folder`."""

    output_dir: Path
    identity: dict[str, Any] = field(default_factory=dict)  # what makes the run this run
    folder: Path | None = None
    same_processes: bool = True  # as many as saved the checkpoint
    meter: tuple[float, ...] = (0.0,) * 5  # this process's sums since the last line of metrics
    skipped: int = 0  # steps whose gradient was not finite
    best: tuple[int, float] | None = None  # step and metric of the best checkpoint
    evaluate: bool = False  # an evaluation of this step was due and was cut short
    changed: tuple[str, ...] = ()  # options that differ from the checkpoint's, and are allowed to
