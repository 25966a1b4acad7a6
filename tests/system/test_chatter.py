"""Importing accel_llm.system.chatter chooses the memory allocator's settings, unless the user has chosen some."""

import os
import subprocess
import sys

import pytest

PRINT = "import os, accel_llm.system.chatter; print({k: v for k, v in os.environ.items() if k.endswith('ALLOC_CONF')})"
GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.skipif(sys.platform != "linux", reason="torch has such segments on Linux only")
@pytest.mark.parametrize(
    "own", [{}, {"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}], ids=str
)
def test_segments_can_grow_unless_the_user_says_something_else(own: dict[str, str]) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    ended = subprocess.run([sys.executable, "-c", PRINT], env=plain | own, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(own or GROWING)
