"""show_methods.py: every method of the installed PEFT, with figures that are right; the page shows the same ones."""

import json
import re
import subprocess
import sys

import methods
import pytest
from support import ROOT

from accel_llm.adapters.described import METHOD_DESCRIPTIONS
from accel_llm.errors import ConfigError
from accel_llm.training.method_facts import WEIGHTS, all_methods, find_facts, recorded_facts

# Written down from the papers and from PEFT's guides, for the defaults on all linear layers of Llama-2-7B.
LAYERS, WIDTH, INNER, VOCABULARY = 32, 4096, 11008, 32000
LORA = 16 * LAYERS * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))  # r (m + n) for a matrix of m x n
FORMULAS = {
    "full": 2 * VOCABULARY * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH,
    "freeze": 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH),  # two layers
    "lora": LORA,
    "qlora": LORA,
    "loha": 2 * 2 * LORA,  # two products, rank 32
    "shira": 2 * LORA,  # as many numbers as a LoRA of rank 32
    "ia3": LAYERS * (2 * WIDTH + INNER),  # scales of keys and values, and of what enters the MLP's last matrix
    "ln_tuning": (2 * LAYERS + 1) * WIDTH,
    "fourierft": 7 * LAYERS * 1000,
    "prompt": 20 * WIDTH,
    "p_tuning_v2": 20 * 2 * LAYERS * WIDTH,
    "trainable_tokens": 4 * WIDTH,
}
LISTED = r"^(\w+) +[\d.e-]+% "


def test_recorded_figures_are_those_of_the_papers():
    recorded = recorded_facts()
    assert FORMULAS["full"] == WEIGHTS
    assert {name: recorded[name].trained for name in FORMULAS} == FORMULAS
    # NF4 takes half a byte, and 1 byte for 64 weights and 4 bytes for 256 of those, in place of 2 bytes.
    saved = recorded["lora"].memory - recorded["qlora"].memory
    matrices = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
    assert saved == pytest.approx(matrices * (1.5 - 1 / 64 - 4 / 64 / 256), rel=0.03)


def test_every_method_of_peft_is_recorded_and_described_or_refused():
    recorded = recorded_facts()
    assert recorded.keys() >= set(all_methods())
    assert {name for name, facts in recorded.items() if not facts.refused} <= METHOD_DESCRIPTIONS.keys()
    assert METHOD_DESCRIPTIONS.keys() <= set(all_methods())
    for good_for, paper in METHOD_DESCRIPTIONS.values():
        assert len(good_for) <= 36 and re.fullmatch(r"(\d{4}\.\d{5}|[A-Za-z]+ 20\d\d)?", paper)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ia3", "prompt", "lora"])
def test_a_recorded_method_is_found_again(name):
    found, recorded = find_facts(name), recorded_facts()[name]
    assert found._replace(memory=0) == recorded._replace(memory=0)
    assert found.memory == pytest.approx(recorded.memory, rel=0.02)  # releases of torch differ a little


def test_the_screen_and_json_show_the_same_methods(script, capsys):
    script("show_methods")
    shown = capsys.readouterr().out
    assert max(map(len, shown.partition("refused:")[0].splitlines())) <= 100
    script("show_methods", "--json")
    listed = {line["method"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert listed.keys() == set(all_methods())
    assert re.findall(LISTED, shown, re.MULTILINE) == [name for name, line in listed.items() if not line["refused"]]
    assert shown.count("refused:") == sum(bool(line["refused"]) for line in listed.values())
    assert listed["lora"]["paper"] == "2106.09685" and listed["lora"]["trained"] == LORA

    script("show_methods", "--methods", "ia3", "xlora")
    shown = capsys.readouterr().out
    assert re.findall(LISTED, shown, re.MULTILINE) == ["ia3"] and "refused: xlora" in shown
    with pytest.raises(ConfigError, match=r"^methods: 'ia4' is unknown; did you mean ia3\? "):
        script("show_methods", "--methods", "ia4")


def test_a_method_of_a_newer_peft_is_shown(script, capsys, monkeypatch):
    """It is prompt tuning, of which nothing is recorded or described."""
    monkeypatch.setattr("accel_llm.training.method_facts.peft_methods", lambda: ["lora", "prompt"])
    recorded = {name: facts for name, facts in recorded_facts().items() if name != "prompt"}
    monkeypatch.setattr("accel_llm.training.method_facts.recorded_facts", lambda: recorded)
    monkeypatch.delitem(METHOD_DESCRIPTIONS, "prompt")
    script("show_methods", "--methods", "prompt", "--json")
    line = json.loads(capsys.readouterr().out)
    assert line["trained"] == FORMULAS["prompt"] and line["good_for"] == "not described here"


def test_the_page_shows_what_was_recorded():
    page = (ROOT / "accel_llm" / "adapters" / "README.md").read_text(encoding="utf-8")

    def table(name: str) -> str:
        return page.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]

    recorded = json.loads(methods.GOLDEN.read_text(encoding="utf-8"))
    assert table("facts") == methods.facts_table() and table("trainer") == methods.table(recorded["methods"])
    assert [methods.problem(name, figures) for name, figures in recorded["methods"].items()] == [None] * len(
        recorded["methods"]
    )


@pytest.mark.long
def test_two_methods_train_as_by_the_trainer(tmp_path):
    command = [sys.executable, ROOT / "tests" / "proofs" / "methods.py", "--steps", "3", "--work", tmp_path]
    done = subprocess.run(
        [*map(str, command), "--methods", "ia3", "prompt"], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0 and "| `ia3` | 0.36% |" in done.stdout, done.stdout + done.stderr
