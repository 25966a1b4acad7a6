"""accelerate 929: Ctrl-C under `accelerate launch` with one process ends the launcher, while the script still saves.

A script that handles SIGINT must be able to end in its own time: neither the end of the launcher nor a signal that
follows from it may cut that short. The right end is that of the same script without a launcher: saved, exit by the first
signal. Here every second signal ends the script at once, whatever the time between them.
"""

import os
import signal
import subprocess
import sys

SCRIPT = """
import sys
from accel_llm.system import signals
signals.SAME_SIGNAL_SECONDS = 0
signals.listen_for_signals(None)
with signals.deferring_signals(lambda number: print("noted", number, flush=True)):
    print("ready", flush=True)
    sys.stdin.read()
print("saved", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


def test_the_end_of_the_launcher_does_not_cut_the_save_short() -> None:
    launched, pipe = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}, subprocess.PIPE
    command = [sys.executable, "-c", LAUNCHER, SCRIPT]
    with subprocess.Popen(
        command, env=launched, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        assert launcher.stdout.readline() == "noted 2\n"
        launcher.wait()  # it has ended, and the script knows
        launcher.stdin.close()
        assert launcher.stdout.read() == "saved\n"
        assert "the run saves at the end of this step" in launcher.stderr.read()
