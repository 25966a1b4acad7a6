"""Importing accel_llm.system.chatter chooses settings of the memory allocator, and hides one message of an import."""

import logging
import os
import subprocess
import sys

import accel_llm.system.chatter

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


def test_only_the_message_about_the_missing_kernel_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes 0.50.2 logs it while it is imported, on a CPU with AVX512-BF16."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ...", "no module")
    logger.warning("another message")
    assert caplog.messages == ["another message"]
