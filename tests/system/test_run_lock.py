"""A run keeps others out of its folder as long as one of its processes lives, and no longer."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accel_llm.backend.accelerator import build_accelerator
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.system import run_lock
from accel_llm.system.folders import atomic_output, check_output_dir
from accel_llm.system.run_lock import LOCK_NAME, check_no_live_run, lock_output_dir, release_locks

# A process of a run: it takes its lock, says so, and does what the words on standard input say.
PROCESS = """
import os, signal, sys
from pathlib import Path
from accel_llm.system.run_lock import lock_output_dir, release_locks, share_lock
folder = Path(sys.argv[1])
(share_lock if os.environ.get("RANK", "0") != "0" else lock_output_dir)(folder)
print("locked", flush=True)
for word in sys.stdin:
    if word == "fork\\n" and not os.fork():
        os.close(0)
        print(os.getpid(), flush=True)
        signal.pause()
    if word == "end\\n":
        release_locks()
        break
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """`start(folder, rank)` starts a process of a run in `folder`, which holds its lock when the call returns."""
    started = []

    def call(folder: Path, rank: int = 0) -> subprocess.Popen:
        command, environment = [sys.executable, "-c", PROCESS, str(folder)], os.environ | {"RANK": str(rank)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        assert started[-1].stdout.readline() == "locked\n"
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()
    release_locks()


def tell(process: subprocess.Popen, word: str) -> None:
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()


def test_a_second_start_is_refused_and_told_who_holds_the_folder(tmp_path, start):
    folder = tmp_path / "runs" / "a"
    first = start(folder)
    holder = json.loads((folder / LOCK_NAME).read_text())
    assert (holder["host"], holder["pid"]) == (socket.gethostname(), first.pid)
    with pytest.raises(ConfigError) as error:
        lock_output_dir(folder)
    assert str(error.value) == (
        f"output_dir: {folder} is in use by process {first.pid} on {socket.gethostname()}, since {holder['since']}; "
        "wait for its end, or name another folder."
    )
    tell(first, "end")
    assert first.wait() == 0 and list(tmp_path.iterdir()) == []  # what was created for the lock alone is gone
    lock_output_dir(folder)
    lock_output_dir(folder)  # its own run is no other one


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_keeps_nobody_out(tmp_path, start, number):
    end(start(tmp_path), number)
    assert (tmp_path / LOCK_NAME).exists()
    lock_output_dir(tmp_path)
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_the_lock_lasts_until_the_last_process_of_the_run_ends(tmp_path, start):
    first, second = start(tmp_path), start(tmp_path, 1)
    end(first)
    with pytest.raises(ConfigError, match=f"process {first.pid} on"):
        lock_output_dir(tmp_path)
    tell(second, "end")
    assert second.wait() == 0 and list(tmp_path.iterdir()) == []
    # In the other order: the first to end leaves the file to the last one.
    first, second = start(tmp_path), start(tmp_path, 1)
    tell(first, "end")
    assert first.wait() == 0 and (tmp_path / LOCK_NAME).exists()
    with pytest.raises(ConfigError, match=r"in use"):
        lock_output_dir(tmp_path)
    end(second)
    lock_output_dir(tmp_path)


def test_a_fork_that_outlives_the_run_does_not_hold_the_lock(tmp_path, start):
    process = start(tmp_path)
    tell(process, "fork")
    fork = int(process.stdout.readline())
    with pytest.raises(ConfigError, match=r"in use"):
        lock_output_dir(tmp_path)
    end(process)
    os.kill(fork, 0)  # it lives
    lock_output_dir(tmp_path)
    os.kill(fork, signal.SIGKILL)


def test_a_fork_or_a_look_at_the_folder_does_not_release_the_lock(tmp_path, start):
    lock_output_dir(tmp_path)
    if not os.fork():
        release_locks()
        os._exit(0)
    os.wait()
    lock_output_dir(tmp_path)
    check_no_live_run(tmp_path)
    program = "import sys; from pathlib import Path; from accel_llm.system.run_lock import *; "
    program += "lock_output_dir(Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()} on" in other.stderr and other.returncode == 1


def test_a_symbolic_link_leads_to_the_same_lock(tmp_path, start):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    start(tmp_path / "link")
    with pytest.raises(ConfigError, match=r"in use"):
        lock_output_dir(tmp_path / "real")


def test_a_lock_on_a_file_that_was_removed_is_taken_again(tmp_path, monkeypatch):
    removed = []
    lockf = fcntl.lockf

    def remove_first(*arguments: int) -> None:
        if not removed:  # the run that held the file ends between its opening and its locking here
            removed.append((tmp_path / LOCK_NAME).unlink())
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    lock_output_dir(tmp_path)
    assert (tmp_path / LOCK_NAME).exists()
    release_locks()


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    def refuse(*arguments: int) -> None:
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock_output_dir(tmp_path)
    release_locks()


def test_what_another_start_would_take_from_a_live_run_is_refused(tmp_path, start):
    for name in ("run", "run/model", "outer/model/run", "base/output"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base" / "config.json").touch()
    (tmp_path / "run" / "model" / "config.json").touch()
    for name in ("run", "outer/model", "base/output"):
        start(tmp_path / name)
    # A start in the export or above the folder, where the name of the folder is one of a run's own files.
    for name in ("run", "run/model", "outer"):
        with pytest.raises(ConfigError, match=r"in use"):
            lock_output_dir(tmp_path / name)
    # A merge that would replace a whole folder.
    for name in ("run/model", "base"):
        with pytest.raises(ConfigError, match=r"in use"):
            check_output_dir(tmp_path / name, [], overwrite=True, mark="config.json")
    # Beside it there is room for other runs.
    lock_output_dir(tmp_path / "run" / "second")
    lock_output_dir(tmp_path)
    check_output_dir(tmp_path / "merged", [], overwrite=False, mark="config.json")


def test_two_scripts_cannot_write_one_folder_at_the_same_time(tmp_path):
    program = f"""
import pathlib
from accel_llm.system.folders import atomic_output
with atomic_output(pathlib.Path({str(tmp_path / "merged")!r})) as partial:
    (partial / "config.json").touch()
    print("writing", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as other:
        assert other.stdout.readline() == "writing\n"
        with (
            pytest.raises(ConfigError, match=f"merged is in use by process {other.pid} "),
            atomic_output(tmp_path / "merged"),
        ):
            pass
        other.communicate("go on\n")
    assert other.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["merged"]
    with atomic_output(tmp_path / "merged") as partial:
        shutil.copy(tmp_path / "merged" / "config.json", partial)


@pytest.mark.parametrize("kind", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", None])
def test_a_held_folder_is_refused_before_any_process_group_exists(tmp_path, start, monkeypatch, kind):
    """Else another rank could take its byte of the lock first, and the main process would refuse its own run."""
    start(tmp_path)
    variables = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "2"}
    variables |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    if kind:
        variables[kind] = "true"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # so that a process group cannot be built
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"^output_dir: .* is in use by process"):
        build_accelerator(TrainOptions(output_dir=str(tmp_path), model_name_or_path="unused"))
