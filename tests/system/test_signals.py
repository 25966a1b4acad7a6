"""Signals to a process whose launcher dies: its death is never taken for a second signal of the user."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A process that trains: every signal after the first one counts as the second, however soon it comes.
PROCESS = """
import os, sys, time
from accel_llm.system import signals
signals.SAME_SIGNAL_SECONDS = 0
handle = signals.handle_signal
def tell(number):
    handle(number)
    print("launcher ended" if number == signals.LAUNCHER_ENDED else number, flush=True)
signals.handle_signal = tell
signals.listen_for_signals(None)
with signals.deferring_signals(lambda number: print("noted", number, flush=True)):
    print(os.getpid(), flush=True)
    for _ in sys.stdin:  # until the test closes it
        pass
print("saved", flush=True)
signals.ignore_further_signals()
sys.exit(128 + signals.signal_requests.stop)
"""
# As `accelerate launch` with one process: it waits, and passes no signal on.
LAUNCHER = """
import subprocess, sys
subprocess.check_call([sys.executable, "-c", sys.argv[1]])
"""


class Launch:
    """A launcher and its process. `lines` are those that the process prints."""

    def __init__(self, **variables: str):
        environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT)} | variables
        command, pipe = [sys.executable, "-c", LAUNCHER, PROCESS], subprocess.PIPE
        self.launcher = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self.pid = int(self.line())

    def line(self) -> str:
        return self.launcher.stdout.readline().strip()

    def kill_launcher(self) -> None:
        self.launcher.kill()
        self.launcher.wait()

    def rest(self) -> tuple[str, str]:
        """Close the standard input, so that a process that still trains saves and ends. Return what it still prints."""
        self.launcher.stdin.close()
        return self.launcher.stdout.read(), self.launcher.stderr.read()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def call(**variables: str) -> Launch:
        started.append(Launch(**variables))
        return started[-1]

    yield call
    for one in started:
        with one.launcher as launcher:
            os.killpg(launcher.pid, signal.SIGKILL)


def test_the_end_of_the_launcher_after_ctrl_c_is_no_second_signal(launch):
    run = launch()
    os.kill(run.pid, signal.SIGINT)  # a terminal sends it to both at once, but the launcher takes its time to end
    assert (run.line(), run.line()) == ("noted 2", "2")
    run.kill_launcher()
    assert run.line() == "launcher ended"
    printed, message = run.rest()
    assert printed == "saved\n" and message == (
        f"\nSIGINT: the run saves at the end of this step and stops; `kill {run.pid}` stops it at once, without the "
        "steps since the last checkpoint\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_of_the_user_ends_the_process_also_after_the_end_of_the_launcher(launch, number):
    run = launch()
    os.kill(run.pid, signal.SIGINT)
    assert (run.line(), run.line()) == ("noted 2", "2")
    run.kill_launcher()
    assert run.line() == "launcher ended"
    os.kill(run.pid, number)
    assert run.line() == "" and "saved" not in run.rest()[0]


def test_the_end_of_the_launcher_alone_stops_the_run_like_sigterm(launch):
    run = launch()
    run.kill_launcher()
    assert (run.line(), run.line()) == ("noted 15", "launcher ended")
    printed, message = run.rest()
    assert printed == "saved\n" and message.startswith("\nSIGTERM: the run saves at the end of this step")


def test_a_terminal_that_is_closed_stops_the_run_as_a_signal_does(tmp_path):
    saved = tmp_path / "saved"
    program = PROCESS.replace("for _ in sys.stdin:", "while not signals.signal_requests.stop:")
    program = program.replace("pass\n", "time.sleep(0.01)\n").replace(
        'print("saved"', 'open(sys.argv[1], "w"); print("saved"'
    )
    pid, terminal = pty.fork()
    if not pid:
        os.execve(sys.executable, [sys.executable, "-c", program, str(saved)], os.environ | {"PYTHONPATH": str(ROOT)})
    line = b""
    while not line.endswith(b"\n"):  # a write to a terminal that is closed meanwhile would fail
        line += os.read(terminal, 100)
    assert line.strip() == str(pid).encode()
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert (code, saved.exists()) == (128 + signal.SIGHUP, True)


@pytest.mark.parametrize(("variables", "noted"), [({}, "noted 15"), ({"TORCHELASTIC_RUN_ID": "none"}, "noted 1")])
def test_nohup_is_respected_but_not_under_torchrun_which_does_not(launch, monkeypatch, variables, noted):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, for all that is started
    try:
        run = launch(**variables)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.kill(run.pid, signal.SIGHUP)
    if not variables:
        os.kill(run.pid, signal.SIGTERM)
    assert run.line() == noted


def test_under_torchrun_the_user_is_told_how_long_it_waits(launch):
    run = launch(TORCHELASTIC_RUN_ID="none")
    os.kill(run.pid, signal.SIGTERM)
    assert (run.line(), run.line()) == ("noted 15", "15")
    run.kill_launcher()
    assert run.rest()[1].endswith(
        "; the launcher waits 30 s for it (TORCH_ELASTIC_SHUTDOWN_TIMEOUT in its environment)\n"
    )
