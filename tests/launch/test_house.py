"""Rules for the whole project: imports between packages, equal training loops, names, recipes, documented commands."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import memory
import pytest
import torch
import yaml
from support import PAGES
from transformers import AutoModelForCausalLM

from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ChatOptions, MergeOptions, PredictOptions
from accel_llm.training.memory_estimate import GB, estimate_memory

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "accel_llm").rglob("*.py"))
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
YAMLS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
FAMILIES = {
    "qwen2.5": "Qwen/Qwen2.5-",
    "qwen3": "Qwen/Qwen3-",
    "llama3": "meta-llama/Llama-3.",
    "gemma": "google/gemma-",
    "mistral": "mistralai/Mistral-",
    "phi": "microsoft/[Pp]hi-",
}
SIZES = (8, 12, 24, 80)  # GB of one GPU
FOR_A_GPU = [(family, size) for family in FAMILIES for size in SIZES]
AFTER_FINE_TUNING = ("dpo", "kto", "reward")  # scripts; the last word of the name of each of their recipes
FOR_PREFERENCES = ["qwen3_8gb_dpo", "qwen3_24gb_dpo", "llama3_24gb_dpo", "llama3_8gb_kto"]

# The order of the packages: each imports only those before it. Modules of one package do not import in a circle.
FLOORS = ["errors", "system", "config", "backend", "chat", "data", "model", "adapters", "demo", "report", "preference"]
FLOORS += ["classification", "training", "checkpoint", "merge"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE if path.stem != "__init__"}


def imported_modules(path: Path) -> set[str]:
    """Return the dotted names of the modules of accel_llm that a file imports at any place."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "accel_llm":
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in whole}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("accel_llm.")}
    return names


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_only_packages_below_them(module: str) -> None:
    assert not {name for name in imported_modules(MODULES[module]) if floor(name) > floor(module)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, or an empty list."""
    visited: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in visited:
            return []
        for name in sorted(graph.get(module, ())):
            if cycle := visit(name, [*path, module]):
                return cycle
        visited.add(module)
        return []

    return next((cycle for module in graph if (cycle := visit(module, []))), [])


def test_no_imports_go_round_in_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({module: imported_modules(path) for module, path in MODULES.items()}) == []


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def f():\n    from accel_llm.chat import targets\n    import accel_llm.system.disk\n"
        "    from accel_llm.data.rows import Rows\n"
    )
    assert imported_modules(file) == {"accel_llm.chat.targets", "accel_llm.system.disk", "accel_llm.data.rows"}


def public_names(tree: ast.Module) -> set[str]:
    """Return the names of a module's public functions, classes and constants."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            places.setdefault(name, []).append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_packages_say_what_they_are_for_and_nothing_else() -> None:
    packages = [path for path in PACKAGE if path.stem == "__init__"]
    assert {path.parent.name for path in packages} <= {*FLOORS, "accel_llm"}
    for path in packages:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


def training_loop(path: Path) -> str | None:
    """Return the function `train` of a script; its loss and the count of a step's targets are calls of any function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    train = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"), None)
    for node in ast.walk(train) if train else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id in ("targets", "loss"):
                node.value = ast.Constant("a call")
    return ast.dump(train) if train else None


def our_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "accel_llm"]
    return {alias.asname or alias.name for node in ours for alias in node.names}


def test_training_loops_are_equal_and_fit_a_screen() -> None:
    loops = {path.stem: training_loop(path) for path in SCRIPTS if training_loop(path)}
    assert {"sft", "pretrain", "dpo", "kto", "reward", "classify"} <= loops.keys()
    assert len(set(loops.values())) == 1
    for path in SCRIPTS:
        assert path.read_text(encoding="utf-8").count("\n") <= 120, path
        assert len(our_imports(path)) <= 16, path
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "train":
                assert node.end_lineno and node.end_lineno - node.body[0].lineno + 1 <= 40, path
                lines = next(n for n in node.body if isinstance(n, ast.For))
                assert lines.end_lineno and lines.end_lineno - lines.lineno + 1 <= 25, path
            if isinstance(node, ast.FunctionDef) and node.name == "main" and path.stem in loops:
                assert node.end_lineno and node.end_lineno - node.lineno <= 45, path


def test_modules_have_at_most_365_lines() -> None:
    assert [path.name for path in PACKAGE if path.read_text(encoding="utf-8").count("\n") > 365] == []


def test_libraries_that_print_at_import_are_kept_quiet() -> None:
    loud = re.compile(r"^(from|import) (peft|bitsandbytes|transformers\.integrations\.bitsandbytes)\b", re.M)
    loud_modules = [path for path in [*PACKAGE, *SCRIPTS] if loud.search(path.read_text(encoding="utf-8"))]
    assert loud_modules
    for path in loud_modules:
        assert "\nimport accel_llm.system.chatter\n" in path.read_text(encoding="utf-8"), path


def test_scripts_stand_alone_and_shadow_nothing() -> None:
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in SCRIPTS}
    assert not names & taken
    for path in SCRIPTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not roots & (names | {"launch"}), path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_by_its_script_and_short(path: Path) -> None:
    last = path.stem.split("_")[-1]
    own = (*AFTER_FINE_TUNING, "classify", "pretrain")
    name = "pretrain" if path.stem == "demo_base" else last if last in own else "sft"
    assert parse_options(script(name).Options, ["--config", str(path)]).model_fields_set
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 8 <= len(lines) <= 20
    assert max(map(len, lines)) <= 120
    assert lines[0] == f"# yaml-language-server: $schema=schemas/{name}.json" and lines[1].startswith("# ")


def test_every_family_has_a_recipe_for_every_size() -> None:
    expected = {f"{family}_{size}gb.yaml" for family, size in FOR_A_GPU}
    expected |= {f"demo{name}.yaml" for name in ("", "_base", "_dpo", "_kto", "_reward", "_classify")}
    expected |= {"qwen2.5_pretrain.yaml"}  # of the course that the project grew from
    assert {path.name for path in RECIPES} == expected | {f"{name}.yaml" for name in FOR_PREFERENCES}


# Each takes seconds; the largest GPU's recipes have all three methods.
@pytest.mark.parametrize(
    ("family", "size"), [pytest.param(*pair, marks=[] if pair[1] == 80 else pytest.mark.long) for pair in FOR_A_GPU]
)
@pytest.mark.long
def test_recipes_for_a_gpu_are_estimated_to_fit_it(family: str, size: int) -> None:
    path = ROOT / "launch" / "recipes" / f"{family}_{size}gb.yaml"
    options = memory.recipe_options(path)
    assert re.match(FAMILIES[family], options.model_name_or_path)
    assert options.output_dir == f"output/{path.stem}"
    assert memory.estimate(path).total < 0.92 * size * GB
    first, second = path.read_text(encoding="utf-8").splitlines()[1:3]
    assert first.startswith(f"# {options.model_name_or_path.split('/')[1]}, ") and first.endswith(f" {size} GB.")
    # Releases of torch differ a little, for example in whether heads are repeated for the attention.
    words = re.compile(r"[^\d.]+|\.$")
    said, now = ([float(number) for number in words.split(line) if number] for line in (second, memory.sentence(path)))
    assert words.findall(second) == words.findall(memory.sentence(path)) and said == pytest.approx(
        now, rel=0.05, abs=0.2
    )
    table = (path.parent / "README.md").read_text(encoding="utf-8")
    cells = next(line.split("|") for line in table.splitlines() if line.startswith(f"| `{family}` |"))
    assert re.findall(r", ([\d.]+)", cells[2 + SIZES.index(size)]) == [f"{said[0]:.1f}"]


@pytest.mark.parametrize("name", FOR_PREFERENCES)
@pytest.mark.long
def test_recipes_for_preferences_go_on_with_what_fine_tuning_exports_and_fit_its_gpu(name: str) -> None:
    family, gigabytes, script_name = name.split("_")
    before = memory.recipe_options(ROOT / "launch" / "recipes" / f"{family}_{gigabytes}.yaml")
    path = ROOT / "launch" / "recipes" / f"{name}.yaml"
    options = parse_options(script(script_name).Options, ["--config", str(path), "--train_files", "pairs.jsonl"])
    assert (options.output_dir, options.method) == (f"output/{name}", before.method)
    assert options.max_length == before.max_length and options.offload_embeddings == before.offload_embeddings
    assert (options.beta, options.learning_rate) == (0.1, 5e-6)
    if options.adapter_name_or_path:
        assert options.model_name_or_path == before.model_name_or_path
        assert options.adapter_name_or_path == before.output_dir
    else:  # a new adapter on the merged model, by the command in the recipe
        assert options.model_name_or_path == f"{before.output_dir}-merged"
        command = f"python launch/merge.py --adapter {before.output_dir} --output_dir {options.model_name_or_path}"
        assert f"# {command}\n" in path.read_text(encoding="utf-8")
    shape = memory.SHAPES[str(before.model_name_or_path)].config()
    size = int(gigabytes.removesuffix("gb"))
    assert estimate_memory(options, shape, 1, "cuda").total < 0.92 * size * GB


@pytest.mark.parametrize("name", memory.SHAPES)
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    """The shape gives the number of parameters in the model card."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory.SHAPES[name].config())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers / 1e9 == pytest.approx(memory.SHAPES[name].billions, rel=2e-3)


def test_the_estimate_of_a_model_that_is_too_large_does_not_fit() -> None:
    path = ROOT / "launch" / "recipes" / "qwen3_12gb.yaml"
    assert memory.estimate(path, "--model_name_or_path", "Qwen/Qwen3-14B").total > 12 * GB


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_launch_configs_hold_no_training_settings(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not config.keys() & {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping"}
    assert "fsdp_transformer_layer_cls_to_wrap" not in config.get("fsdp_config", {})
    if "deepspeed_config" in config:
        file_name = config["deepspeed_config"]["deepspeed_config_file"]
        assert file_name == f"accelerate_configs/{path.stem}.json"
        settings = json.loads((ROOT / file_name).read_text(encoding="utf-8"))
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
    """Return the commands of a text that start one of the scripts, as argument lists."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip().split("&&")[-1].strip() for line in joined.splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"(accelerate launch|python launch/)", line)]


# The pages that show a command, and every script.
TEXTS = [page for page in PAGES if commands(page.read_text(encoding="utf-8"))] + SCRIPTS


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_parse(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""
    command_lines = commands(text)
    assert command_lines
    for words in command_lines:
        if words[0] == "accelerate":
            assert words[2] == "--config_file" and (ROOT / words[3]).is_file()
        at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        name = Path(words[at]).stem
        tools = {"merge": MergeOptions, "chat": ChatOptions, "predict": PredictOptions}
        options = tools.get(name) or script(name).Options
        if name in ("show_data", "plan", "prepare") and words[at + 1] in script(name).SCRIPTS:
            at, options = at + 1, script(name).SCRIPTS[words[at + 1]]
        words = words[at + 1 : words.index(">")] if ">" in words else words[at + 1 :]
        parse_options(options, [str(ROOT / word) if word.startswith("launch/recipes") else word for word in words])


def test_the_readme_sets_everything_up_in_two_commands() -> None:
    lines = [
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("pip install")
    ]
    assert lines == [
        "pip install -e . && accelerate launch --config_file accelerate_configs/zero2.yaml launch/sft.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_the_check_for_shadowed_modules_works() -> None:
    assert {"inspect", "evaluate", "tokenize", "profile"} & (
        set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    ) >= {"inspect", "tokenize", "profile"}


def text_without_encoding(tree: ast.Module) -> list[int]:
    """Return the lines that open, read or write a text, or read a program's output as text, without an encoding."""
    lines = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        method = node.func if isinstance(node.func, ast.Attribute) else None
        name = method.attr if method else getattr(node.func, "id", "")
        if method and isinstance(method.value, ast.Name) and method.value.id == "os":  # os.open
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        binary = any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in values)
        # `read_text` alone is a function of ours.
        of_file = (name == "open" and not binary) or (method and name in ("read_text", "write_text"))
        if (of_file or "text" in keywords) and "encoding" not in keywords:
            lines.append(node.lineno)
    return lines


def test_every_text_file_is_read_and_written_in_a_named_encoding() -> None:
    wrong = ["open(p)", "Path(p).open('w')", "p.read_text()", "p.write_text(t)", "subprocess.run(c, text=True)"]
    right = [
        "open(p, 'rb')",
        "p.open(encoding='utf-8')",
        "os.open(p, 0)",
        "p.read_text(encoding='utf-8')",
        "read_text(f)",
    ]
    assert text_without_encoding(ast.parse("\n".join([*right, *wrong]))) == [6, 7, 8, 9, 10]
    files = [*PACKAGE, *SCRIPTS]
    assert {path: lines for path in files if (lines := text_without_encoding(ast.parse(path.read_text("utf-8"))))} == {}
