"""A checkpoint folder given as `~/checkpoints` became a folder named `~` below the working folder.

Python does not expand `~`, and no shell does it in a YAML file or after `--name=`. The right folder is the one that a
shell names.
"""

import subprocess

import pytest

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions


@pytest.mark.parametrize("spelling", ["flag", "flag with equals", "recipe"])
def test_a_tilde_is_the_home_folder_of_the_shell(tmp_path, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    shell = subprocess.run(
        ["sh", "-c", "echo ~/checkpoints"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/checkpoints\n", encoding="utf-8")
    words = {
        "flag": ["--output_dir", "~/checkpoints"],
        "flag with equals": ["--output_dir=~/checkpoints"],
        "recipe": ["--config", str(tmp_path / "recipe.yaml")],
    }[spelling]
    assert parse_options(SftOptions, words).output_dir == shell
