"""Trackers of experiments, such as wandb. They get the metrics of a run, and none of them can end it."""

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import RunOptions
from accel_llm.report.card import is_published
from accel_llm.report.record import Record
from accel_llm.report.shared_settings import as_plain_values, shared_settings
from accel_llm.system.disk import write_atomically
from accel_llm.system.out_of_memory import memory_reason
from accel_llm.system.secrecy import hide_secrets

DEFAULT_PROJECT = "accel-llm"
# Environment variables that name the project: those of the trackers, and those that other trainers read.
PROJECT_VARIABLES = {
    "wandb": ("WANDB_PROJECT",),
    "trackio": ("TRACKIO_PROJECT",),
    "swanlab": ("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT"),
}
# By themselves wandb and swanlab also send the command line, the working folder, the address of the git repository, the
# list of packages and all that the run prints. The variable WANDB_CONSOLE turns the last on again, and so on.
WANDB_SETTINGS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
SWANLAB_SETTINGS = {
    "probe": {"runtime": False, "git": False, "requirements": False, "swanlab": False},
    "terminal": {"proxy_type": "none"},
}


class RunTrackers:
    """Sends metrics to the trackers of `report_to`, from the main process.

    A tracker that raises an error is left out from then on; the record of the run says so. A run that is continued goes
    on with the run that each tracker has of it: which one that is, is in logs/trackers.json.
    """

    def __init__(self, accelerator: Accelerator, options: RunOptions, record: Record, step: int = 0):
        """Start the trackers, with the shared options as the settings of the run.

        `step` is that of the checkpoint which the run continues, else 0. metrics.jsonl still has the lines after it.
        """
        self.record = record
        self.active: list[Any] = accelerator.trackers  # where Accelerate keeps them
        self.sent: dict[str, set[tuple[int, bool]]] = {}  # by tracker: what it got before, of the steps done again
        if not (accelerator.is_main_process and options.report_to):
            return
        folder = Path(options.output_dir)
        file, known = folder / "logs" / "trackers.json", {}
        if step and file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
        sent = sent_after(folder / "metrics.jsonl", step)
        settings = tracker_settings(resolved_options(options), accelerator.num_processes)
        runs = {}
        # Accelerator.init_trackers of 1.15 starts all trackers or, if one of them fails, none.
        for name in options.report_to:
            with self._leaving_out_failed(name, "the start"):
                run = known.get(name) or new_run(name, options)
                tracker = build_tracker(name, run, accelerator.logging_dir, step if name in known else None)
                tracker.start()
                if name not in known or name != "tensorboard":  # which keeps each call as a run of its own
                    tracker.store_init_configuration(settings)
                if name in known and name != "tensorboard":  # which can take steps back
                    self.sent[name] = sent
                runs[name] = run
                self.active.append(tracker)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(known | runs, indent=2, ensure_ascii=False) + "\n")
        record.update(trackers=runs)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send the metrics of `step`, unless the tracker got them before the run was interrupted."""
        for tracker in list(self.active):
            if (step, "eval/loss" in values) in self.sent.get(tracker.name, ()):
                continue
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


def new_run(tracker: str, options: RunOptions) -> dict[str, str]:
    """Return project, name and id of a new run in a tracker.

    The project is that of the options, of the tracker's environment variable, or `accel-llm`; the name is `run_name`, or
    that of the output folder.
    """
    named = (os.environ.get(variable) for variable in PROJECT_VARIABLES.get(tracker, ()))
    project = options.project or next(filter(None, named), DEFAULT_PROJECT)
    name = options.run_name or Path(options.output_dir).absolute().name or DEFAULT_PROJECT
    return {"project": hide_secrets(project), "name": hide_secrets(name), "id": uuid.uuid4().hex[:12]}


def tracker_settings(options: dict[str, Any], num_processes: int) -> dict[str, int | float | str]:
    """Return what a tracker gets as the settings of a run: no path, prompt or secret. `options` are all options."""
    settings: dict[str, int | float | str] = {}
    if base := options.get("model_name_or_path"):
        settings["model_name_or_path"] = base if is_published(base) else Path(base).name
    return settings | as_plain_values(shared_settings(options)) | {"num_processes": num_processes}


def build_tracker(name: str, run: dict[str, str], logging_dir: Any, step: int | None = None) -> Any:
    """Return Accelerate's tracker `name`, not yet started, for `run`, see `new_run`.

    With `step` it continues that run after this step. tensorboard has no projects: the run is a folder in `logging_dir`.
    """
    tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # As a name of one folder: a slash would lead to another one.
        folder = re.sub(r"[^\w.-]+", "-", run["name"]).lstrip(".")
        return tracker_class(folder, logging_dir, **({} if step is None else {"purge_step": step + 1}))
    arguments: dict[str, Any] = {"name": run["name"], "id": run["id"], "resume": "allow"}
    if name == "wandb":
        arguments["settings"] = {
            key: v for key, v in WANDB_SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ
        }
    elif name == "swanlab":
        arguments = {"experiment_name": arguments.pop("name"), **arguments, "settings": SWANLAB_SETTINGS}
    else:  # trackio knows a run by its name, and a Space that it makes is public by default
        arguments = {"name": run["name"], "resume": "never" if step is None else "allow", "private": True}
    return tracker_class(run["project"], **arguments)


def sent_after(metrics: Path, step: int) -> set[tuple[int, bool]]:
    """Return which lines of metrics.jsonl come after `step`: the step of each, and whether it is an evaluation."""
    lines = set()
    for text in metrics.read_text(encoding="utf-8").splitlines() if step and metrics.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # a killed run wrote it in part
            continue
        if line["step"] > step:
            lines.add((line["step"], "eval/loss" in line))
    return lines


def describe_error(error: BaseException) -> str:
    """Return the type and the message of an error on one line, or where memory ran out and what helps."""
    if reason := memory_reason(error):
        return reason
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
