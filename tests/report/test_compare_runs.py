"""Runs beside one another: what differs is listed, on the terminal and in the page; wrong folders are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, METRICS, RUN, Page, write_run
from support import ROOT

from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import MAX_COMPARED_RUNS, ReportOptions
from accel_llm.errors import ConfigError
from accel_llm.report.compare_runs import compare_runs, comparison_notes, differing_lines, name_runs, read_run
from accel_llm.report.page_compare import write_comparison

OTHER = RUN | {
    "options": RUN["options"] | {"run_name": "second", "learning_rate": 1e-4, "output_dir": "elsewhere"},
    "packages": {"torch": "2.12.0", "peft": "0.21"},
    "git_commit": "def456",
    "data": "beef",
    "ledger": RUN["ledger"]
    | {
        "bins": {
            "a.jsonl": RUN["ledger"]["bins"]["a.jsonl"] | {"trained": {"rows": 900, "supervised": 75, "context": 40}}
        }
    },
}


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two folders of runs that differ in one setting, in data, code and versions."""
    for name, facts in (("one", RUN), ("two", OTHER)):
        write_run(tmp_path / name, facts, METRICS if name == "one" else METRICS[:3])
    return [tmp_path / "one", tmp_path / "two"]


def compared(runs: list[Path]) -> dict[str, Any]:
    return compare_runs([read_run(str(folder)) for folder in runs])


def test_exactly_what_differs_is_listed(runs):
    tables = compared(runs)
    assert tables["Settings"] == [("learning_rate", ["2e-05", "0.0001"])]
    assert tables["Code"] == [("git commit", ["abc123-dirty", "def456"])]
    assert tables["Versions"] == [("torch", ["2.13.0", "2.12.0"]), ("peft", ["-", "0.21"])]
    assert tables["In force"] == []
    assert tables["Data"] == [
        ("hash of the encoded rows", ['{"hash": "cafe"}', "beef"]),
        ("a.jsonl: trained", ["1,100 rows, 75 supervised tokens", "900 rows, 75 supervised tokens"]),
    ]
    results = dict(tables["Results"])
    assert results["last loss"] == ["1.235", "4"] and results["lowest eval/loss"] == ["1.5", "4"]
    assert results["last eval/exact_match"] == ["0.9688", "0.03125"] and results["last step"] == ["100", "1"]
    assert results["peak memory, MiB"] == ["1,700", "1,500"]
    assert results["time since its last start"] == ["12 min 31 s"] * 2


def test_equal_runs_differ_in_nothing(runs):
    tables = compared([runs[0], runs[0]])
    assert {title for title, lines in tables.items() if lines} == {"Results"}


def test_a_missing_value_and_none_are_told_apart():
    assert differing_lines([{"a": None}, {}, {"a": [1]}]) == [("a", ["none", "-", "[1]"])]
    assert differing_lines([{"a": None}, {"a": None}]) == []


def test_notes_name_uncommitted_code_and_runs_that_go_on(runs):
    write_run(runs[1], OTHER | {"status": "running"})
    notes = comparison_notes([read_run(str(folder)) for folder in runs])
    assert [note.rsplit("/", 1)[1] for note in notes] == ["one.", "two."] and "-dirty" not in notes[0]


