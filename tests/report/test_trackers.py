"""Trackers get run name, project and metrics; one that fails is left out and told, and the run goes on."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from accel_llm.backend import accelerator as backend
from accel_llm.config.options import RunOptions, TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.report.record import Record
from accel_llm.report.trackers import RunTrackers, build_tracker, new_run

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
def package(tmp_path, monkeypatch, request) -> Callable[[str], list[Any]]:
    """`package("wandb")` puts such a package in the place of wandb and returns the list of its calls."""
    monkeypatch.syspath_prepend(tmp_path / "packages")

    names: list[str] = []
    request.addfinalizer(lambda: [sys.modules.pop(name, None) for name in names])

    def put(name: str) -> list[Any]:
        names.append(name)
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
@pytest.mark.parametrize("run_name, said", [("mine", "mine"), (None, "run")])
def test_the_run_name_or_the_folder_names_the_run_and_not_its_project(
    accelerator, tmp_path, package, name, argument, run_name, said
):
    calls = package(name)
    send(accelerator, tmp_path / "run", [name], run_name=run_name)
    calls[0][1] = {key: value for key, value in calls[0][1].items() if key in ("project", argument)}
    assert calls == [
        ["init", {"project": "accel-llm", argument: said}],
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
    assert new_run(name, RunOptions())["project"] == "accel-llm"
    monkeypatch.setenv(variable, "theirs")
    assert new_run(name, RunOptions())["project"] == "theirs"
    assert new_run(name, RunOptions(project="mine"))["project"] == "mine"


@pytest.mark.parametrize(
    "run_name, folder",
    [("mine", "mine"), ("../a b/c", "-a-b-c"), ("/tmp/x", "-tmp-x"), (".hidden", "hidden")],
)
def test_a_run_of_tensorboard_is_a_folder_of_the_logs(tmp_path, run_name, folder):
    """An absolute name or one with `..` would leave output_dir."""
    tracker = build_tracker("tensorboard", {"name": run_name}, tmp_path)
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


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "wandb" else name)
    options = TrainOptions(report_to=["wandb", "trackio"], output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"^report_to: wandb is not installed; run pip install wandb\.$"):
        backend.build_accelerator(options)
    assert not (tmp_path / "run").exists()


def test_a_problem_that_cannot_be_written_is_told_all_the_same(tmp_path, capsys):
    record = Record(tmp_path / "file" / "run", True)
    (tmp_path / "file").write_text("a file in the place of the folder")
    record.add_problem("It failed at https://me:key@host/x.")
    assert record.problems and capsys.readouterr().out == "problem: It failed at https://***@host/x.\n"


def test_without_problems_nothing_is_raised(accelerator, tmp_path):
    trackers, record = send(accelerator, tmp_path, [])
    record.raise_problems()
    assert trackers.active == [] and "problems" not in json.loads((tmp_path / "run.json").read_text())
