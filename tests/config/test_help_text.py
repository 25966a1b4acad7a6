"""--help: what a person reads first stands first, and it is there before any library is imported."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from accel_llm.config.early import answer_early

import pytest

from accel_llm.config.help_text import MOST_CHANGED, help_text
from accel_llm.config.options import SftOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.config.scripts import SCRIPT_OPTIONS, TRAINING_SCRIPTS
from accel_llm.config.tool_options import MergeOptions

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "transformers", "accelerate", "datasets", "peft", "pandas", "sklearn"}


def help_of(options_class, script, monkeypatch, defaults=None) -> str:
    monkeypatch.setattr(sys, "argv", [f"launch/{script}.py"])
    monkeypatch.setenv("COLUMNS", "80")
    return help_text(options_class, defaults or {})


def test_help_begins_with_usage_examples_recipes_and_what_is_changed_most(monkeypatch):
    text = help_of(SftOptions, "sft", monkeypatch)
    places = [
        text.index(part)
        for part in ("usage: accelerate launch --config_file", "    accelerate launch", "\n  --config RECIPE")
    ]
    places += [
        text.index(part)
        for part in ("Changed most often:", "Supervised fine-tuning:\n  --overfit", "Model:\n", "Run:\n")
    ]
    assert places == sorted(places) and places[0] == 0
    front = text[text.index("Changed most often:") : text.index("Supervised fine-tuning:")]
    assert re.findall(r"^  --(\w+) ", front, re.M) == list(MOST_CHANGED)
    assert text.count("launch/sft.py") >= 4  # the usage and three examples
    assert " \\\n        --model_name_or_path Qwen" in text  # an example of two lines stays one command
    assert max(map(len, text[text.index("Changed most") :].splitlines())) <= 110


def test_a_script_of_pretraining_shows_its_own_defaults(monkeypatch):
    text = help_of(PretrainOptions, "pretrain", monkeypatch, PretrainOptions.script_defaults)
    assert "(default: full)" in " ".join(text.split()) and "(default: split)" in " ".join(text.split())
    assert "--train_on" not in text.split() and "--config_name" in text.split()


def test_a_tool_shows_what_must_be_given(monkeypatch):
    text = help_of(MergeOptions, "merge", monkeypatch)
    assert text.startswith("usage: python launch/merge.py [--config")
    assert re.findall(r"^  --(\w+) ", text[text.index("Always given:") : text.index("Merge:")], re.M) == [
        "adapter",
        "output_dir",
    ]


@pytest.mark.parametrize("name", SCRIPT_OPTIONS)
def test_help_and_wrong_options_import_nothing_heavy(name):
    """Two seconds on a free machine: measured 0.6 to 1.2 s; here only what was imported counts."""
    program = (
        "import runpy, sys; sys.argv = [f'launch/{sys.argv[1]}.py', '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    print('heavy', *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program, name], cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=60
    )
    assert ended.returncode == 0 and ended.stderr == "" and time.monotonic() - start < 30
    *text, heavy = ended.stdout.splitlines()
    assert heavy == "heavy" and text[0].startswith("usage: ")


def test_a_wrong_option_is_refused_before_libraries_are_imported(tmp_path):
    command = [sys.executable, "-X", "importtime", "launch/sft.py", "--model_name_or_path", tmp_path, "--lr_typ", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=60)
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert ended.returncode == 2 and said[-1].startswith("error: lr_typ: no such option")
    assert not re.search(r"\| +(transformers|accelerate|peft)$", ended.stderr, re.M)


def test_right_options_and_other_programs_are_left_alone(capsys, tmp_path):
    answer_early("sft", ["--model_name_or_path", "a", "--train_files", "b"])
    answer_early("other", ["--help"])
    answer_early("sft", ["--per_device_train_batch_size", "0"])  # goes with the recipe of the demo, which is read later
    assert capsys.readouterr() == ("", "")
    for name in TRAINING_SCRIPTS:
        with pytest.raises(SystemExit):
            answer_early(name, ["--help"])
        assert "usage:" in capsys.readouterr().out


def test_only_one_process_prints_the_help(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        answer_early("sft", ["--help"])
    assert ended.value.code == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_recipe_that_can_be_read_once_is_left_to_the_script(form):
    """`--config <(command)` is a pipe."""
    reader, writer = os.pipe()
    os.write(writer, b"max_length: 64")
    os.close(writer)
    answer_early("sft", ["--model_name_or_path", "a", *(word.format(f"/dev/fd/{reader}") for word in form)])
    assert os.read(reader, 100) == b"max_length: 64"
    os.close(reader)
