"""Trackers of experiments, such as wandb. They get the metrics of a run, and none of them can end it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import RunOptions
from accel_llm.report.record import Record
from accel_llm.system.out_of_memory import memory_reason

DEFAULT_PROJECT = "accel-llm"
# Environment variables that name the project: those of the trackers, and those that other trainers read.
PROJECT_VARIABLES = {
    "wandb": ("WANDB_PROJECT",),
    "trackio": ("TRACKIO_PROJECT",),
    "swanlab": ("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT"),
}
RUN_NAME_ARGUMENTS = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name"}


class RunTrackers:
    """Sends metrics to the trackers of `report_to`, from the main process.

    A tracker that raises an error is left out from then on; the record of the run says so.
    """

    def __init__(self, accelerator: Accelerator, options: RunOptions, record: Record):
        """Start the trackers, with the options as the settings of the run."""
        self.record = record
        self.active: list[Any] = accelerator.trackers  # where Accelerate keeps them
        if not accelerator.is_main_process:
            return
        # Trackers accept numbers and texts only.
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in resolved_options(options).items()}
        # Accelerator.init_trackers of 1.15 starts all trackers or, if one of them fails, none.
        for name in options.report_to:
            with self._leaving_out_failed(name, "the start"):
                tracker = build_tracker(name, options.run_name, accelerator.logging_dir)
                tracker.start()
                tracker.store_init_configuration(settings)
                self.active.append(tracker)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send the metrics of `step`."""
        for tracker in list(self.active):
            with self._leaving_out_failed(tracker.name, f"step {step}"):
                tracker.log(values, step=step)

    def finish(self) -> None:
        """Close all trackers at the end of the run; they may wait until everything is uploaded."""
        for tracker in list(self.active):
            with self._leaving_out_failed(tracker.name, "the end"):
                tracker.finish()
        self.active.clear()

    @contextmanager
    def _leaving_out_failed(self, name: str, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.active[:] = [tracker for tracker in self.active if tracker.name != name]
            self.record.add_problem(
                f"report_to: {name} failed at {when} of the run ({describe_error(error)}), so it lacks metrics "
                "from there on; metrics.jsonl has all of them."
            )


def build_tracker(name: str, run_name: str | None, logging_dir: Any) -> Any:
    """Return Accelerate's tracker `name`, not yet started, for a run that is called `run_name`.

    The project is the one of the tracker's environment variable, or `accel-llm`. tensorboard has no projects: the run
    is a folder in `logging_dir`.
    """
    tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # As a name of one folder: a slash would lead to another one.
        return tracker_class(re.sub(r"[^\w.-]+", "-", run_name or DEFAULT_PROJECT).lstrip("."), logging_dir)
    named = (os.environ.get(variable) for variable in PROJECT_VARIABLES[name])
    project = next(filter(None, named), DEFAULT_PROJECT)
    return tracker_class(project, **({RUN_NAME_ARGUMENTS[name]: run_name} if run_name else {}))


def describe_error(error: BaseException) -> str:
    """Return the type and the message of an error on one line, or where memory ran out and what helps."""
    if reason := memory_reason(error):
        return reason
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
