"""Why a script ended is the last thing on the screen, under a launcher too; red, and in a paragraph of its own there."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import signal, sys
from accel_llm.errors import ConfigError
from accel_llm.system.exit import run_script
from accel_llm.system.signals import Preempted
def main():
    if "bug" in sys.argv: 1 / 0
    if "stop" in sys.argv: raise Preempted(signal.SIGTERM, 7)
    if "mistake" in sys.argv: raise ConfigError("a: '[red]\\u20ac' is wrong.", "b: wrong.")
run_script(main)
"""
# Launchers in the manner of `accelerate launch` with one process and with several: they print a traceback after the
# end of the process. The second one first takes its time, and says something in between.
FEW_LINES = """
import subprocess, sys
subprocess.check_call([sys.executable, *sys.argv[1:]])
"""
MANY_LINES = """
import subprocess, sys, time
other = subprocess.Popen(["sleep", "60"])
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
code = process.wait()
print("closing the other one", file=sys.stderr, flush=True)
time.sleep(0.8)
other.kill()
other.wait()
try:
    raise SystemError("\\n".join(["=" * 40] * 20))
finally:
    import threading
    threading.Timer(0.8, lambda: None).start()  # it takes time to end
"""
LAUNCHERS = {"few lines": FEW_LINES, "many lines": MANY_LINES}
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": ""}
SENTENCES = "error: a: '[red]€' is wrong.\nerror: b: wrong."


@pytest.fixture
def run(tmp_path):
    """`run(launcher, *words)` runs the script under a launcher; it returns its exit code and standard error."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")

    def call(launcher: str, *words: str, **variables: str) -> tuple[int, str]:
        command = [sys.executable, "-c", LAUNCHERS[launcher], str(tmp_path / "script.py"), *words]
        environment = os.environ | LAUNCHED | variables
        ended = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
        return ended.returncode, ended.stderr.decode()

    return call


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_sentences_are_printed_at_once_and_again_below_the_launchers_lines(run, launcher):
    code, screen = run(launcher, "mistake")
    assert code == 1 and screen.startswith(f"{SENTENCES}\n") and screen.endswith(f"\n\n{SENTENCES}\n\n")
    assert screen.count("Traceback (most recent call last)") == 1


def test_the_last_line_of_a_bug_is_repeated_without_its_traceback(run):
    code, screen = run("few lines", "bug")
    sentence = "error: ZeroDivisionError: division by zero"
    assert code == 1 and screen.endswith(f"\n\n{sentence}\n\n") and screen.count(sentence) == 2
    assert screen.startswith("Traceback (most recent call last)") and screen.count("in main") == 1


def test_how_to_continue_after_a_signal_is_repeated_too(run):
    code, screen = run("many lines", "stop")
    sentence = "preempted by SIGTERM: stopped after step 7; run the same command to continue"
    assert code == 1 and screen.startswith(f"{sentence}\n") and screen.endswith(f"\n\n{sentence}\n\n")


@pytest.mark.long
def test_a_process_of_rank_1_names_it_and_a_job_that_starts_again_repeats_nothing(run):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "1"}
    _, screen = run("few lines", "mistake", **ranks, TORCHELASTIC_RESTART_COUNT="1")
    assert screen.endswith("\n\nerror (rank 1): a: '[red]€' is wrong.\nerror (rank 1): b: wrong.\n\n")
    _, screen = run("few lines", "mistake", **ranks, TORCHELASTIC_RESTART_COUNT="0")
    assert screen.count("error (rank 1): b") == 1


def test_a_success_says_nothing(run):
    assert run("few lines") == (0, "")


def test_a_variable_that_was_left_over_in_a_shell_delays_nothing(run, tmp_path):
    # The shell lives on: if the script took it for its launcher, the pipe would stay open until the shell ends.
    command = f"{sys.executable} {tmp_path / 'script.py'} mistake; exec >&- 2>&-; read line"
    with subprocess.Popen(
        ["bash", "-c", command], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | LAUNCHED
    ) as shell:
        assert shell.stderr.read().decode() == f"{SENTENCES}\n"
        shell.stdin.close()


def on_terminal(command: list[str], **variables: str) -> str:
    """Run a command on a terminal of its own; return what the terminal shows."""
    pid, terminal = pty.fork()
    if not pid:
        os.execve(command[0], command, os.environ | LAUNCHED | variables)
    screen = b""
    while True:
        try:
            screen += os.read(terminal, 1 << 16)
        except OSError:  # nothing has the terminal open any more
            break
    os.waitpid(pid, 0)
    os.close(terminal)
    return screen.decode().replace("\r\n", "\n")


@pytest.mark.long
def test_errors_are_red_on_a_terminal_with_a_blank_line_around(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py"), "mistake"]
    assert on_terminal(command) == f"\n\x1b[1;31m{SENTENCES}\x1b[0m\n\n"
    assert on_terminal(command, NO_COLOR="1") == f"\n{SENTENCES}\n\n"
    assert on_terminal(command, TERM="dumb") == f"\n{SENTENCES}\n\n"
    assert on_terminal([*command[:2], "stop"]).startswith("\npreempted by SIGTERM")
    screen = on_terminal([command[0], "-c", FEW_LINES, *command[1:]])
    assert screen.count("\x1b[1;31m") == 2 and screen.endswith(f"\n\n\x1b[1;31m{SENTENCES}\x1b[0m\n\n")
