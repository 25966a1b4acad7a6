"""Trackers get run name, project and metrics; one that fails is left out and told, and the run goes on."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from accel_llm.config.options import RunOptions
from accel_llm.errors import ConfigError
from accel_llm.report.record import Record
from accel_llm.report.trackers import RunTrackers, build_tracker

# A package that writes down what it is told, and fails in the function that FAIL names.
PACKAGE = """
import os

calls = []

def call(name, value=None):
    calls.append([name, value])
    if os.environ.get("FAIL") == name:
        raise ConnectionError("the service\\nis away")

class Run:
    def log(self, values, step=None):
        call("log", [values, step])

    def finish(self):
        call("finish")

class Config(dict):
    def update(self, values, allow_val_change=False):
        call("config", values["seed"])

config = Config()

def init(**arguments):
    call("init", arguments)
    return Run()
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Callable[[str], list[Any]]:
    """`package("wandb")` puts such a package in the place of wandb and returns the list of its calls."""
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def put(name: str) -> list[Any]:
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(PACKAGE, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name).calls

    return put


def send(accelerator, folder: Path, report_to: list[str], **options: Any) -> tuple[RunTrackers, Record]:
    """Send two steps of metrics."""
    record = Record(folder, True)
    record.update(status="running")
    trackers = RunTrackers(accelerator, RunOptions(output_dir=str(folder), report_to=report_to, **options), record)
    for step in (1, 2):
        trackers.log({"loss": 0.5}, step)
    trackers.finish()
    return trackers, record


@pytest.mark.parametrize("name, argument", [("wandb", "name"), ("trackio", "name"), ("swanlab", "experiment_name")])
def test_the_run_name_names_the_run_and_not_its_project(accelerator, tmp_path, package, name, argument):
    calls = package(name)
    send(accelerator, tmp_path / "run", [name], run_name="mine")
    assert calls == [
        ["init", {"project": "accel-llm", argument: "mine"}],
        ["config", 42],
        ["log", [{"loss": 0.5}, 1]],
        ["log", [{"loss": 0.5}, 2]],
        ["finish", None],
    ]
    assert accelerator.trackers == []


@pytest.mark.parametrize(
    "name, variable",
    [("wandb", "WANDB_PROJECT"), ("trackio", "TRACKIO_PROJECT")]
    + [("swanlab", variable) for variable in ("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT")],
)
def test_the_environment_names_the_project(monkeypatch, name, variable):
    assert build_tracker(name, None, None).run_name == "accel-llm" and not build_tracker(name, None, None).init_kwargs
    monkeypatch.setenv(variable, "theirs")
    assert build_tracker(name, "mine", None).run_name == "theirs"


@pytest.mark.parametrize(
    "run_name, folder",
    [("mine", "mine"), (None, "accel-llm"), ("../a b/c", "-a-b-c"), ("/tmp/x", "-tmp-x"), (".hidden", "hidden")],
)
def test_a_run_of_tensorboard_is_a_folder_of_the_logs(tmp_path, run_name, folder):
    """An absolute name or one with `..` would leave output_dir."""
    tracker = build_tracker("tensorboard", run_name, tmp_path)
    assert isinstance(tracker, LOGGER_TYPE_TO_CLASS["tensorboard"])
    assert (tracker.run_name, tracker.logging_dir_param) == (folder, tmp_path)


@pytest.mark.parametrize(
    "fails, when, logged",
    [("init", "the start", 0), ("config", "the start", 0), ("log", "step 1", 1), ("finish", "the end", 2)],
)
def test_a_tracker_that_fails_is_left_out_and_told_once(
    accelerator, tmp_path, package, monkeypatch, capsys, fails, when, logged
):
    calls, others = package("wandb"), package("trackio")
    monkeypatch.setenv("FAIL", fails)
    others.append("the other one fails too")
    monkeypatch.setattr(sys.modules["trackio"], "call", lambda name, value=None: others.append(name))
    _, record = send(accelerator, tmp_path / "run", ["wandb", "trackio"])
    problem = (
        f"report_to: wandb failed at {when} of the run (ConnectionError: the service is away), so it lacks metrics from "
        "there on; metrics.jsonl has all of them."
    )
    assert capsys.readouterr().out == f"problem: {problem}\n"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["problems"] == [problem] == record.problems
    assert sum(name == "log" for name, _ in calls) == logged
    assert others[1:] == ["init", "config", "log", "log", "finish"]  # not disturbed
    with pytest.raises(
        ConfigError, match="weights are complete, but something beside the training failed, as said above"
    ):
        record.raise_problems()


def test_a_problem_that_cannot_be_written_is_told_all_the_same(tmp_path, capsys):
    record = Record(tmp_path / "file" / "run", True)
    (tmp_path / "file").write_text("a file in the place of the folder")
    record.add_problem("It failed at https://me:key@host/x.")
    assert record.problems and capsys.readouterr().out == "problem: It failed at https://***@host/x.\n"


def test_without_problems_nothing_is_raised(accelerator, tmp_path):
    trackers, record = send(accelerator, tmp_path, [])
    record.raise_problems()
    assert trackers.active == [] and "problems" not in json.loads((tmp_path / "run.json").read_text())
