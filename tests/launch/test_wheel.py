"""A wheel of the package, used outside the checkout: by its own scripts, and by those of a checkout without a package."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

pytestmark = pytest.mark.long
FOLDERS = ("launch", "accelerate_configs")  # beside the package in a checkout, inside it in a wheel
COMMAND = [sys.executable, "-c", "from accel_llm.system.console import run_command; run_command()"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's files, unpacked as an installation lays them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("accel_llm", *FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_wheel_holds_every_module_and_the_demo(installed):
    def files(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {str(path.relative_to(folder)) for path in paths if path.name != "README.md"}

    expected = files(ROOT / "accel_llm") | {f"{name}/{file}" for name in FOLDERS for file in files(ROOT / name)}
    assert files(installed / "accel_llm") == expected
    assert {path.name for path in installed.iterdir()} == {"accel_llm", next(installed.glob("*.dist-info")).name}


def test_every_module_is_imported_from_the_wheel(installed, tmp_path):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "accel_llm").rglob("*.py")]
    program = "\n".join(f"import {name.removesuffix('.__init__')}" for name in names)
    program += "\nprint(accel_llm.__file__)"
    assert run(installed, tmp_path, sys.executable, "-c", program).strip().startswith(str(installed))


def test_the_demo_runs_with_the_command_alone_and_names_commands_that_work_there(installed, tmp_path):
    """DeepSpeed's settings are in a .json that the launch YAML names by a path from the checkout."""
    launch = ["launch", "--config_file", "zero2", "--num_processes", "1"]
    words = ["sft", "--config", "demo", "--max_steps", "2", "--eval_generate", "0"]
    screen = run(installed, tmp_path, *COMMAND, *launch, *words)
    assert "step 2/2" in screen and (tmp_path / "output" / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    (command,) = re.findall(r"^merge it: *(accel-llm merge .*)$", screen, re.MULTILINE)
    assert "merged" in run(installed, tmp_path, *COMMAND, *shlex.split(command)[1:])
    entry = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert entry.read_text(encoding="utf-8").split() == [
        "[console_scripts]",
        "accel-llm",
        "=",
        "accel_llm.system.console:run_command",
    ]


def test_the_demo_runs_with_the_scripts_of_a_checkout_that_has_no_package(installed, tmp_path):
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/zero2.yaml"]
    words = ["--num_processes", "1", "launch/sft.py", "--max_steps", "2", "--eval_generate", "0"]
    screen = run(installed, tmp_path, sys.executable, *launch, *words)
    assert "step 2/2" in screen and (tmp_path / "output" / "demo" / "adapter" / "adapter_model.safetensors").is_file()