def test_runs_of_one_name_are_called_by_their_folders(runs):
    read = [read_run(str(folder)) for folder in runs]
    assert list(name_runs(read)) == ["first-try", "second"]
    write_run(runs[1], RUN)
    assert list(name_runs([read_run(str(folder)) for folder in runs])) == [str(folder) for folder in runs]
    with pytest.raises(ConfigError, match=r"^runs: .*/one is given twice; give each folder once\.$"):
        name_runs([read[0], read[0]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"its run.json cannot be read \(No such file or directory\)"),
        ("{", r"it is no JSON"),
        ("[]", "was not written by a run"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path, content, words):
    if content:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as error:
        read_run(str(tmp_path))
    assert str(error.value).startswith("runs: ") and str(error.value).endswith("give the output_dir of a run.")
    assert "\n" not in str(error.value)


def test_the_page_has_the_curves_of_all_and_the_same_tables(runs, tmp_path):
    named = name_runs([read_run(str(folder)) for folder in runs])
    path = tmp_path / "new" / "compare.html"
    write_comparison(named, path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.charts()["runs"] == ["first-try", "second"]
    loss = page.charts()["charts"][0]
    assert [(curve["label"], curve["run"]) for curve in loss["curves"]] == [
        ("first-try: train", 0),
        ("first-try: eval", 0),
        ("second: train", 1),
        ("second: eval", 1),
    ]
    assert page.texts("h2") == ["Curves", "Results", "Settings", "Data", "Code", "Versions", "In force"]
    assert "first-trysecondlearning_rate2e-050.0001" in page.texts("table", "differences")
    write_comparison(named, path)  # its own page may be replaced


def test_hostile_names_are_only_text(runs, tmp_path):
    write_run(runs[1], OTHER | {"run_name": HOSTILE, "packages": {HOSTILE: HOSTILE}})
    write_comparison(name_runs([read_run(str(folder)) for folder in runs]), tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert len(page.texts("script")) == 3 and page.charts()["runs"][1] == HOSTILE


def test_many_long_runs_make_a_small_page(tmp_path):
    lines = [{"step": k, "loss": 1 / k, "grad_norm": k * 1.234567, "eval/loss": 1 / k} for k in range(1, 3000)]
    folders = [tmp_path / f"run {k}" for k in range(MAX_COMPARED_RUNS)]
    for folder in folders:
        write_run(folder, RUN | {"options": {f"o{k}": f"{folder}{'x' * 5000}" for k in range(100)}}, lines)
    write_comparison(name_runs([read_run(str(folder)) for folder in folders]), tmp_path / "c.html")
    assert (tmp_path / "c.html").stat().st_size < 2_000_000


def test_a_file_of_somebody_else_is_not_replaced(runs, tmp_path):
    named = name_runs([read_run(str(folder)) for folder in runs])
    (tmp_path / "thesis.html").write_text("<!DOCTYPE html>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^output_file: .*thesis\.html is no page of this project"):
        write_comparison(named, tmp_path / "thesis.html")
    assert (tmp_path / "thesis.html").read_text(encoding="utf-8") == "<!DOCTYPE html>"
    with pytest.raises(ConfigError, match=r"^output_file: .* cannot be written \("):
        write_comparison(named, tmp_path / "thesis.html" / "x.html")
    with pytest.raises(ConfigError, match=r"^output_file: .* cannot be written \(Is a directory\)"):
        write_comparison(named, tmp_path)


def test_words_before_the_options_are_the_runs():
    options = parse_options(ReportOptions, ["a", "b", "--output_file", "c.html"])
    assert (options.runs, options.output_file) == (["a", "b"], "c.html")
    assert parse_options(ReportOptions, ["--runs", "a", "b"]).runs == ["a", "b"]
    wrong = {
        (): "runs: none is given; name the output_dir of a run, or of several.",
        ("a",) * 21: "runs: 21 are given; give at most 20.",
        ("a", "--output_file", "b.txt"): "output_file: b.txt is no name of a page; let it end with .html.",
    }
    for words, sentence in wrong.items():
        with pytest.raises(ConfigError) as error:
            parse_options(ReportOptions, words)
        assert str(error.value) == sentence


def run_script(*words: object, width: int = 80) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "launch" / "report.py", *map(str, words)]
    environment = os.environ | {"COLUMNS": str(width)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_script_prints_the_tables_and_writes_the_page(runs, tmp_path):
    ended = run_script(*runs, "--output_file", tmp_path / "compare.html")
    assert ended.returncode == 0 and ended.stderr == ""
    assert "│ learning_rate │ 2e-05     │ 0.0001 │" in ended.stdout and "In force: no difference" in ended.stdout
    assert ended.stdout.splitlines()[-1] == f"wrote {tmp_path / 'compare.html'}"
    assert max(map(len, ended.stdout.splitlines()[:-2])) <= 80
    # One folder: its own page.
    ended = run_script(runs[0])
    assert ended.stdout == f"wrote {runs[0] / 'report.html'}\n"
    assert Page((runs[0] / "report.html").read_text(encoding="utf-8")).texts("h1") == ["first-try"]


def test_the_script_refuses_a_folder_that_is_no_run(runs, tmp_path):
    ended = run_script(runs[0], tmp_path / "nothing")
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.startswith("error: runs: ")
    assert len(ended.stderr.splitlines()) == 1 and json.loads((runs[0] / "run.json").read_text(encoding="utf-8"))
