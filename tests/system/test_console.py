"""The command accel-llm: what it starts, and how it finds scripts, recipes and launch YAMLs by name."""

import subprocess
import sys

import pytest
from support import ROOT

from accel_llm.errors import ConfigError
from accel_llm.system import console, project_files
from accel_llm.system.console import run_command, script_command
from accel_llm.system.project_files import launch_configs, project_recipes, project_scripts

RECIPE = str(ROOT / "launch" / "recipes" / "demo.yaml")
ZERO2 = str(ROOT / "accelerate_configs" / "zero2.yaml")
SFT = str(ROOT / "launch" / "sft.py")
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.mark.parametrize(
    ("typed", "started"),
    [
        ("sft", [SFT]),
        ("sft --config demo --max_steps 2", [SFT, "--config", RECIPE, "--max_steps", "2"]),
        ("sft --config=demo", [SFT, f"--config={RECIPE}"]),
        ("sft --config mine.yaml --run_name demo", [SFT, "--config", "mine.yaml", "--run_name", "demo"]),
        ("sft --config other", [SFT, "--config", "other"]),
        (
            "launch --config_file zero2 --num_processes 2 sft --config demo",
            [*LAUNCH, "--config_file", ZERO2, "--num_processes", "2", SFT, "--config", RECIPE],
        ),
        ("launch --config_file=zero2 sft", [*LAUNCH, f"--config_file={ZERO2}", SFT]),
        ("launch sft --config_file zero2", [*LAUNCH, SFT, "--config_file", "zero2"]),  # no option of a script
    ],
)
def test_a_command_starts_the_script_with_files_found_by_name(typed, started):
    assert script_command(typed.split()) == [sys.executable, *started]


def test_a_file_of_the_user_comes_before_the_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo").write_text("max_steps: 1\n")
    monkeypatch.chdir(tmp_path)
    assert script_command(["sft", "--config", "demo"])[2:] == ["--config", "demo"]


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("sfft", "accel-llm: there is no 'sfft'; did you mean sft?"),
        ("--config demo", "accel-llm: there is no '--config'; accel-llm without a word lists all."),
        ("where zeero2", "accel-llm: there is no 'zeero2'; did you mean zero2?"),
        ("where sft demo", "accel-llm where: 2 names are given; give one."),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(typed, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accel-llm", *typed.split()])
    with pytest.raises(SystemExit) as ended:
        run_command()
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {sentence}\n"


def test_a_launch_without_a_script_lists_them():
    with pytest.raises(ConfigError, match=r"^accel-llm launch: no script is named; add one of .*\bsft\b"):
        script_command(["launch", "--config_file", "zero2"])


@pytest.mark.parametrize(
    ("typed", "printed"), [("where", ROOT / "accelerate_configs"), ("where zero2", ZERO2), ("where demo", RECIPE)]
)
def test_places_are_printed(typed, printed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accel-llm", *typed.split()])
    run_command()
    assert capsys.readouterr().out == f"{printed}\n"


def test_the_overview_has_a_line_for_each_script_and_fits_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accel-llm"])
    monkeypatch.setenv("COLUMNS", "80")
    run_command()
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in lines[lines.index("Scripts:") + 1 :] if line.startswith("  ")}
    assert project_scripts().keys() <= shown.keys()
    assert "Supervised fine-tuning on conversations." in shown["sft"]
    assert max(map(len, lines)) <= 80


def test_a_name_means_one_file():
    names = [*project_scripts(), *project_recipes(), *launch_configs(), "launch", "where"]
    assert len(names) == len(set(names))
    assert "sft" in names and "demo" in names and "zero2" in names


def test_the_command_starts_without_heavy_imports():
    program = (
        "import sys, accel_llm.system.console; print(sorted({'torch', 'transformers', 'rich'} & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True).stdout
    assert output == "[]\n"


def test_an_installed_package_has_its_own_scripts(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(project_files, "PACKAGE", tmp_path)
    assert project_files.project_folder() == tmp_path
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "launch" / "sft.py")])
    assert project_files.script_words("chat.py") == ["accel-llm", "chat"]
    monkeypatch.setattr(sys, "argv", [SFT])
    assert project_files.script_words("chat.py") == ["python", str(ROOT / "launch" / "chat.py")]


def test_windows_waits_for_the_script(monkeypatch):
    monkeypatch.setattr(console.os, "name", "nt")
    monkeypatch.setattr(console.subprocess, "call", lambda command: len(command))
    with pytest.raises(SystemExit) as ended:
        console._replace_process(["python", "x"])
    assert ended.value.code == 2
