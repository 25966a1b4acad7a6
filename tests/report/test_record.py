"""run.json: the status at every moment, the reason of a failure, and never half a file."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from accel_llm.report import record
from accel_llm.report.record import RECORDED_PACKAGES, Record, environment, recording
from accel_llm.system.disk import write_atomically
from accel_llm.system.signals import SAME_SIGNAL_SECONDS


def read(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_is_running_and_then_done(tmp_path):
    folder = tmp_path / "deep" / "out"
    with recording(folder, True, {"options": {"seed": 1}, "ledger": {"a": "ä"}}) as run:
        during = read(folder)
        assert during["status"] == "running" and during["options"] == {"seed": 1} and during["ledger"] == {"a": "ä"}
        assert "ended" not in during and "error" not in during
        run.update(samples=["x"])
        assert read(folder)["samples"] == ["x"] and read(folder)["status"] == "running"
    after = read(folder)
    assert after["status"] == "done" and after["started"] <= after["ended"] and after["samples"] == ["x"]
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("error", [ValueError("the reason"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_keeps_its_reason_and_goes_on(tmp_path, error):
    with pytest.raises(type(error)), recording(tmp_path, True, {"options": {}}):
        raise error
    assert read(tmp_path)["status"] == "failed"
    assert read(tmp_path)["error"] == f"{type(error).__name__}: {error}"


def test_only_the_main_process_writes(tmp_path):
    with recording(tmp_path / "out", False, {"options": {}}) as run:
        run.update(samples=[])
    assert not (tmp_path / "out").exists()


def test_the_first_failure_of_any_process_is_recorded(monkeypatch, tmp_path):
    main = Record(tmp_path, True)
    main.update(status="running", options={"seed": 1})
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError), recording(tmp_path, False, {}):
        raise ValueError("first")
    failed = read(tmp_path)
    assert failed["status"] == "failed" and failed["error"] == "ValueError: first" and failed["failed_rank"] == 1
    assert failed["options"] == {"seed": 1}
    main.fail("RuntimeError: Connection closed by peer", failed_rank=0)
    assert read(tmp_path) == failed
    main.update(status="done")
    main.fail("too late")
    assert read(tmp_path)["status"] == "done"


# The main thread waits where no Python handler can run, as in a collective: for a lock that it holds itself.
STUCK = """
import ctypes, sys
from pathlib import Path
from accel_llm.system.signals import listen_for_signals
from accel_llm.report.record import recording
listen_for_signals(Path(sys.argv[1]))
with recording(Path(sys.argv[1]), sys.argv[2] == "main", {"options": {}}):
    lock = ctypes.create_string_buffer(64)
    print("running", flush=True)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("which", ["main", "other"])
def test_sigterm_is_noted_by_a_process_that_is_stuck_and_a_second_one_ends_it(tmp_path, which):
    Record(tmp_path, True).update(status="running")
    with subprocess.Popen([sys.executable, "-c", STUCK, tmp_path, which], stdout=subprocess.PIPE, text=True) as stuck:
        assert stuck.stdout and stuck.stdout.readline() == "running\n"
        stuck.send_signal(signal.SIGTERM)
        wait_for(lambda: read(tmp_path)["status"] == "failed")
        assert read(tmp_path)["error"].startswith("SIGTERM: ")
        time.sleep(SAME_SIGNAL_SECONDS / 4)
        stuck.send_signal(signal.SIGTERM)  # as a launcher sends on what everybody got
        time.sleep(SAME_SIGNAL_SECONDS)
        assert stuck.poll() is None
        stuck.send_signal(signal.SIGTERM)
        assert stuck.wait(5) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def wait_for(holds: Callable[[], bool]) -> None:
    since = time.monotonic()
    while not holds():
        assert time.monotonic() - since < 10
        time.sleep(0.01)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.fsync", Mock(side_effect=OSError("full")))
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [path]


def test_the_environment_is_named_with_and_without_git(monkeypatch, tmp_path):
    versions = environment()
    assert versions["packages"]["torch"].startswith("2.") and versions["packages"].keys() <= set(RECORDED_PACKAGES)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(record.__file__).parent, capture_output=True, text=True, check=False
    )
    assert (versions["git_commit"] or "").removesuffix("-dirty") == head.stdout.strip()
    # A slim image has none.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git_commit"] is None
