"""accelerate 902 (also 4277, torch 113546): the launcher's own traceback hides why the script ended.

With one process `accelerate launch` raises CalledProcessError, which holds nothing of the error. The right last line is
that of the script without a launcher.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from accel_llm.errors import ConfigError
from accel_llm.system.exit import run_script
def main():
    raise ConfigError("seed: '-1' is not allowed; give a whole number of at least 0.")
run_script(main)
"""
# The last lines of the launcher of accelerate 1.15.
LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
process.wait()
if process.returncode != 0:
    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=process.args)
"""


def test_the_last_line_is_that_of_the_script_alone(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_MIXED_PRECISION": "no"}
    ended = [
        subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "script.py")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        for launcher in ([], ["-c", LAUNCHER])
    ]
    alone, launched = (process.stdout.rstrip().splitlines() for process in ended)
    assert [process.returncode for process in ended] == [2, 1]
    assert alone == ["error: seed: '-1' is not allowed; give a whole number of at least 0."]
    assert launched[-1] == alone[0] and "CalledProcessError" in launched[-3]
