"""What keeps the project one house: layers, equal loops, names, recipes and commands that parse."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from accel_llm.config import parse
from accel_llm.options import ChatOptions, MergeOptions

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "accel_llm").glob("*.py"))
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
YAMLS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RECIPES = {"demo": "sft", "demo_base": "pretrain"}

# A module may import those that stand before it.
ORDER = [
    "errors",
    "fields",
    "options",
    "config",
    "ledger",
    "words",
    "tokens",
    "traces",
    "turns",
    "messages",
    "formats",
    "chat",
    "packing",
    "attention",
    "losses",
    "zero",
    "distributed",
    "order",
    "optim",
    "readers",
    "sources",
    "data",
    "chunks",
    "encode",
    "stream",
    "vocabulary",
    "models",
    "metrics",
    "evaluate",
    "adapter",
    "merge",
    "export",
    "checkpoint",
    "record",
    "report",
    "display",
    "demo",
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported(path: Path) -> set[str]:
    """Names of accel_llm modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "accel_llm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("accel_llm."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("accel_llm.")}
    return found


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE if path.stem != "__init__")


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.stem != "__init__"], ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    above = set(ORDER[ORDER.index(path.stem) :])
    assert not imported(path) & above


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def f():\n    from accel_llm import demo\n    import accel_llm.chat\n    from accel_llm.data import Rows\n"
    )
    assert imported(file) == {"demo", "chat", "data"}


def loop_of(path: Path) -> str | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((ast.dump(n) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"), None)


def test_training_loops_are_equal_and_fit_a_screen() -> None:
    loops = {path.stem: loop_of(path) for path in SCRIPTS if loop_of(path)}
    assert {"sft", "pretrain"} <= loops.keys()
    assert len(set(loops.values())) == 1
    for path in SCRIPTS:
        assert path.read_text(encoding="utf-8").count("\n") <= 150, path
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "train":
                assert node.end_lineno and node.end_lineno - node.body[0].lineno + 1 <= 40, path


def test_modules_are_no_two_rooms() -> None:
    assert [path.name for path in PACKAGE if path.read_text(encoding="utf-8").count("\n") > 365] == []


def test_scripts_stand_alone_and_shadow_nothing() -> None:
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in SCRIPTS}
    assert not names & taken
    for path in SCRIPTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not roots & (names | {"launch"}), path


def test_every_recipe_is_read_by_its_script() -> None:
    assert RECIPES.keys() == {path.stem for path in (ROOT / "launch" / "recipes").glob("*")}
    for recipe, name in RECIPES.items():
        options = parse(script(name).Options, ["--config", str(ROOT / "launch" / "recipes" / f"{recipe}.yaml")])
        assert options.model_fields_set


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_launch_configs_say_only_where(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not config.keys() & {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping"}
    assert "fsdp_transformer_layer_cls_to_wrap" not in config.get("fsdp_config", {})
    if "deepspeed_config" in config:
        named = config["deepspeed_config"]["deepspeed_config_file"]
        assert named == f"accelerate_configs/{path.stem}.json"
        settings = json.loads((ROOT / named).read_text(encoding="utf-8"))
        assert settings["zero_optimization"]["stage"] == int(path.stem[4])
        deciding = {
            "gradient_accumulation_steps",
            "gradient_clipping",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
        }
        assert {settings[key] for key in deciding} == {"auto"}
        assert settings.keys() == deciding | {"zero_optimization"}


def commands(text: str) -> list[list[str]]:
    """Commands in fenced blocks and module docstrings that start one of the scripts, as argument lists."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip().split("&&")[-1].strip() for line in joined.splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"(accelerate launch|python launch/)", line)]


TEXTS = [ROOT / "README.md", *SCRIPTS]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_documented_commands_parse(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""
    found = commands(text)
    assert found
    for words in found:
        if words[0] == "accelerate":
            assert words[2] == "--config_file" and (ROOT / words[3]).is_file()
        at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        name = Path(words[at]).stem
        options = {"merge": MergeOptions, "chat": ChatOptions}.get(name) or script(name).Options
        words = words[at + 1 : words.index(">")] if ">" in words else words[at + 1 :]
        parse(options, [str(ROOT / word) if word.startswith("launch/recipes") else word for word in words])


def test_the_readme_sets_everything_up_in_two_commands() -> None:
    lines = [
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("pip install")
    ]
    assert lines == [
        "pip install -e . && accelerate launch --config_file accelerate_configs/zero2.yaml launch/sft.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_a_name_that_shadows_would_be_found() -> None:
    assert {"inspect", "evaluate", "tokenize", "profile"} & (
        set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    ) >= {"inspect", "tokenize", "profile"}
