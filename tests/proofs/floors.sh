#!/usr/bin/env bash
# Run the tests with the oldest version of each library that pyproject.toml allows, in a fresh virtual environment.
#
#     tests/proofs/floors.sh                     # all tests that `pytest` alone runs
#     tests/proofs/floors.sh tests/chat -m ""    # other words for pytest
#     FLOORS=~/floors tests/proofs/floors.sh     # keep the environment in this folder, and use it again the next time
#
# The versions are read from pyproject.toml: `peft>=0.21` there is `peft==0.21` here. On a machine without an NVIDIA GPU
# torch is the oldest CPU build that pip offers, where pip offers one, as the other builds bring gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${FLOORS:-}" ]; then
    FLOORS=$(mktemp -d)
    trap 'rm -rf "$FLOORS"' EXIT
fi
[ -e "$FLOORS/bin/python" ] || python3 -m venv "$FLOORS"
source "$FLOORS/bin/activate"

# `packaging` reads requirements; pytest needs it in any case.
pip install -q packaging
python - > "$FLOORS/floors.txt" <<'PYTHON'
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

# Python 3.10 has no tomllib: the list is cut out of the text.
text = Path("pyproject.toml").read_text(encoding="utf-8")
lines = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1].splitlines()
for requirement in (Requirement(re.search('"(.+)"', line)[1]) for line in lines):
    floor = next(part.version for part in requirement.specifier if part.operator == ">=")
    if requirement.name == "torch" and not shutil.which("nvidia-smi"):
        command = [sys.executable, "-m", "pip", "index", "versions", "torch"]
        offered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        builds = [version for version in re.findall(r"[\d.]+\+cpu", offered) if version in requirement.specifier]
        floor, lowest = min(builds, key=Version, default=floor), floor
        if Version(floor).release[:2] != Version(lowest).release[:2]:
            print(f"torch {lowest} is not offered as a CPU build: the oldest one, {floor}, is tested", file=sys.stderr)
    marker = f"; {requirement.marker}" if requirement.marker else ""
    print(f"{requirement.name}=={floor}{marker}")
PYTHON
cat "$FLOORS/floors.txt"
pip install -q -r "$FLOORS/floors.txt" -e ".[test]"

export HF_HUB_OFFLINE=1
python -m pytest -p no:cacheprovider "$@"
