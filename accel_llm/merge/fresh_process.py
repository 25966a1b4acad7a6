"""Runs a module of this package in a fresh process, which knows nothing but files and its arguments."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel_llm.errors import ConfigError

PHASE = "phase: "  # begins a line in which the process says what it does now


def run_in_fresh_process(
    module: str,
    arguments: list[str],
    purpose: str,
    killed: str,
    say: Callable[[str], None] = lambda phase: None,
) -> Any:
    """Run `python -m module` with `arguments`, and return the JSON in the last line of its output.

    `purpose` is what the process does, for errors. `killed` completes the sentence about a process that a signal ended.
    `say` is called with each phase that the process prints, see `print_phase`.

    Raises:
        ConfigError: the process raised one, or was killed.
    """
    # The fresh process must find this package, however the script was started.
    root = str(Path(__file__).parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONIOENCODING": "utf-8",
    }
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        command = [sys.executable, "-m", module, *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", env=environment
        ) as process:
            try:
                assert process.stdout
                for line in process.stdout:
                    last = line
                    if line.startswith(PHASE):
                        say(line.removeprefix(PHASE).strip())
                code = process.wait()
            finally:
                process.kill()
        errors.seek(0)
        messages = errors.read()
    # 2 is the exit code of a ConfigError: its sentence is the last line on stderr.
    if code == 2:
        raise ConfigError(*messages.replace("error: ", "").splitlines()[-1:])
    if code == -signal.SIGILL:
        raise ConfigError(
            f"verify: the process that {purpose} met an instruction that this processor does not have; build llama.cpp "
            "anew with CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir --force-reinstall llama-cpp-python."
        )
    if code < 0:
        raise ConfigError(f"verify: the process that {purpose} was killed by signal {-code}, {killed}")
    if code:
        raise RuntimeError(f"the process that {purpose} failed:\n{messages}")
    return json.loads(last)


def print_phase(phase: str) -> None:
    """Tell the process that waits for this one what is done now."""
    print(f"{PHASE}{phase}", flush=True)
