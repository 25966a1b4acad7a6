"""Where scripts, recipes and launch YAMLs are: beside the package in a checkout, or in it after `pip install` of a wheel."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def project_folder() -> Path:
    """Return the folder that holds launch/ and accelerate_configs/: the installed package, or the checkout."""
    return PACKAGE if (PACKAGE / "launch").is_dir() else PACKAGE.parent


def project_scripts() -> dict[str, Path]:
    """Return the path of each script by its name."""
    return {path.stem: path for path in sorted((project_folder() / "launch").glob("*.py"))}


def project_recipes() -> dict[str, Path]:
    """Return the path of each recipe by its name."""
    return {path.stem: path for path in sorted((project_folder() / "launch" / "recipes").glob("*.yaml"))}


def launch_configs() -> dict[str, Path]:
    """Return the path of each launch YAML by its name."""
    return {path.stem: path for path in sorted((project_folder() / "accelerate_configs").glob("*.yaml"))}


def script_words(script: str) -> list[str]:
    """Return the first words of a command that starts the script beside the one that runs.

    A user knows a script inside the installed package by its name alone.
    """
    beside = Path(sys.argv[0]).with_name(script)
    if beside.resolve().parent == PACKAGE / "launch":
        return ["accel-llm", beside.stem]
    return ["python", str(beside if beside.is_file() else Path("launch", script))]


def first_sentence(script: Path) -> str:
    """Return the first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]
