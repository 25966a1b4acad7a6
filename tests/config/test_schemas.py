"""The JSON schemas beside the recipes are those of the code, and an editor finds with them what the scripts refuse."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from accel_llm.config.scripts import TRAINING_SCRIPTS, write_schemas

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


class Yaml12(yaml.SafeLoader):
    """Reads numbers such as 3e-3 as YAML 1.2 and editors do; PyYAML takes them for texts."""


Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+e[-+]?[0-9]+$"), list("-+0123456789"))


def problems(name: str, recipe: str) -> list[str]:
    schema = json.loads((RECIPES / "schemas" / f"{name}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    values: dict[str, Any] = yaml.load(recipe, Yaml12)
    return [
        f"{'/'.join(map(str, error.path))}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(values)
    ]


def test_the_schemas_are_those_of_the_code(tmp_path):
    write_schemas(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json" for name in TRAINING_SCRIPTS}
    for path in (RECIPES / "schemas").iterdir():
        assert path.read_text(encoding="utf-8") == (tmp_path / path.name).read_text(encoding="utf-8"), (
            f"{path.name}: write it anew by accel_llm.config.scripts.write_schemas"
        )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_names_its_schema_and_fits_it(path):
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=schemas/(\w+)\.json\n", text)
    assert named and problems(named[1], text) == []


def test_an_editor_finds_wrong_lines():
    recipe = "model_name_or_path: a\ntrain_files: [b, {path: c}]\nmethod: lora\nmethod_options: {r: 8}\nseed: 1\n"
    assert problems("sft", recipe) == []
    assert "'lr'" in problems("sft", recipe + "lr: 2e-4\n")[0]
    assert problems("sft", recipe + "lr_scheduler_type: cosin\n")[0].startswith(
        "lr_scheduler_type: 'cosin' is not one of"
    )
    assert problems("sft", recipe + "max_length: 1\n") == ["max_length: 1 is less than the minimum of 2"]
    assert problems("dpo", recipe + "beta: -1\n") and not problems("dpo", recipe + "beta: 0.1\n")
