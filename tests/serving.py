"""Tests of served models need packages that are large to build; CI has them."""

import importlib.util
import os

import pytest

from accel_llm.merge.gguf_file import SERVING_PACKAGES


def need_serving_packages() -> None:
    """Skip the test where the extra `serve` is not installed; under CI that is a failure."""
    missing = [package for module, package in SERVING_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"{missing} are not installed")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[serve]'")
